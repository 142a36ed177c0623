"""What waits for gradients: the rates of pipelines and of data parallel training, from measured costs and a link."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil
from typing import Literal

from dnifx.schedules import Link

SEGMENT = 1 << 20
"""Bytes that gloo sends at a time when it averages gradients; each piece waits for the one before it."""

STEPS = 6
"""Steps of a pipeline that are simulated; the rate is that of the later half."""

Kind = Literal["gpipe", "1f1b"]


@dataclass(frozen=True)
class Stage:
    """What one place of a pipeline does, in seconds.

    Attributes:
        forward: For one micro-batch.
        backward: For one micro-batch.
        update: For the whole batch: the optimizer, and adding the gradients of all micro-batches but the first.
        bytes: What it gives to the next stage for one micro-batch. As many come back.
    """

    forward: float
    backward: float
    update: float
    bytes: int = 0


def order(kind: Kind, stage: int, stages: int, count: int) -> Iterator[tuple[str, int]]:
    """Return what a stage does in a step: ``("F", 3)`` is the forward pass of micro-batch 3.

    GPipe runs all forward passes first. 1F1B runs as few as fill the stages behind, then forward and backward in turn.
    """
    ahead = count if kind == "gpipe" else min(count, stages - stage)
    yield from (("F", index) for index in range(ahead))
    for index in range(count - ahead):
        yield "B", index
        yield "F", ahead + index
    yield from (("B", index) for index in range(count - ahead, count))


def pipeline_rate(kind: Kind, count: int, stages: Sequence[Stage], link: Link) -> float:
    """Return the steps per second of a pipeline.

    A message leaves once the receiver has asked for it, as gloo's and NCCL's do, and a stage asks when it comes to where it needs
    the message. A stage sends one message after the other.

    Args:
        kind: The schedule.
        count: Micro-batches.
        stages: The stages, with the costs of a micro-batch of this size.
        link: The link between neighbours.
    """
    line = Pipeline(
        stages, link, [list(order(kind, index, len(stages), count)) * STEPS for index in range(len(stages))]
    )
    line.run()
    half = STEPS // 2 - 1
    ends = [max(each[2 * count * (step + 1) - 1] for each in line.ends) for step in range(STEPS)]
    return (STEPS - 1 - half) / (ends[-1] - ends[half])


@dataclass
class Pipeline:
    """Stages at work.

    Attributes:
        stages: What they cost.
        link: The link between neighbours.
        orders: What each stage does, step by step; see ``order``.
        ends: When each stage has done each of these, its messages included.
    """

    stages: Sequence[Stage]
    link: Link
    orders: Sequence[Sequence[tuple[str, int]]]

    def __post_init__(self) -> None:
        self.ends: list[list[float]] = [[] for _ in self.stages]
        self._busy = [0.0] * len(self.stages)  # with sending
        self._sent: dict[tuple[int, str, int], list[float]] = {}

    def run(self) -> None:
        """Do all of it: of what could begin, what begins first."""
        ready, waiting, near = list[tuple[float, int]](), set(range(len(self.stages))), range(len(self.stages))
        while True:
            for stage in waiting.intersection(near):
                begins = self._begins(stage)
                if begins is not None:
                    heappush(ready, (begins, stage))
                    waiting.remove(stage)
            if not ready:
                return
            begins, stage = heappop(ready)
            self._do(stage, begins)
            waiting.add(stage)
            near = range(stage - 1, stage + 2)

    def _begins(self, stage: int) -> float | None:
        """Return when a stage could begin what comes next, or the message for it leave; None where that is not known yet."""
        done = len(self.ends[stage])
        free = self.ends[stage][-1] if done else 0.0
        if done == len(self.orders[stage]):
            return None
        what, micro = self.orders[stage][done]
        source = stage - 1 if what == "F" else stage + 1
        if not 0 <= source < len(self.stages):
            return free
        sent = self._sent.get((source, what, micro))
        return max(sent[0], free + self.link.latency) if sent else None

    def _do(self, stage: int, begins: float) -> None:
        what, micro = self.orders[stage][len(self.ends[stage])]
        own, link = self.stages[stage], self.link
        before, behind = (stage - 1, stage + 1) if what == "F" else (stage + 1, stage - 1)
        now = begins
        if 0 <= before < len(self.stages):
            self._sent[before, what, micro].pop(0)
            size = self.stages[min(stage, before)].bytes
            self._busy[before] = max(begins, self._busy[before]) + size / link.bandwidth
            now = self._busy[before] + link.latency + size * link.handling
        now += own.forward if what == "F" else own.backward
        if 0 <= behind < len(self.stages):
            now += self.stages[min(stage, behind)].bytes * link.handling
            self._sent.setdefault((stage, what, micro), []).append(now)
        last = (len(self.ends[stage]) + 1) % (len(self.orders[stage]) // STEPS) == 0
        self.ends[stage].append(now + own.update * last)


def pipeline_work(count: int, stages: Sequence[Stage], link: Link) -> float:
    """Return the seconds for which the stages are busy in a step, all together."""
    own = sum(count * (each.forward + each.backward) + each.update for each in stages)
    return own + 4 * count * sum(each.bytes for each in stages) * link.handling


def data_parallel_rate(seconds: float, gradient_bytes: int, replicas: int, link: Link) -> float:
    """Return the steps per second of replicas that average their gradients in a ring, as DistributedDataParallel does on gloo.

    Args:
        seconds: A step of one replica, on its share of the batch.
        gradient_bytes: Bytes of all gradients.
        replicas: Number of replicas.
        link: The link between neighbours.
    """
    if replicas == 1:
        return 1 / seconds
    moved = 2 * (replicas - 1) / replicas * gradient_bytes
    rounds = 2 * (replicas - 1) * ceil(gradient_bytes / replicas / SEGMENT)
    return 1 / (seconds + moved / link.bandwidth + rounds * link.latency + 2 * moved * link.handling)
