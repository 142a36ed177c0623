"""Where forward may read a value from, and how that value may change: the net follows the model in each."""

import enum
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dnifx


@dataclass
class Config:
    rate: float = 1.0


class Slots:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 1.0


class Behind:
    """Holds its rate behind a property."""

    def __init__(self) -> None:
        self.own = 1.0

    @property
    def rate(self) -> float:
        return self.own

    @rate.setter
    def rate(self, value: float) -> None:
        self.own = value


class AsAttributes(dict[str, Any]):
    """A dictionary whose entries are read as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Frozen(OrderedDict[str, Any]):
    """A dictionary that lets its entries be set once, and refuses every other change."""

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this configuration is frozen")

    update = pop = setdefault = clear = __delitem__ = refuse


class FrozenAfterwards(dict[str, Any]):
    """A dictionary that refuses even what a copy of it would set."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.done = True

    def __setitem__(self, name: str, value: Any) -> None:
        raise RuntimeError("this configuration is frozen")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this configuration is frozen")


class Kind(enum.Enum):
    LOW = 1.0
    HIGH = 3.0


class Schedule:
    """A rate that is asked by a call."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> float:
        return 1.0 + self.step


Pair = namedtuple("Pair", "rate")
Read = Callable[[Any], Any]
Change = Callable[[Any], Any]


def put(name: str, value: Any) -> Change:
    """Return what assigns an attribute of the model."""
    return lambda model: setattr(model, name, value)


def of(value: Callable[[Any], Any]) -> Change:
    """Return what gives the held object another rate."""
    return lambda model: setattr(value(model), "rate", 3.0)


READS: dict[str, tuple[Callable[[], Any], Read, Change]] = {
    "an object in a list": (lambda: [Config()], lambda m: m.held[0].rate, of(lambda m: m.held[0])),
    "an object in a dict": (lambda: {"k": Config()}, lambda m: m.held["k"].rate, of(lambda m: m.held["k"])),
    "an object in a tuple": (lambda: (Config(),), lambda m: m.held[0].rate, of(lambda m: m.held[0])),
    "another object": (Config, lambda m: m.held.rate, put("held", Config(3.0))),
    "slots": (Slots, lambda m: m.held.rate, of(lambda m: m.held)),
    "a property": (Behind, lambda m: m.held.rate, of(lambda m: m.held)),
    "a namespace": (lambda: SimpleNamespace(rate=1.0), lambda m: m.held.rate, of(lambda m: m.held)),
    "a namespace in a namespace": (
        lambda: SimpleNamespace(inner=SimpleNamespace(rate=1.0)),
        lambda m: m.held.inner.rate,
        of(lambda m: m.held.inner),
    ),
    "a dict with attributes": (
        lambda: AsAttributes(rate=1.0),
        lambda m: m.held.rate,
        lambda m: m.held.update(rate=3.0),
    ),
    "a frozen dict": (lambda: Frozen(rate=1.0), lambda m: m.held["rate"], put("held", Frozen(rate=3.0))),
    "a frozen dict in which something changes": (
        lambda: FrozenAfterwards(rates=[1.0]),
        lambda m: m.held["rates"][0],
        lambda m: m.held["rates"].insert(0, 3.0),
    ),
    "a nested dict": (
        lambda: {"a": {"b": [1.0]}},
        lambda m: m.held["a"]["b"][0],
        lambda m: m.held["a"]["b"].insert(0, 3),
    ),
    "an entry of an array": (lambda: np.ones(1), lambda m: float(m.held[0]), lambda m: m.held.fill(3.0)),
    "a number of NumPy": (lambda: np.float64(1.0), lambda m: m.held, put("held", np.float64(3.0))),
    "a function": (lambda: abs, lambda m: m.held(-2.0), put("held", float)),
    "a method put on the model": (int, lambda m: m.rate() if hasattr(m, "rate") else 1.0, put("rate", lambda: 3.0)),
    "an object that is called": (Schedule, lambda m: m.held(), lambda m: setattr(m.held, "step", 3)),
    "a value that is not there": (int, lambda m: getattr(m, "rate", 1.0), put("rate", 3.0)),
    "a dict with a default": (lambda: defaultdict(float), lambda m: m.held["k"] + 1, lambda m: m.held.update(k=3.0)),
    "a named tuple": (lambda: Pair(1.0), lambda m: m.held.rate, put("held", Pair(3.0))),
    "an enum": (lambda: Kind.LOW, lambda m: m.held.value, put("held", Kind.HIGH)),
    "a set": (lambda: {1.0}, lambda m: sum(m.held), lambda m: m.held.add(2.0)),
    "bytes": (lambda: b"a", lambda m: m.held[0], put("held", b"z")),
    "the attributes as a dict": (lambda: 1.0, lambda m: m.__dict__["held"], put("held", 3.0)),
    "the attributes by vars": (lambda: 1.0, lambda m: vars(m)["held"], put("held", 3.0)),
    "what needs a gradient": (
        int,
        lambda m: 2.0 if m.first.weight.requires_grad else 1.0,
        lambda m: m.first.weight.requires_grad_(False),
    ),
}


@pytest.mark.filterwarnings("ignore:.*captured anew")
@pytest.mark.parametrize("name", READS)
def test_a_net_follows_what_forward_reads(name: str) -> None:
    make, read, change = READS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.held = make()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(x)) * read(self))
            return out

    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 4)
    net = dnifx.decouple(model, ["first"], args=(x,))
    assert net.program.capture is not None
    assert net.program.capture.method == "record"
    before = net(x)
    change(model)
    assert torch.equal(net(x), model(x))
    assert not torch.equal(before, model(x))


def test_what_forward_does_not_read_may_change() -> None:
    class Settings:
        def __init__(self) -> None:
            self.rate, self.unread, self.count = torch.tensor(2.0), torch.ones(3), 0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.settings = nn.Linear(4, 4), nn.Linear(4, 2), Settings()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(x)) * self.settings.rate)
            return out

    model, x = Model(), torch.randn(5, 4)
    net = dnifx.decouple(model, ["first"], args=(x,))
    model.settings.unread, model.settings.count = torch.ones(7), 1
    assert torch.equal(net(x), model(x))
    assert len(net.input_kinds) == 1, "the graph of the example still holds"


def test_what_forward_only_adds_to_may_grow() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.calls: list[str] = []
            self.latest: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            self.calls.append("one more")
            self.latest["hidden"] = h.detach()
            out: Tensor = self.last(h)
            return out

    model = Model()
    net = dnifx.decouple(model, ["first"], args=(torch.randn(5, 4),))
    for number in range(1, 4):
        x = torch.randn(5, 4)
        net(x)
        assert len(model.calls) == number
        assert torch.equal(model.latest["hidden"], torch.relu(model.first(x)))
    assert len(net.input_kinds) == 1


def test_a_graph_that_does_not_hold_leaves_no_trace_in_attributes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.calls: list[str] = []
            self.total, self.count = torch.zeros(()), 0

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            self.calls.append("one more")
            self.total, self.count = self.total + 1, self.count + 1
            if bool(x.sum() > 0):
                h = h * 2
            out: Tensor = self.last(h)
            return out

    model, x = Model(), torch.ones(3, 4)
    net = dnifx.decouple(model, ["first"], args=(x,))
    for number, inputs in enumerate((x, -x, x, -x), 1):
        net(inputs)
        assert (len(model.calls), int(model.total), model.count) == (number,) * 3
    assert len(net.input_kinds) == 2
