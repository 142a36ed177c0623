"""Measured costs: a clock between the actions of a training step, on a copy of the net."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dnifx import schedules
from dnifx.api import step_source
from dnifx.engines.messages import packed, unpacked
from dnifx.errors import ScheduleError
from dnifx.passes.measure import examples_of
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.optimizers import OptimizerSpec
from dnifx.schedules.dependencies import links
from dnifx.schedules.lags import refuse_lag

WARM_UP = 3
"""Steps before the clock counts: the first ones allocate memory."""

SAMPLE = 1 << 22
"""Bytes of a message on which the cost of a byte is measured."""


@dataclass(frozen=True)
class Profile:
    """What a training step costs in one process, in seconds.

    Attributes:
        examples: Examples in the batch; 0 where inputs have no batch.
        costs: Seconds of each action by its name: ``{"F0": 0.1, ...}``.
        beside: Seconds of a step outside of its actions.
        state_bytes: Bytes that the optimizer of each partition and estimator keeps, by partition name or boundary key.
    """

    examples: int
    costs: Mapping[str, float]
    beside: float
    state_bytes: Mapping[str, int]

    @property
    def step(self) -> float:
        """Seconds of a step in one process."""
        return self.beside + sum(self.costs.values())


def profile(
    net: DecoupledModule,
    optimizer: OptimizerSpec,
    target: Any,
    *,
    examples: int | None = None,
    locked: bool = False,
    rounds: int = 10,
) -> Profile:
    """Measure the actions of a training step on the example inputs. The net stays as it is: a copy of it is trained.

    Of the rounds, the faster half counts, of which the median is taken: other work on the machine makes a round slower only.

    Args:
        net: A net without rates, made with ``loss=``.
        optimizer: As ``net.trainer`` takes it.
        target: What the loss compares the output with.
        examples: Take so many examples of the batch; all by default.
        locked: Let producers wait for true gradients, without fits, as backpropagation does.
        rounds: Steps that are measured.

    Raises:
        DnifxError: The net cannot be trained on these inputs.
    """
    own = copy.deepcopy(net)
    program, size = own.program, batch_size(net)
    args, kwargs, wanted = shortened((program.args, dict(program.kwargs), target), program.batch_dim, size, examples)
    order: Any = schedules.fixed(schedules.backprop(program, fit=False), partial=True) if locked else "sequential"
    trainer = own.trainer(optimizer, order, lag=0 if locked or why_never_late(net) else 1, tied_lag=0, replicas="apart")
    clock = _Laps(program.partitions[0].device)
    functions = trainer.parts[0].functions
    functions.emitters = replace(functions.emitters, step=partial(step_source, clocked=True))
    functions.shared = {**functions.shared, "clock": clock}
    runs = []
    with torch.random.fork_rng():
        for _ in range(WARM_UP + rounds):
            clock.begin()
            trainer.step(*args, target=wanted, kwargs=kwargs)
            runs.append(clock.ended())
    fast = sorted(runs[WARM_UP:], key=lambda run: sum(run.values()))[: -(-rounds // 2)]
    costs = {name: statistics.median(run[name] for run in fast) for name in fast[0]}
    beside = costs.pop("beside") + costs.pop("begin")
    made = {**trainer.optimizers, **trainer.estimator_optimizers}
    states = {name: state_bytes(each) for name, each in made.items()}
    return Profile(examples or size, costs, beside, states)


class _Laps:
    """A clock that tells how long each action of a step took."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        self._now = clock_of(device)
        self.laps: dict[str, float] = {}
        self._last = 0.0

    def begin(self) -> None:
        """Begin a step."""
        self._wait()
        self.laps, self._last = {}, self._now()

    def __call__(self, name: str) -> None:
        """End an action."""
        self._wait()
        now = self._now()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def ended(self) -> dict[str, float]:
        """End the step; return the seconds of its actions and, as ``beside``, those after the last of them."""
        self("beside")
        return self.laps


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return the clock that measures work: the processor's time where one thread works, which other processes disturb little."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the tensors that an optimizer keeps."""
    leaves = pytree.tree_leaves(list(optimizer.state.values()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def why_never_late(net: DecoupledModule) -> str:
    """Say why the estimators of a net cannot be fitted late; empty where they can."""
    try:
        refuse_lag(links(net.program), net.program, 1)
    except ScheduleError as error:
        return str(error)
    return ""


def batch_size(net: DecoupledModule) -> int:
    """Return the number of examples in the example inputs; 0 where no input has a batch."""
    counted, program = examples_of(net.program), net.program
    return 0 if counted is None else program.measures[counted[0]].tensors[0].shape[counted[1]]


def shortened(values: Any, dim: int, size: int, examples: int | None) -> Any:
    """Return values whose tensors hold the first examples alone, where they hold the whole batch."""

    def short(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > dim and value.size(dim) == size:
            return value.narrow(dim, 0, examples or size).contiguous()
        return value

    return values if examples in (None, size) else pytree.tree_map(short, values)


def backprop_seconds(
    net: DecoupledModule,
    optimizer: Callable[[Any], Optimizer],
    target: Any,
    examples: int | None = None,
    rounds: int = 10,
) -> float:
    """Measure a step of backpropagation of the whole model, as a plain loop makes it; of a copy of the model."""
    size, model, program = batch_size(net), copy.deepcopy(net.original), net.program
    args, kwargs, wanted = shortened((program.args, dict(program.kwargs), target), program.batch_dim, size, examples)
    made = optimizer([each for each in model.parameters() if each.requires_grad])
    loss, clock, runs = net.losses[0], _Laps(program.partitions[0].device), []
    with torch.random.fork_rng():
        for _ in range(WARM_UP + rounds):
            clock.begin()
            made.zero_grad()
            found = loss(model(*args, **kwargs), wanted)
            torch.autograd.backward(found.mean() if loss.mean else found.sum())
            made.step()
            runs.append(clock.ended()["beside"])
    return statistics.median(sorted(runs[WARM_UP:])[: -(-rounds // 2)])


def handling_seconds(rounds: int = 10) -> float:
    """Measure for how long a byte that is sent, or received, keeps a process busy."""
    values, runs, now = torch.zeros(SAMPLE // 4), [], clock_of(torch.device("cpu"))
    for _ in range(rounds):
        started = now()
        unpacked(packed((0, 0, 0), (values,)))
        runs.append((now() - started) / (2 * SAMPLE))
    return statistics.median(runs)


def adding_seconds(model: nn.Module, rounds: int = 10) -> float:
    """Measure how long it takes to add the gradients of a model to those that are there."""
    sums = [torch.zeros_like(each) for each in model.parameters() if each.requires_grad]
    others, runs = [torch.zeros_like(each) for each in sums], []
    now = clock_of(sums[0].device if sums else torch.device("cpu"))
    for _ in range(rounds):
        started = now()
        for one, other in zip(sums, others, strict=True):
            one += other
        runs.append(now() - started)
    return statistics.median(runs)
