"""Blocks that keep something in attributes from call to call, and models of such blocks."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dnifx.passes.capture.record.changes import OWN

WIDTH = 4


class Config:
    """An object that modules hold."""

    def __init__(self) -> None:
        self.calls, self.temperature, self.unread = 0, 2.0, 1.0


class Block(nn.Module):
    """A layer, and what a child class keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.begin()

    def begin(self) -> None:
        """Set the attributes."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer and what the child class adds."""
        return self.add(torch.tanh(self.inner(x)))

    def add(self, h: Tensor) -> Tensor:
        """Return the block's output."""
        raise NotImplementedError


class Lstm(Block):
    """The state of an LSTM, None at first."""

    def begin(self) -> None:
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.hidden: Any = None

    def add(self, h: Tensor) -> Tensor:
        if self.hidden is not None and self.hidden[0].shape[1] != len(h):
            self.hidden = None
        out, state = self.rnn(h.unsqueeze(1), self.hidden)
        self.hidden = tuple(each.detach() for each in state)
        return out.squeeze(1)  # type: ignore[no-any-return]


class Attached(Block):
    """A state that is left with a graph, and detached where it is read."""

    def begin(self) -> None:
        self.state: Any = None

    def add(self, h: Tensor) -> Tensor:
        fits = self.state is not None and self.state.shape == h.shape
        self.state = h + 0.5 * self.state.detach() if fits else h
        return self.state  # type: ignore[no-any-return]


class Spikes(Block):
    """A membrane that decays, and fires."""

    def begin(self) -> None:
        self.membrane, self.decay = torch.zeros(WIDTH), 0.5

    def add(self, h: Tensor) -> Tensor:
        self.membrane = self.decay * self.membrane.detach() + h.mean(0)
        spike = torch.sigmoid(self.membrane + h)
        self.membrane = self.membrane - 0.1 * spike.detach().mean(0)
        return spike


class Averages(Block):
    """A running mean that is assigned, in a dictionary beside a number of calls."""

    def begin(self) -> None:
        self.mean, self.calls = {"mean": torch.zeros(WIDTH), "square": torch.ones(WIDTH)}, 0

    def add(self, h: Tensor) -> Tensor:
        self.calls += 1
        mean = 0.9 * self.mean["mean"] + 0.1 * h.detach().mean(0)
        self.mean = {"mean": mean, "square": self.mean["square"] * 0.9}
        return (h - mean) / (self.calls + 1)


class AveragesInPlace(Block):
    """A running mean that is written in place."""

    def begin(self) -> None:
        self.mean = torch.zeros(WIDTH)

    def add(self, h: Tensor) -> Tensor:
        self.mean.lerp_(h.detach().mean(0), 0.1)
        return h - self.mean


class Bank(Block):
    """A memory with a pointer."""

    def begin(self) -> None:
        self.bank, self.pointer = torch.zeros(6, WIDTH), 0

    def add(self, h: Tensor) -> Tensor:
        out = h + self.bank.mean(0)
        with torch.no_grad():
            self.bank[self.pointer : self.pointer + 3] = h.detach()[:3]
        self.pointer = (self.pointer + 3) % 6
        return out


class Queue(Block):
    """A memory that forgets its oldest rows."""

    def begin(self) -> None:
        self.queue = torch.zeros(0, WIDTH)

    def add(self, h: Tensor) -> Tensor:
        out = h + self.queue.sum(0)
        self.queue = torch.cat([self.queue, h.detach()])[-5:]
        return out


class WarmsUp(Block):
    """A counter that a branch asks."""

    def begin(self) -> None:
        self.step, self.warm = 0, 2

    def add(self, h: Tensor) -> Tensor:
        self.step += 1
        return h * (self.step / self.warm) if self.step <= self.warm else h


class Toggles(Block):
    """A flag that flips."""

    def begin(self) -> None:
        self.flipped = False

    def add(self, h: Tensor) -> Tensor:
        self.flipped = not self.flipped
        return h if self.flipped else -h


class Counts(Block):
    """A number on an object that the module holds."""

    def begin(self) -> None:
        self.config = Config()

    def add(self, h: Tensor) -> Tensor:
        self.config.calls += 1
        return h * self.config.temperature / self.config.calls


class Caches(Block):
    """A mask that is made once for a length."""

    def begin(self) -> None:
        self.mask: Any = None

    def add(self, h: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != h.shape[0]:
            self.mask = torch.tril(torch.ones(h.shape[0], h.shape[0]))
        return self.mask @ h  # type: ignore[no-any-return]


class Fills(Block):
    """A list of all that was seen, which is read."""

    def begin(self) -> None:
        self.past: list[Tensor] = []

    def add(self, h: Tensor) -> Tensor:
        self.past.append(h.detach().mean(0))
        return h + torch.stack(self.past).mean(0)


class Logs(Block):
    """A list, a dictionary of activations and a list of terms, which forward fills and does not read."""

    def begin(self) -> None:
        self.log: list[Any] = [0.0]
        self.seen: dict[str, Any] = {"first": 1}
        self.terms: list[Tensor] = []

    def add(self, h: Tensor) -> Tensor:
        self.log.append(h.detach().sum())
        self.log.extend([len(h), "next"])
        self.seen["h"] = h.detach()
        self.seen.update(sizes=(len(h), 1))
        self.terms.clear()
        self.terms.append(h.detach().mean())
        return h


class Remembers(Block):
    """A deque of the last values, and averages in a dictionary that is changed in place."""

    def begin(self) -> None:
        self.last: deque[Tensor] = deque(maxlen=2)
        self.mean: dict[str, Tensor] = {}

    def add(self, h: Tensor) -> Tensor:
        now = h.detach().mean(0)
        self.mean["mean"] = 0.9 * self.mean["mean"] + 0.1 * now if "mean" in self.mean else now
        self.last.append(now)
        return h + torch.stack(list(self.last)).sum(0) - self.mean["mean"]


class Tallies(Block):
    """Numbers in a dictionary that makes its own."""

    def begin(self) -> None:
        self.calls: defaultdict[str, int] = defaultdict(int)

    def add(self, h: Tensor) -> Tensor:
        self.calls["calls"] += 1
        return h / self.calls["calls"]


class Resets(Block):
    """A child whose state the parent resets in each call."""

    def begin(self) -> None:
        self.child = Attached()

    def add(self, h: Tensor) -> Tensor:
        self.child.state = None
        return self.child(h) + self.child(2 * h)  # type: ignore[no-any-return]


class Draws(nn.Module):
    """Branches on a draw, and counts: it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.inner(x) * self.calls if float(torch.rand(())) < 0.5 else x


KINDS: tuple[type[nn.Module], ...] = (
    *(
        Lstm,
        Attached,
        Spikes,
        Averages,
        AveragesInPlace,
        Bank,
        Queue,
        WarmsUp,
        Toggles,
        Counts,
        Caches,
        Fills,
        Logs,
        Remembers,
        Tallies,
        Resets,
        Draws,
    ),
)


class Stateful(nn.Module):
    """Blocks of several kinds between two layers."""

    def __init__(self, kinds: Sequence[type[nn.Module]]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers and the blocks."""
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = block(h)
        return self.last(h)  # type: ignore[no-any-return]


kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)


def state_of(item: Any) -> Any:
    """Return what a model keeps beside parameters and submodules, as plain containers of numbers and tensors."""
    if isinstance(item, nn.Module):
        own = {name: value for name, value in vars(item).items() if name not in OWN and not name.startswith("_flat")}
        return {
            **{name: state_of(value) for name, value in (own | item._buffers).items()},
            **{name: state_of(child) for name, child in item._modules.items()},
        }
    if isinstance(item, Tensor):
        return item.tolist()
    if isinstance(item, dict):
        return {key: state_of(value) for key, value in item.items()}
    if isinstance(item, list | tuple | set) or type(item).__name__ == "deque":
        return [type(item).__name__, *map(state_of, item)]
    return state_of(vars(item)) if hasattr(item, "__dict__") and not callable(item) else item
