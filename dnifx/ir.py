"""The value types that flow through the passes: a Program and what it is made of."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from keyword import iskeyword
from typing import Any, Protocol

import torch
from torch import fx, nn

CONSTANTS = "captured_constants"
"""The attribute under which a running module holds the constants of its graph; their names begin with it."""

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
class TensorSpec:
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def bytes(self) -> int:
        """Bytes that the elements take."""
        return self.elements * self.dtype.itemsize

    @property
    def is_image(self) -> bool:
        """Whether it has the four dimensions of [batch, channels, height, width]."""
        return len(self.shape) == 4

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
        return f"{kind}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Holder:
    """How a value that is no tensor holds its parts.

    Attributes:
        kind: Its class.
        parts: Of a tuple, a list or a dict with names as keys, each part by its index or key: another holder, or None for a tensor or
            a plain value. Nothing for a value of another class.
    """

    kind: type
    parts: tuple[tuple[Any, "Holder | None"], ...] = ()


@dataclass(frozen=True)
class Measure:
    """What one node costs, seen by running it on fake tensors.

    Attributes:
        tensors: The specs of the tensors in the node's value, in pytree order.
        is_tensor: Whether the value is one tensor (and not a tuple, a number, ...).
        flops: Floating-point operations of its forward, as ``torch.utils.flop_counter`` counts them.
        parameter_bytes: Bytes of the parameters that the node reads.
        activation_bytes: Bytes of the tensors that the node makes (views make none).
        storages: The identity of each tensor's storage; equal numbers are aliases.
        writes: Names of the argument nodes whose memory this node writes in place.
        random: Whether it draws random numbers.
        holder: How the value holds its tensors, where it is none itself.
    """

    tensors: tuple[TensorSpec, ...] = ()
    is_tensor: bool = False
    flops: int = 0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    storages: tuple[int, ...] = ()
    writes: tuple[str, ...] = ()
    random: bool = False
    holder: Holder | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor of the value carries a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the value."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def cost(self) -> int:
        """Work of the node for balancing: its FLOPs, and one for each element it makes."""
        return self.flops + sum(tensor.elements for tensor in self.tensors)


class Signature(Protocol):
    """How a model is called: from its arguments to the graph's flat inputs, and from the graph's flat outputs back.

    ``inputs`` are the names of the graph's placeholders, in order; the graph's output node holds a flat tuple.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's placeholders, in order."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one value for each of ``inputs``; raise InputError where the structure is another one."""

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output, in its own structure, from the graph's flat outputs."""

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the situation of a call: calls with equal keys can run the same graph."""


@dataclass(frozen=True)
class Kept:
    """A submodule that capture kept whole, as one node, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Capture:
    """How the graph was obtained.

    Attributes:
        rung: The technique that succeeded: ``record``, ``export`` or ``symbolic``.
        kept: Submodules kept whole, with the reason.
        verified: Whether outputs, gradients and buffers were compared with the original's.
        tried: Rungs that were refused before, each with its reason.
        guards: How many guards the graph holds; one that fires has the model captured anew.
    """

    rung: str
    kept: tuple[Kept, ...] = ()
    verified: bool = False
    tried: tuple[tuple[str, str], ...] = ()
    guards: int = 0


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
        nodes: Names of its graph nodes, in order; every node has exactly one home.
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


@dataclass(frozen=True)
class Recurrent:
    """A cut in time: the edge from the state that a window leaves to the state that the next one takes.

    Attributes:
        state: Where the state is among the model's inputs: ``"state"``, ``"batch.state"``; a tensor or a structure of them.
        next_state: Where the next state, of the same structure, is in the output: ``"1"``; empty where it is the whole output.
        scale: What the synthetic gradient at a window's end is multiplied by. Near 1, a memory cell whose forget gate stays open
            hands an estimate back as its own target: nothing corrects a wrong one, and the cell can run away.
        batch_dim: The dimension of the state's tensors that counts examples; None: 1 where an ``nn.RNN``, ``nn.GRU`` or
            ``nn.LSTM`` takes the tensor itself, 0 elsewhere.
        into_core: Whether the estimator's own error reaches the core: the trainer computes the last window again for it.
        auxiliary: Whether a head predicts, from the window's start, the synthetic gradient at its end; its error reaches the
            core in the same way.
        trace: Lambda, from 0 to 1, of an eligibility trace by which a trainer fits the estimator to the lambda-return over all
            windows of the episode so far, discounted by ``scale``; None: to the target of one window.
    """

    state: str
    next_state: str
    scale: float = 0.1
    batch_dim: int | None = None
    into_core: bool = False
    auxiliary: bool = False
    trace: float | None = None

    def __str__(self) -> str:
        return f"{self.next_state or 'output'} ~> {self.state}"


@dataclass(frozen=True)
class Every:
    """How often a part of a system fires, and what stands on the messages that it takes.

    Attributes:
        windows: Windows from one firing to the next.
        scale: What the synthetic gradient of a message is multiplied by.
    """

    windows: int
    scale: float = 1.0


@dataclass(frozen=True)
class Carry:
    """One tensor of a state: where it enters the graph and where it leaves.

    Attributes:
        cut: Index of its cut in time.
        input: Name of the placeholder.
        value: Name of the node that makes the next one.
        dim: The dimension that counts examples.
    """

    cut: int
    input: str
    value: str
    dim: int


@dataclass(frozen=True)
class Recurrence:
    """The boundary of a cut in time: the differentiable tensors of a state that one partition leaves to the next window.

    Attributes:
        name: The name users know it by: the state's path.
        cut: What was asked for.
        producer: Index of the partition that makes the next state.
        consumers: Indices of the partitions that take the state, in order.
        carries: Its tensors.
        specs: Their specs as estimators see them, batch dimension first.
        interface: What stands there.
        head: What predicts the next synthetic gradient, for the auxiliary task.
    """

    name: str
    cut: Recurrent
    producer: int
    consumers: tuple[int, ...]
    carries: tuple[Carry, ...]
    specs: tuple[TensorSpec, ...]
    interface: Interface | None = None
    head: nn.Module | None = None

    @property
    def key(self) -> str:
        """The name as a Python identifier: the key of its estimator in the module and in state dicts."""
        return identifier(self.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the placeholders that take the state."""
        return tuple(carry.input for carry in self.carries)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the nodes that make the next state."""
        return tuple(carry.value for carry in self.carries)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimension of each tensor that counts examples."""
        return tuple(carry.dim for carry in self.carries)


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    SYNTHESISE = "S"
    BACKWARD = "B"
    UPDATE = "U"
    INPUT = "I"
    TARGET = "T"
    FIT = "M"


@dataclass(frozen=True)
class Action:
    """One step of a schedule, written ``F1``, ``B1@cuda:0`` or ``F1@cuda:0/2`` (device, stream).

    ``F`` forward, ``B`` backward, ``U`` update and ``I`` synthetic input act on the partition of that index; ``S`` synthesise,
    ``T`` target arrives and ``M`` fit the estimator act on the boundary of that index.
    """

    kind: Kind
    index: int
    device: str | None = None
    stream: int | None = None

    def __str__(self) -> str:
        place = "" if self.device is None else f"@{self.device}"
        stream = "" if self.stream is None else f"/{self.stream}"
        return f"{self.kind}{self.index}{place}{stream}"


@dataclass(frozen=True)
class Schedule:
    """What one training step runs, in which order and where; ``str`` prints it and ``dnifx.schedules.parse`` reads it back."""

    name: str
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.actions))


BAR = "|"
"""What stands between the windows of a period."""


@dataclass(frozen=True)
class Period:
    """What the windows of a period run, in turn; ``str`` prints it and ``dnifx.schedules.parse_period`` reads it back."""

    name: str
    windows: tuple[Schedule, ...]

    def __str__(self) -> str:
        return f" {BAR} ".join(map(str, self.windows))


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
        homes: The partition index of each node, by node name (partition).
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
    homes: Mapping[str, int] = field(default_factory=dict)
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
