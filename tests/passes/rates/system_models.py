"""Random systems of two rates, and the gradients that they have to have, by plain autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.ir import Interface
from dnifx.runtime.net.net import Net

WIDTH = 4


class Fast(nn.Module):
    """Reads a window step by step, answers and sends one or two messages after it; its state is a cell's, or none."""

    def __init__(self, kind: str, ticks: int, messages: int) -> None:
        super().__init__()
        self.ticks, self.count = ticks, messages
        self.lift = nn.Linear(3, WIDTH)
        self.cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](WIDTH, WIDTH) if kind != "none" else None
        self.readout = nn.Linear(WIDTH, 2)
        self.speech = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(messages))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        answers: list[Tensor] = []
        messages: list[list[Tensor]] = [[] for _ in range(self.count)]
        for window in torch.split(x, self.ticks):
            hidden = torch.zeros_like(window[0, :, :1]) + torch.zeros(WIDTH, dtype=x.dtype)
            for step in torch.tanh(self.lift(window)).unbind(0):
                state = self.cell(step, state) if self.cell is not None else None
                hidden = hidden + step if state is None else state[0] if isinstance(state, tuple) else state
            answers.append(self.readout(hidden))
            for said, speak in zip(messages, self.speech, strict=True):
                said.append(torch.tanh(speak(hidden)))
        return torch.stack(answers), tuple(map(torch.stack, messages)), state


class Slow(nn.Module):
    """Hears messages one by one; its state is a cell's, or none."""

    def __init__(self, kind: str, messages: int) -> None:
        super().__init__()
        self.lift = nn.Linear(5 * messages, WIDTH)
        self.cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](WIDTH, WIDTH) if kind != "none" else None
        self.readout = nn.Linear(WIDTH, 3)

    def forward(self, messages: tuple[Tensor, ...], state: Any = None) -> tuple[Tensor, Any]:
        heard = torch.tanh(self.lift(torch.cat(messages, -1)))
        hidden = heard.sum(0)
        if self.cell is not None:
            for message in heard.unbind(0):
                state = self.cell(message, state)
                hidden = state[0] if isinstance(state, tuple) else state
        return self.readout(hidden), state


class Both(nn.Module):
    """A system: its output is a dict of what there is."""

    def __init__(self, fast: Fast, slow: Slow) -> None:
        super().__init__()
        self.fast, self.slow = fast, slow

    def forward(self, x: Tensor, fast_state: Any = None, slow_state: Any = None) -> dict[str, Any]:
        answers, messages, fast_state = self.fast(x, fast_state)
        verdict, slow_state = self.slow(messages, slow_state)
        return {"answers": answers, "verdict": verdict, "fast": fast_state, "slow": slow_state}


@dataclass(frozen=True)
class SystemCase:
    """A system, its data of several periods, and how it is decoupled.

    Attributes:
        model: The system, in double precision.
        ticks: Steps of a window.
        every: Windows of a period.
        batch: Examples.
        kinds: Of the fast and of the slow cell: ``gru``, ``lstm`` or ``none``.
        own_loss: Whether the fast part has a loss of its own.
        mean: Whether losses average over examples.
        inner: Further cuts, inside the parts.
    """

    model: Both
    ticks: int
    every: int
    batch: int
    kinds: tuple[str, str]
    own_loss: bool
    mean: bool
    inner: tuple[str, ...] = ()

    @property
    def states(self) -> dict[str, Any]:
        """Zero states of the cells that there are, by argument."""
        zero = torch.zeros(self.batch, WIDTH, dtype=torch.double)
        of = {"gru": lambda: zero.clone(), "lstm": lambda: (zero.clone(), zero.clone())}
        names = zip(("fast_state", "slow_state"), self.kinds, strict=True)
        return {name: of[kind]() for name, kind in names if kind != "none"}

    def decouple(self, gradient: Any = "synthetic", scale: float = 1.0, **options: Any) -> dnifx.DecoupledModule:
        """Decouple with every state cut in time."""
        x = torch.randn(self.ticks, self.batch, 3, dtype=torch.double)
        ends = {"fast_state": "fast", "slow_state": "slow"}
        times = [dnifx.Recurrent(name, ends[name], scale=1.0) for name in self.states]
        losses = {"fast": self.loss, "slow": self.loss} if self.own_loss else {"slow": self.loss}
        every = {"slow": dnifx.Every(self.every, scale)}
        return dnifx.decouple(
            self.model,
            ["fast", *self.inner, *times],
            every=every,
            args=(x,),
            kwargs=self.states,
            gradient=gradient,
            loss=losses,
            reduction="mean" if self.mean else "sum",
            verify=False,
            **options,
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, summed over all but the examples."""
        total = ((output - target) ** 2).sum()
        return total / self.batch if self.mean else total

    def period(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of a period, the answers of its windows, and the verdict."""
        draws = torch.Generator().manual_seed(seed)
        shapes = (self.every * self.ticks, self.batch, 3), (self.every, self.batch, 2), (self.batch, 3)
        x, answers, verdict = (torch.randn(shape, dtype=torch.double, generator=draws) for shape in shapes)
        return x, answers, verdict

    def window(self, x: Tensor, number: int) -> Tensor:
        """Return the inputs of one window of a period."""
        return x[number * self.ticks : (number + 1) * self.ticks]

    def step(self, trainer: dnifx.Trainer, seed: int, number: int, **options: Any) -> dnifx.StepResult:
        """Train on one window of a period."""
        x, answers, verdict = self.period(seed)
        target = {"fast": answers[number : number + 1]} if self.own_loss else {}
        if number == self.every - 1:
            target["slow"] = verdict
        return trainer.step(self.window(x, number), target=target, **options)


def message_interfaces(net: Net) -> list[Interface]:
    """Return what stands on the messages of a net, in order."""
    return [net.program.interfaces[each.boundary.index] for each in net.program.messages]


@dataclass(frozen=True)
class Joint:
    """What plain autograd gives for one period.

    Attributes:
        gradients: Of every parameter, by name.
        messages: By window, the messages, detached.
        arrived: By window, the gradient of the slow loss at each message.
        ended: By window, the tensors of the fast state that it leaves, detached.
        later: By window, the gradient that later windows and the slow part's later hearing send to each.
        states: The states that the period leaves, detached.
    """

    gradients: dict[str, Tensor]
    messages: list[list[Tensor]]
    arrived: list[list[Tensor]]
    ended: list[list[Tensor]]
    later: list[list[Tensor]]
    states: dict[str, Any]


def joint(case: SystemCase, seed: int, states: dict[str, Any], cut_messages: bool, cut_time: bool) -> Joint:
    """Backpropagate through a whole period at once, from detached states.

    Args:
        case: The system.
        seed: Of the period's data.
        states: The states that it starts from.
        cut_messages: Detach every message.
        cut_time: Detach the fast state between windows.
    """
    x, answers, verdict = case.period(seed)
    fast = detached(states.get("fast_state"))
    said, ends, total = [], [], torch.zeros((), dtype=torch.double)
    for number in range(case.every):
        answer, messages, fast = case.model.fast(case.window(x, number), fast)
        total = total + (case.loss(answer, answers[number : number + 1]) if case.own_loss else 0)
        said.append([message.detach().requires_grad_() if cut_messages else message for message in messages])
        fast = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if cut_time else t * 1.0, fast)
        ends.append([leaf for leaf in pytree.tree_leaves(fast) if leaf is not None])
    slow = detached(states.get("slow_state"))
    heard, slow = case.model.slow(tuple(torch.cat(list(each)) for each in zip(*said, strict=True)), slow)
    total = total + case.loss(heard, verdict)
    names = dict(case.model.named_parameters())
    flat = [leaf for each in (*said, *ends) for leaf in each]
    found = torch.autograd.grad(total, [*names.values(), *flat], allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip([*names.values(), *flat], found, strict=True)
    ]
    rest = iter(filled[len(names) :])
    return Joint(
        dict(zip(names, filled, strict=False)),
        [[message.detach() for message in each] for each in said],
        [[next(rest) for _ in each] for each in said],
        [[leaf.detach() for leaf in each] for each in ends],
        [[next(rest) for _ in each] for each in ends],
        {name: detached(state) for name, state in (("fast_state", fast), ("slow_state", slow)) if state is not None},
    )


def detached(state: Any) -> Any:
    """Detach the tensors of a state, if there is one."""
    return pytree.tree_map_only(Tensor, Tensor.detach, state)


@st.composite
def system_cases(draw: st.DrawFn, inner: bool = True, own_loss: bool | None = None) -> SystemCase:
    """Draw a system."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    kinds = draw(st.sampled_from(["gru", "lstm", "none"])), draw(st.sampled_from(["gru", "lstm", "none"]))
    ticks, messages = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    model = Both(Fast(kinds[0], ticks, messages), Slow(kinds[1], messages)).double()
    every, batch = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    cuts = draw(st.sampled_from([(), ("slow.lift",), ("fast.lift",)])) if inner else ()
    own = draw(st.booleans()) if own_loss is None else own_loss
    return SystemCase(model, ticks, every, batch, kinds, own, draw(st.booleans()), cuts)


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference between tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
