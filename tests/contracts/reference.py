"""An oracle written by hand: what a decoupled step has to compute, from a drawn model's operations alone.

It knows nothing of the compiler. It runs the operations one by one in their own order, without writing in place; a
value that an operation of another partition reads becomes a detached leaf; one call of autograd gives every gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_models.model import Model, Op

Loss = Callable[[object, Tensor], Tensor]
Estimates = Mapping[str, Tensor]
Estimate = Callable[[Mapping[str, Tensor]], Estimates]
NOWHERE = -1
"""The partition of what computes no part of the output, or no tensor: it reads values as they are, and no gradient comes of it."""


@dataclass(frozen=True)
class Crossing:
    """A value on its way to other partitions: the producer's, and the leaf that every consumer reads."""

    name: str
    produced: Tensor
    leaf: Tensor


@dataclass(frozen=True)
class Step:
    """What one forward and backward of a decoupled model gives.

    Attributes:
        loss: The task loss.
        output: The model's output, in its own structure.
        gradients: By parameter path; None where nothing reaches the parameter.
        values: The crossing values, detached, by the names of the drawn model.
        estimates: The per-example synthetic gradients that were given.
        targets: The per-example gradients that arrive at the crossing values, summed over all their consumers.
    """

    loss: Tensor
    output: object
    gradients: dict[str, Tensor | None]
    values: dict[str, Tensor]
    estimates: Estimates
    targets: dict[str, Tensor]


@dataclass
class Run:
    """The values of a model while its operations run, each with the partition that last wrote it."""

    module: nn.Module
    values: dict[str, Tensor]
    partition_of: dict[str, int]
    views: dict[str, Op] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    crossings: dict[str, Crossing] = field(default_factory=dict)

    def read(self, name: str, partition: int) -> Tensor:
        """Return a value as a partition sees it; what was rewritten crosses by the name that the write gave it."""
        name = self.renamed.get(name, name)
        value = self.values[name]
        if (
            partition == NOWHERE
            or self.partition_of[name] == partition
            or not isinstance(value, Tensor)
            or not value.requires_grad
        ):
            return value
        if name not in self.crossings:
            self.crossings[name] = Crossing(name, value, value.detach().requires_grad_())
        assert self.crossings[name].produced is value, f"{name} crosses, is rewritten, and crosses again"
        return self.crossings[name].leaf

    def evaluate(self, code: str, **values: object) -> object:
        return eval(code, {"torch": torch, "F": F, "self": self.module, **values})

    def execute(self, op: Op, partition: int) -> None:
        seen = {name: self.read(name, partition) for name in op.inputs}
        with torch.set_grad_enabled(not op.no_grad):
            result = self.evaluate(op.code, **seen)
        if op.writes:
            self.write(op.inputs[0], result, partition)
        outputs = result if len(op.outputs) > 1 else (result,)
        assert isinstance(outputs, tuple)
        self.values |= dict(zip(op.outputs, outputs, strict=True))
        self.partition_of |= dict.fromkeys(op.outputs, partition)
        if op.views:
            self.views[op.outputs[0]] = op
        if op.writes:
            older = [name for name, newer in self.renamed.items() if newer == op.inputs[0]]
            self.renamed |= dict.fromkeys([*older, op.inputs[0]], op.outputs[0])

    def write(self, name: str, new: object, partition: int) -> None:
        """Give a value, what it is a view of, and every view of that their new contents."""
        assert isinstance(new, Tensor)
        while name in self.views:
            self.partition_of[name] = partition
            base = self.views[name].views
            undone = self.evaluate(self.views[name].undo, new=new, base=self.read(base, partition))
            assert isinstance(undone, Tensor)
            name, new = base, undone
        self.values[name], self.partition_of[name] = new, partition
        for view, op in self.views.items():
            if self.root(view) == name:
                code = op.views if op.writes else op.code
                fresh = self.evaluate(code, **{op.views: self.values[op.views]})
                assert isinstance(fresh, Tensor)
                self.values[view], self.partition_of[view] = fresh, partition

    def root(self, name: str) -> str:
        while name in self.views:
            name = self.views[name].views
        return name


def run(
    model: Model, module: nn.Module, inputs: tuple[Tensor, ...], partition_of: Mapping[str, int] | None = None
) -> tuple[object, Run]:
    """Run a drawn model, each operation in the partition of what it binds first; without ``partition_of``, in one."""
    names = [value.name for value in model.inputs]
    state = Run(module, dict(zip(names, inputs, strict=True)), dict.fromkeys(names, 0))
    for op in model.ops:
        state.execute(op, partition_of[op.outputs[0]] if partition_of else 0)
    last = partition_of["output"] if partition_of else 0
    values = tuple(state.read(value.name, last) for value in model.outputs)
    if model.form == "dict":
        return {f"out_{value.name}": result for value, result in zip(model.outputs, values, strict=True)}, state
    return values if len(values) > 1 else values[0], state


def live(task: Tensor, crossings: list[Crossing]) -> list[Crossing]:
    """Keep the crossing values that the loss depends on; where no gradient can arrive, none is made up."""
    reached: list[Crossing] = []
    while True:
        ends = [end for end in (task, *(crossing.produced for crossing in reached)) if end.requires_grad]
        leaves = [crossing.leaf for crossing in crossings]
        total = sum((end.sum() for end in ends), torch.zeros((), requires_grad=True))
        found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True) if leaves else ()
        now = [crossing for crossing, gradient in zip(crossings, found, strict=True) if gradient is not None]
        if len(now) == len(reached):
            return now
        reached = now


def nothing(values: Mapping[str, Tensor]) -> Estimates:
    """Estimate nothing: what detaching at the cut amounts to."""
    return {}


def step(
    model: Model,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    loss: Loss,
    partition_of: Mapping[str, int] | None = None,
    estimate: Estimate = nothing,
    mean: bool = True,
) -> Step:
    """Compute a decoupled step.

    Args:
        model: The drawn model.
        module: Its weights; nothing is written to their gradients.
        inputs: Its inputs.
        target: What the loss compares the output with.
        loss: From output and target to a scalar.
        partition_of: The partition of every value, by name, and of ``output``; without it this is plain backprop.
        estimate: From the crossing values, detached, to their per-example synthetic gradients; a missing one is zero.
        mean: Whether the loss averages over the examples (otherwise it sums).
    """
    output, state = run(model, module, inputs, partition_of)
    task = loss(output, target)
    crossings = live(task, list(state.crossings.values()))
    values = {crossing.name: crossing.produced.detach() for crossing in crossings}
    estimates = estimate(values)
    scale = 1 / len(inputs[0]) if mean else 1.0
    surrogate = task
    for crossing in crossings:
        if crossing.name in estimates:
            surrogate = surrogate + (crossing.produced * estimates[crossing.name].detach() * scale).sum()
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    leaves = [*parameters.values(), *(crossing.leaf for crossing in crossings)]
    found = (
        torch.autograd.grad(surrogate, leaves, allow_unused=True) if surrogate.requires_grad else [None] * len(leaves)
    )
    arriving = zip(crossings, found[len(parameters) :], strict=True)
    targets = {
        crossing.name: torch.zeros_like(crossing.leaf) if gradient is None else gradient / scale
        for crossing, gradient in arriving
    }
    gradients = dict(zip(parameters, found[: len(parameters)], strict=True))
    return Step(task.detach(), output, gradients, values, estimates, targets)


def per_example(output: object, target: Tensor) -> Tensor:
    """A loss of every floating-point output, one number an example: ||output - target||^2 with [batch] targets."""
    tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    floats = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    return sum(
        (((tensor.reshape(len(target), -1) - target[:, None]) ** 2).sum(1) for tensor in floats),
        torch.zeros_like(target),
    )


def mean_loss(output: object, target: Tensor) -> Tensor:
    return per_example(output, target).mean()


def sum_loss(output: object, target: Tensor) -> Tensor:
    return per_example(output, target).sum()
