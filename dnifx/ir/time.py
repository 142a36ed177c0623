"""Cuts in time, and rates."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dnifx.ir.cuts import Interface, identifier
from dnifx.ir.values import TensorSpec


@dataclass(frozen=True)
class Recurrent:
    """A cut in time: the edge from the state that a window leaves to the state that the next one takes.

    Attributes:
        state: Where the state is among the model's inputs: ``"state"``, ``"batch.state"``; or, where the model keeps it on itself
            from call to call, its attribute: ``"self.hidden"``, ``"rnn.hidden"``. It is a tensor or a structure.
        next_state: Where the next state, of the same structure, is in the output: ``"1"``. Empty if it is the whole output. An
            attribute holds the next state itself.
        scale: Factor of the synthetic gradient at a window's end. With a factor near 1, a memory cell whose forget gate
            stays open returns an estimate as its own target. Nothing corrects a wrong one, and the cell can run away.
        batch_dim: The dimension of the state's tensors that counts examples. None stands for 1 where an ``nn.RNN``,
            ``nn.GRU`` or ``nn.LSTM`` takes the tensor itself, and for 0 elsewhere.
        into_core: Whether the estimator's own error reaches the core. The trainer computes the last window again for it.
        auxiliary: Whether a head predicts, from the window's start, the synthetic gradient at its end. Its error reaches
            the core in the same way.
        trace: Lambda, from 0 to 1, of an eligibility trace. With it, a trainer fits the estimator to the lambda-return
            over all windows of the episode so far, discounted by ``scale``. None fits it to the target of one window.
    """

    state: str
    next_state: str = ""
    scale: float = 0.1
    batch_dim: int | None = None
    into_core: bool = False
    auxiliary: bool = False
    trace: float | None = None

    @property
    def on_model(self) -> bool:
        """Whether the model keeps the state on itself."""
        return self.state.startswith("self.")

    def __str__(self) -> str:
        return f"~> {self.state}" if self.on_model else f"{self.next_state or 'output'} ~> {self.state}"


@dataclass(frozen=True)
class Every:
    """How often a part fires, for ``every=``.

    Attributes:
        windows: Windows from one firing to the next.
        scale: Factor of the synthetic gradients of the messages that it takes.
    """

    windows: int
    scale: float = 1.0


@dataclass(frozen=True)
class Carry:
    """One tensor of a state: where it enters the graph and where it leaves.

    Attributes:
        cut: Index of its cut in time.
        input: Name of the placeholder that takes it.
        value: Name of the node that makes the next one.
        dim: The dimension that counts examples.
    """

    cut: int
    input: str
    value: str
    dim: int


@dataclass(frozen=True)
class Recurrence:
    """The boundary of a cut in time: the differentiable tensors of a state that a partition leaves to the next window.

    Attributes:
        name: The name that users know it by: the state's path.
        cut: The cut in time.
        producer: Index of the partition that makes the next state.
        consumers: Indices of the partitions that take the state, in order.
        carries: Its tensors.
        specs: Their specs as estimators see them, batch dimension first.
        interface: The estimator on it.
        head: The head that predicts the next synthetic gradient, for the auxiliary task.
        exact: Where the gradient is exact, the rule by which its trace goes through a window; else None.
    """

    name: str
    cut: Recurrent
    producer: int
    consumers: tuple[int, ...]
    carries: tuple[Carry, ...]
    specs: tuple[TensorSpec, ...]
    interface: Interface | None = None
    head: nn.Module | None = None
    exact: Any = None

    @property
    def key(self) -> str:
        """The key of its estimator in the module and in state dicts: the name as a Python identifier."""
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
