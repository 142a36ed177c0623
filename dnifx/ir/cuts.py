"""Cuts, partitions, boundaries, and what stands on a boundary."""

from dataclasses import dataclass
from keyword import iskeyword

import torch
from torch import nn

from dnifx.ir.values import TensorSpec

MODULE_NAMES = frozenset(dir(nn.ModuleDict()))
"""Names that no child of a module dictionary can have, such as ``keys`` and ``values``."""


@dataclass(frozen=True)
class Edge:
    """A value on its way from one node to another, named by graph nodes or module paths; as a cut, exactly this edge."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Cut:
    """A place to decouple.

    Attributes:
        name: The name users know it by: a module path, a node name, an edge.
        nodes: Cut after these nodes; completed to every value that crosses there.
        edges: Cut exactly these edges.
        level: Where every node's side is already decided (the integer form), the level that ends at this cut.
    """

    name: str
    nodes: tuple[str, ...] = ()
    edges: tuple[Edge, ...] = ()
    level: int | None = None


@dataclass(frozen=True)
class Partition:
    """A subgraph that updates alone.

    Attributes:
        index: Its place in the order of execution.
        nodes: Names of its graph nodes, in order; every node has exactly one partition.
        inputs: Names of the values it takes: model inputs and values of earlier partitions, in order.
        outputs: Names of the values that later partitions (or the model's output) take.
        parameters: Paths of the trainable parameters that it owns and updates.
        uses: Paths of all trainable parameters that it reads, its own and those that a later partition owns.
        flops: Floating-point operations of its forward.
        parameter_bytes: Bytes of the parameters that it reads.
        activation_bytes: Bytes of the tensors that its forward makes.
        device: The device its parameters live on.
        every: Windows from one of its firings to the next; 1 in what is no system of several rates.
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
        """The name users and generated code know it by, as torch.fx's split_module numbers them."""
        return f"submod_{self.index}"


def identifier(name: str) -> str:
    """Return a boundary's name as a Python identifier that an ``nn.ModuleDict`` takes as a key, and no partition's name."""
    text = "".join(letter if letter.isalnum() else "_" for letter in name)
    free = text[:1].isalpha() and text not in MODULE_NAMES and not iskeyword(text) and not text.startswith("submod_")
    return text if free else f"cut_{text}"


@dataclass(frozen=True)
class Boundary:
    """All differentiable values that cross from one partition to later ones at one cut.

    Attributes:
        index: Its number, in the order of its producers.
        name: The name of its cut, as the user wrote or would write it.
        producer: Index of the partition that makes the values.
        consumers: Indices of the partitions that take any of them, in order.
        values: Names of the values.
        specs: Their tensor specs.
        messages: How many firings of the producer its consumers take at once.
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
        """The name as a Python identifier: the key of its estimator in the module and in state dicts."""
        return identifier(self.name)


@dataclass(frozen=True)
class Interface:
    """What stands on a boundary: a gradient estimator, and optionally an input model.

    Attributes:
        boundary: Index of its boundary.
        estimator: The gradient estimator.
        description: The estimator in a few words, as reports show it: ``Synthetic(hidden=1)``.
        locked: Whether the producer waits for the true gradient (oracle, BP(lambda)).
        fits: Whether the estimator learns.
        input_model: The synthetic input model, if any.
        mix: Share of the target in what the producer receives; the rest is the estimate.
        prop: Weight of the gradient of the estimator's own loss, which the producer receives beside the estimate.
        needs_target: Whether the estimator learns from the target gradient, so that the target has to be computed.
        needs_loss: Whether it learns from the loss of each example, which it predicts.
        needs_error: Whether it answers from the gradient of the loss with respect to the model's output.
        needs_mask: Whether it takes the mask of tokens where there is one.
    """

    boundary: int
    estimator: nn.Module
    description: str
    locked: bool = False
    fits: bool = True
    input_model: nn.Module | None = None
    mix: float = 0.0
    prop: float = 0.0
    needs_target: bool = True
    needs_loss: bool = False
    needs_error: bool = False
    needs_mask: bool = False

    @property
    def blends(self) -> bool:
        """Whether the producer's gradient is made of both the estimate and the target."""
        return self.mix > 0 or self.prop > 0

    @property
    def needs_end(self) -> bool:
        """Whether it needs what only the end of the model gives: the loss, or the error of the output."""
        return self.needs_loss or self.needs_error

    def scheduled_only(self, windows: bool) -> bool:
        """Whether a trainer alone can serve it.

        What it needs of the end comes from a window, or goes together with what one backward pass would have too late.
        """
        late = self.blends or self.needs_mask or self.input_model is not None
        return (self.needs_end and windows) or (self.needs_error and late)
