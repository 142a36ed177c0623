"""What waits for gradients: the rates of pipelines and of data parallel training, from measured costs and a link."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    the message.

    Args:
        kind: The schedule.
        count: Micro-batches.
        stages: The stages, with the costs of a micro-batch of this size.
        link: The link between neighbours.
    """
    waiting = [list(order(kind, index, len(stages), count)) * STEPS for index in range(len(stages))]
    done, free, busy = [0] * len(stages), [0.0] * len(stages), dict[tuple[int, int], float]()
    sent: dict[tuple[int, int, str, int], float] = {}
    ends: list[float] = [0.0] * STEPS
    while any(done[index] < len(ops) for index, ops in enumerate(waiting)):
        for index, stage in enumerate(stages):
            while done[index] < len(waiting[index]):
                step, (what, micro) = done[index] // (2 * count), waiting[index][done[index]]
                source = index - 1 if what == "F" else index + 1
                now = free[index]
                if 0 <= source < len(stages):
                    if (source, step, what, micro) not in sent:
                        break
                    size = stages[min(index, source)].bytes
                    leaves = max(sent[source, step, what, micro], now + link.latency, busy.get((source, index), 0.0))
                    busy[source, index] = leaves + size / link.bandwidth
                    now = max(now, busy[source, index] + link.latency) + size * link.handling
                now += stage.forward if what == "F" else stage.backward
                target = index + 1 if what == "F" else index - 1
                if 0 <= target < len(stages):
                    now += stages[min(index, target)].bytes * link.handling
                    sent[index, step, what, micro] = now
                done[index] += 1
                if done[index] % (2 * count) == 0:
                    now += stage.update
                    ends[step] = max(ends[step], now)
                free[index] = now
    half = STEPS // 2 - 1
    return (STEPS - 1 - half) / (ends[-1] - ends[half])


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
