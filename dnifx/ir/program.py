"""The model on its way through the passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dnifx.ir.actions import Schedule
from dnifx.ir.capture import Capture, Signature
from dnifx.ir.cuts import Boundary, Cut, Interface, Partition
from dnifx.ir.time import Carry, Recurrence, Recurrent
from dnifx.ir.values import Measure


@dataclass(frozen=True)
class Context:
    """What estimators may see beside the activation.

    Attributes:
        features: From what the user passes as context (a label, by default) to a float tensor [batch, ..., width].
        width: Size of its last dimension.
        description: A few words for reports: ``label (10 classes)``.
        classes: Number of classes of a label context, or None.
    """

    features: Callable[[Any], torch.Tensor]
    width: int
    description: str
    classes: int | None = None


@dataclass(frozen=True)
class Program:
    """The model on its way through the passes; each pass returns a new one with more of it known.

    Attributes:
        model: The user's module; parameters and buffers are never copied.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        graph: The captured graph, over the model's own module paths (capture).
        signature: How the graph is called (capture).
        capture: How the graph was obtained (capture).
        constants: Values that the graph reads and the model does not hold, by path below CONSTANTS (capture).
        measures: What each node costs, by node name (measure).
        cuts: The cuts, resolved to nodes and edges (cuts).
        levels: How many cuts lie before each node, by node name (cuts).
        partition_of: The partition index of each node, by node name (partition).
        partitions: The partitions in order (partition).
        boundaries: The boundaries, in the order of their producers (legalize).
        interfaces: One for each boundary (insert).
        context: What estimators may see (insert).
        mask: Name of the input that says which tokens count, if any (insert).
        submodules: One graph for each partition (split).
        schedule: What a training step runs (schedule).
        fused: The whole graph with interface nodes (emit).
        notes: What the passes fixed or left out, in words for the user.
        recurrents: The cuts in time that were asked for.
        carries: Every tensor that a window leaves to the next, differentiable or not (states).
        recurrences: The boundaries in time (recurrences, insert).
        batch_dim: The dimension of the inputs that counts examples, where no state says so.
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
    carries: tuple[Carry, ...] = ()
    recurrences: tuple[Recurrence, ...] = ()
    batch_dim: int = 0
