"""Cuts, partitions, boundaries and interfaces."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, count
from keyword import iskeyword

import torch
from torch import nn

from dnifx.ir.values import TensorSpec

MODULE_NAMES = frozenset(dir(nn.ModuleDict()))
"""Names that a child of an ``nn.ModuleDict`` cannot have, such as ``keys`` and ``values``."""


@dataclass(frozen=True)
class Edge:
    """The edge from one node to another, each named by graph node or module path. As a cut: exactly this edge."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Cut:
    """A place to decouple.

    Attributes:
        name: The name that users know it by: a module path, a node name or an edge.
        nodes: Cut after these nodes, at every value that crosses there.
        edges: Cut exactly these edges.
        level: The level that ends at this cut, where the side of every node is already known (cuts given as a number).
    """

    name: str
    nodes: tuple[str, ...] = ()
    edges: tuple[Edge, ...] = ()
    level: int | None = None


@dataclass(frozen=True)
class Partition:
    """A subgraph that is updated by itself.

    Attributes:
        index: Its number, in the order of execution.
        nodes: Names of its graph nodes, in order. Every node has exactly one partition.
        inputs: Names of the values that it takes, in order: model inputs and values of earlier partitions.
        outputs: Names of the values that later partitions or the model's output take.
        parameters: Paths of the trainable parameters that it owns and updates.
        uses: Paths of all trainable parameters that it reads: its own and those that other partitions own.
        flops: Floating-point operations of its forward.
        parameter_bytes: Bytes of the parameters that it reads.
        activation_bytes: Bytes of the tensors that its forward makes.
        device: The device that its parameters are on.
        every: Windows from one of its firings to the next; 1 without rates.
    """

    index: int
    nodes: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    flops: int = 0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    every: int = 1

    @property
    def name(self) -> str:
        """Its name in reports and in generated code, as in torch.fx's split_module."""
        return f"submod_{self.index}"


def own_parameters(partitions: Sequence[Partition], index: int) -> tuple[str, ...]:
    """Return the paths of the parameters that a partition reads and no other one does."""
    others = {name for each in partitions if each.index != index for name in each.uses}
    return tuple(name for each in partitions if each.index == index for name in each.uses if name not in others)


def identifier(name: str) -> str:
    """Return a boundary's name as a Python identifier that can be a key of an ``nn.ModuleDict``, and is none of a step's own."""
    text = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    own = text in MODULE_NAMES or iskeyword(text) or text.startswith(("submod_", "start_"))
    free = text[:1].isalpha() and not own
    return text if free else f"cut_{text}"


def free_name(name: str, taken: AbstractSet[str]) -> str:
    """Return a boundary's name, with a number where its identifier is taken (``a.b`` and ``a_b`` have the same)."""
    numbered = (f"{name}@{number}" for number in count(1))
    return next(title for title in chain([name], numbered) if identifier(title) not in taken)


@dataclass(frozen=True)
class Boundary:
    """All differentiable values that cross from one partition to later ones at one cut.

    Attributes:
        index: Its number, in the order of the producers.
        name: The name of its cut, as the user wrote or would write it.
        producer: Index of the partition that makes the values.
        consumers: Indices of the partitions that take any of the values, in order.
        values: Names of the values.
        specs: Their tensor specs.
        messages: Number of firings of the producer whose values the consumers take at once.
    """

    index: int
    name: str
    producer: int
    consumers: tuple[int, ...]
    values: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    messages: int = 1

    @property
    def key(self) -> str:
        """The key of its estimator in the module and in state dicts: the name as a Python identifier."""
        return identifier(self.name)


@dataclass(frozen=True)
class Interface:
    """What stands on a boundary: a gradient estimator and, optionally, an input model.

    ``mix``, ``prop``, ``by_pixel`` and the ``needs_...`` flags are those of the estimator; see ``GradientEstimator``.

    Attributes:
        boundary: Index of its boundary.
        estimator: The gradient estimator.
        description: The estimator in a few words, for reports: ``Synthetic(hidden=1)``.
        locked: Whether the producer waits for the target (Oracle, BPLambda, Prop).
        fits: Whether the estimator learns.
        late: Steps by which the true gradient comes late (Late); 0 for all others.
        input_model: The synthetic input model, if any.
        suffix: What the thin suffix computes, as text, where the estimator is one; else empty. It is asked with the target, the
            number of examples and ``reads`` in place of the context.
        reads: Names of the nodes that a suffix reads beside the boundary's values.
        detail: What was made of the choice, for a note; empty where there is nothing to say.
        needs_answer: Whether a suffix compares its output with the target (else the model computes its loss itself).
        fit: What the estimates receive; ``"own"`` where the estimator lowers a loss of its own.
        fit_weight: What an absolute error is multiplied by.
        flops: FLOPs of one answer for the example inputs; None where they are not known.
        mirrors: Names of the model's parameters that a suffix holds copies of.
        refresh: After how many training steps these copies are taken again.
        make: Makes the estimator anew, on the CPU, where this one is on the meta device; else None.
    """

    boundary: int
    estimator: nn.Module
    description: str
    locked: bool = False
    fits: bool = True
    input_model: nn.Module | None = None
    late: int = 0
    mix: float = 0.0
    prop: float = 0.0
    fit: str = "squared"
    fit_weight: float = 1.0
    needs_target: bool = True
    needs_loss: bool = False
    needs_error: bool = False
    needs_mask: bool = False
    by_pixel: bool = False
    suffix: str = ""
    reads: tuple[str, ...] = ()
    needs_answer: bool = False
    detail: str = ""
    flops: int | None = None
    mirrors: tuple[str, ...] = ()
    refresh: int = 1
    make: Callable[[], nn.Module] | None = None

    @property
    def blends(self) -> bool:
        """Whether the producer receives both the estimate and the target."""
        return self.mix > 0 or self.prop > 0

    @property
    def takes_target(self) -> bool:
        """Whether the producer receives the target alone (Oracle)."""
        return self.locked and not self.blends

    @property
    def needs_end(self) -> bool:
        """Whether the estimator needs what only the end of the model gives: the loss, or the error of the output."""
        return self.needs_loss or self.needs_error

    def scheduled_only(self, windows: bool) -> bool:
        """Whether a trainer can run it and the fused forward cannot.

        It needs the loss or the output's error, and that comes from a window (``windows``) or would come too late in a
        single backward pass.
        """
        late = self.blends or self.needs_mask or self.input_model is not None
        return bool(self.late) or (self.needs_end and windows) or (self.needs_error and late)
