"""The model on its way through the passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dnifx.ir.actions import Schedule
from dnifx.ir.capture import Capture, Signature
from dnifx.ir.cuts import Boundary, Cut, Interface, Partition
from dnifx.ir.parts import Message, Part
from dnifx.ir.time import Carry, Recurrence, Recurrent
from dnifx.ir.values import Measure


@dataclass(frozen=True)
class Context:
    """What estimators see beside the values.

    Attributes:
        features: Turns what the user passes as context, such as a label, into a float tensor [batch, ..., width].
        width: Size of the last dimension of that tensor.
        description: A few words for reports: ``label (10 classes)``.
        classes: Number of classes if the context is a label, else None.
    """

    features: Callable[[Any], torch.Tensor]
    width: int
    description: str
    classes: int | None = None


@dataclass(frozen=True)
class Program:
    """The model on its way through the passes. Each pass returns a new program in which more is known.

    The name of the pass that fills a field in stands in parentheses.

    Attributes:
        model: The user's module; its parameters and buffers are never copied.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        graph: The captured graph, over the model's own module paths (capture).
        signature: How the graph is called (capture).
        capture: How the graph was obtained (capture).
        constants: Values that the graph reads and the model does not hold, by path (capture).
        measures: What each node makes and costs, by node name (measure).
        cuts: The cuts, resolved to nodes and edges (cuts).
        levels: Number of cuts before each node, by node name (cuts).
        partition_of: The partition index of each node, by node name (partition).
        partitions: The partitions in order (partition).
        boundaries: The boundaries, in the order of their producers (legalize).
        interfaces: One for each boundary (insert).
        context: What estimators see beside the values (insert).
        mask: Name of the input that says which tokens count, if any (insert).
        submodules: One graph for each partition (split).
        schedule: What a training step runs (schedule).
        fused: The whole graph with interface nodes (emit).
        notes: What the passes changed or left out, in words for the user.
        recurrents: The cuts in time that were asked for.
        kept_states: By the number of a cut in time whose state the model keeps on itself, the example's (separate_states).
        zero_first: Those whose state was None in the example inputs: the model then begins with zeros (separate_states).
        carries: Every tensor that a window leaves to the next, differentiable or not (states).
        recurrences: The boundaries in time (recurrences, insert).
        batch_dim: The dimension of the inputs that counts examples, where no state says so.
        parts: What fires at one rate each, the fastest first (rates); nothing where all fires in every window.
        programs: The program of each part.
        messages: What crosses between parts; their boundaries are the last ones.
        own_losses: What partitions train themselves of what they leave on the model, by attribute or glob (a trainer).
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    graph: fx.Graph | None = None
    signature: Signature | None = None
    capture: Capture | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()
    levels: Mapping[str, int] = field(default_factory=dict)
    partition_of: Mapping[str, int] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    context: Context | None = None
    mask: str | None = None
    submodules: tuple[fx.Graph, ...] = ()
    schedule: Schedule | None = None
    fused: fx.Graph | None = None
    notes: tuple[str, ...] = ()
    recurrents: tuple[Recurrent, ...] = ()
    kept_states: Mapping[int, Any] = field(default_factory=dict)
    zero_first: tuple[Recurrent, ...] = ()
    carries: tuple[Carry, ...] = ()
    recurrences: tuple[Recurrence, ...] = ()
    batch_dim: int = 0
    parts: tuple[Part, ...] = ()
    programs: tuple["Program", ...] = ()
    messages: tuple[Message, ...] = ()
    own_losses: tuple[str, ...] = ()

    def fired(self) -> tuple[tuple[Part, "Program"], ...]:
        """Return the parts with their programs; without rates the program itself is the one part."""
        if self.parts:
            return tuple(zip(self.parts, self.programs, strict=True))
        return ((Part(partitions=tuple(range(len(self.partitions)))), self),)
