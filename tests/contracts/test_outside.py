"""Contracts 12 and 13 for variables outside of the model: what functions read there is followed, what they leave there is kept."""

import copy
import importlib.util
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.passes.capture.record.outside import Naming, namings
from tests.contracts.test_guards import INPUTS, VALUES, weight
from tests.random_models.stateful import WIDTH

SOURCE = """
from types import SimpleNamespace
import torch
from torch import nn
from tests.contracts.test_guards import weight

CONFIG = SimpleNamespace()

class Settings:
    pass

def function(h):
    return h

def make():
    {unset} = None
    def put(name, value):
        nonlocal {names}
        {puts}
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear({width}, {width}) for _ in range(3))
        def forward(self, x):
            h = torch.tanh(self.second(self.first(x)))
            {reads}
            return self.last(h)
    return Reads, put

Reads, put = make()
"""
PLACES = {
    "global": "{name}",
    "object": "CONFIG.{name}",
    "class": "Settings.{name}",
    "function": "function.{name}",
    "closure": "inner_{name}",
}
NUMBERS = itertools.count()


def written(folder: Path, where: dict[str, str], read: list[str]) -> ModuleType:
    """Write and import a Python module whose model reads variables at these places."""
    inner = [f"inner_{name}" for name in VALUES]
    puts = [f"if name == {name!r}: inner_{name} = value" for name in VALUES]
    reads = [f"h = h + 0.1 * weight({PLACES[where[name]].format(name=name)})" for name in read]
    name = f"outside_{next(NUMBERS)}"
    path = folder / f"{name}.py"
    path.write_text(
        SOURCE.format(
            unset=" = ".join(inner),
            names=", ".join(inner),
            puts="\n        ".join(puts),
            reads="\n            ".join(reads),
            width=WIDTH,
        )
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(module: Any, place: str, name: str, value: Any) -> None:
    """Set a variable."""
    if place == "closure":
        module.put(name, value)
    else:
        holders = {"global": module, "object": module.CONFIG, "class": module.Settings, "function": module.function}
        setattr(holders[place], name, value)


@st.composite
def programs(draw: st.DrawFn) -> tuple[dict[str, str], list[str], list[tuple[str, int]]]:
    """Draw where each value is held, which are read, and changes, every other one of a value that is read."""
    names = draw(st.permutations([*VALUES]))
    where = {name: draw(st.sampled_from([*PLACES])) for name in names}
    read = names[: draw(st.integers(2, 6))]
    changed = [draw(st.sampled_from(read if number % 2 == 0 else names)) for number in range(8)]
    return where, read, [(name, draw(st.sampled_from([1, 2, 0]))) for name in changed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outside")


@settings(max_examples=10)
@given(programs(), st.booleans())
def test_a_change_of_a_variable_that_was_read_is_followed_and_no_other_change_costs_anything(
    folder: Path, program: tuple[dict[str, str], list[str], list[tuple[str, int]]], scheduled: bool
) -> None:
    where, read, steps = program
    module: Any = written(folder, where, sorted(read))
    for name, values in VALUES.items():
        put(module, where[name], name, copy.deepcopy(values[0]))
    torch.manual_seed(0)
    model, x = module.Reads(), torch.randn(3, WIDTH)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle", loss=nn.MSELoss())
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0)) if scheduled else None
    run: Callable[[], Any] = (  # noqa: E731
        lambda: trainer.step(x, target=torch.zeros(3, WIDTH)).output if trainer else net(x)
    )
    moved: set[str] = set()
    held = dict.fromkeys(VALUES, 0)
    for name, choice in steps:
        same = VALUES[name][choice] is VALUES[name][held[name]]
        held[name] = choice
        put(module, where[name], name, VALUES[name][choice] if same else copy.deepcopy(VALUES[name][choice]))
        captures = net.whole.captures
        assert torch.equal(run(), model(x))
        if name not in read or (name in ("number", "count", "tensor") and name in moved):
            assert net.whole.captures == captures
        if net.whole.captures > captures and name in INPUTS:
            moved.add(name)


# -- what forward leaves ---------------------------------------------------------------------------------------------

LOG: list[Any] = []
LAST: dict[str, Any] = {}
COUNT = 0
STATE = SimpleNamespace(hidden=torch.zeros(WIDTH), seen=[])
BUFFER = torch.zeros(WIDTH)


class Totals:
    """A class that counts."""

    calls = 0
    latest: Any = None


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x).tanh()
        h = self.leaves(h)
        out: Tensor = self.last(h)
        return out

    def leaves(self, h: Tensor) -> Tensor:
        """Leave something outside of the model."""
        raise NotImplementedError


class Appends(Base):
    def leaves(self, h: Tensor) -> Tensor:
        LOG.append(h.mean())
        return h


class SetsAnEntry(Base):
    def leaves(self, h: Tensor) -> Tensor:
        LAST["h"] = h
        return h


class Counts(Base):
    def leaves(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h * (1 + COUNT * 0.5)


class CountsUnseen(Base):
    """Multiplies in an order in which no symbolic number is asked, so that each number is an input kind."""

    def leaves(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h * (1 + 0.5 * COUNT)


class Carries(Base):
    def leaves(self, h: Tensor) -> Tensor:
        STATE.hidden = (0.5 * STATE.hidden + h.mean(0)).detach()
        STATE.seen.append(h.mean())
        return h + STATE.hidden


class OfClass(Base):
    def leaves(self, h: Tensor) -> Tensor:
        Totals.calls += 1
        Totals.latest = h
        return h * (1 + Totals.calls * 0.5)


def in_a_closure() -> type[Base]:
    """Return a class whose method keeps a state in the function around it."""
    total, seen = torch.zeros(WIDTH), []

    class Encloses(Base):
        def leaves(self, h: Tensor) -> Tensor:
            nonlocal total
            total = (total + h.mean(0)).detach()
            seen.append(h.mean())
            return h + total

        @classmethod
        def state(cls) -> Any:
            """Return what is kept."""
            return total, seen

        @classmethod
        def reset(cls) -> None:
            """Begin anew."""
            nonlocal total
            total = torch.zeros(WIDTH)
            seen.clear()

    return Encloses


class ByDefault(Base):
    def leaves(self, h: Tensor, seen: list[Any] = []) -> Tensor:  # noqa: B006 - what is tested
        seen.append(h.mean())
        return h


class OfFunction(Base):
    def leaves(self, h: Tensor) -> Tensor:
        return scaled(h)


def scaled(h: Tensor) -> Tensor:
    """Scale by a number of calls, which is kept on the function."""
    scaled.calls += 1  # type: ignore[attr-defined]
    return h * (1 + scaled.calls * 0.5)  # type: ignore[attr-defined]


class InPlace(Base):
    def leaves(self, h: Tensor) -> Tensor:
        BUFFER.mul_(0.5).add_(h.detach().mean(0))
        return h + BUFFER


Encloses = in_a_closure()
KINDS = [Appends, SetsAnEntry, Counts, CountsUnseen, Carries, OfClass, Encloses, ByDefault, OfFunction, InPlace]


def state() -> list[Any]:
    """Return all that the kinds leave."""
    defaults: Any = ByDefault.leaves.__defaults__
    calls: int = scaled.calls  # type: ignore[attr-defined]
    enclosed: Any = Encloses
    kept = [[*LOG], dict(LAST), COUNT, STATE.hidden, [*STATE.seen], Totals.calls, Totals.latest]
    return [*kept, enclosed.state(), [*defaults[0]], calls, BUFFER.clone()]


def reset() -> None:
    """Begin anew."""
    global COUNT
    LOG.clear()
    LAST.clear()
    COUNT, STATE.hidden, Totals.calls, Totals.latest = 0, torch.zeros(WIDTH), 0, None
    STATE.seen.clear()
    BUFFER.zero_()
    defaults: Any = ByDefault.leaves.__defaults__
    defaults[0].clear()
    scaled.calls = 0  # type: ignore[attr-defined]
    enclosed: Any = Encloses
    enclosed.reset()


@pytest.fixture(autouse=True)
def begin_anew() -> Iterator[None]:
    reset()
    yield
    reset()


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, with tensors that need gradient in the same places."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other) and one.requires_grad == other.requires_grad
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.filterwarnings("ignore:.*captured anew")
@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_leaves_outside_of_the_model_is_left_and_read_again(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model, batches = kind(), [torch.randn(size, WIDTH) for size in (3, 3, 2, 3)]
    outputs = [model(x) for x in batches]
    wanted = state()
    reset()
    before = state()
    net = dnifx.decouple(model, ["first"], args=(batches[0],), gradient="oracle", loss=nn.MSELoss())
    assert same(state(), before), "decouple leaves no trace"
    assert all(map(torch.equal, map(net, batches), outputs))
    assert same(state(), wanted)
    reset()
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    steps = [trainer.step(x, target=torch.zeros(len(x), WIDTH)).output for x in batches]
    assert all(map(torch.equal, steps, outputs))


@pytest.mark.parametrize("kind", [Counts, Carries, OfClass])
def test_variables_of_python_modules_are_saved_with_a_trainer(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model, batches = kind(), [torch.randn(3, WIDTH) for _ in range(4)]

    def trainer() -> Any:
        torch.manual_seed(1)
        net = dnifx.decouple(copy.deepcopy(model), ["first"], args=(batches[0],), loss=nn.MSELoss())
        return net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def losses(run: Any, given: list[Tensor]) -> list[Tensor]:
        return [run.step(x, target=torch.zeros(3, WIDTH)).loss for x in given]

    whole = losses(trainer(), batches)
    reset()
    first = trainer()
    half = losses(first, batches[:2])
    saved = copy.deepcopy(first.state_dict())
    reset()
    second = trainer()
    second.load_state_dict(saved)
    assert all(map(torch.equal, half + losses(second, batches[2:]), whole))


def test_copies_of_a_net_follow_the_variables_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, WIDTH)
    net = dnifx.decouple(Follows(), ["first"], args=(x,))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        STATE.rate = 1.0
        one = copied(x)
        STATE.rate = 3.0
        assert torch.equal(copied(x), net.original(x))
        assert not torch.equal(copied(x), one)


class Follows(Base):
    def leaves(self, h: Tensor) -> Tensor:
        return h * STATE.rate


STATE.rate = 1.0


def test_variables_are_followed_under_a_tracer_that_takes_its_place_again() -> None:
    calls: list[str] = []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        calls.append(event)
        sys.settrace(tracer)  # as that of coverage does

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        model, x = Appends(), torch.randn(3, WIDTH)
        net = dnifx.decouple(model, ["first"], args=(x,))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert LOG == []
    net(x)
    assert len(LOG) == 1
    assert calls


# -- how code names variables ----------------------------------------------------------------------------------------


def names_of(function: Any) -> set[tuple[str, ...]]:
    """Return the names that a function's code uses."""
    assert isinstance(function, FunctionType)
    return {each.names for each in namings(function.__code__)}


def test_code_says_which_variables_it_names() -> None:
    total = 0

    def uses() -> Any:
        nonlocal total
        total += 1
        STATE.rate = COUNT
        Totals.calls += weight(LOG)
        return [STATE.hidden for _ in LOG]

    found = namings(uses.__code__)
    assert Naming(("total",), enclosed=True, stored=True) in found
    assert Naming(("STATE", "rate"), enclosed=False, stored=True) in found
    assert {("COUNT",), ("LOG",), ("weight",)} <= names_of(uses)


RATE, CALLS = 1.0, 0


def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Scale what a module gives, and count."""
    global CALLS
    CALLS += 1
    return output * RATE


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Measure how far two values are apart, and count."""
    global CALLS
    CALLS += 1
    return RATE * (one - other).abs().sum(-1)


class Hooked(nn.Module):
    """A module of torch with a hook of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class Given(nn.Module):
    """A module of torch that was given a function of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.far = nn.TripletMarginWithDistanceLoss(distance_function=distance, margin=5.0, reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.far(h, h * 0.5, h * 2)
        return out


@pytest.mark.parametrize("make", [Hooked, Given])
def test_what_functions_inside_modules_of_torch_read_is_followed_and_what_they_write_is_put_back(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, WIDTH)
    monkeypatch.setattr(sys.modules[__name__], "CALLS", 0)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="zero")
    assert CALLS == 0
    before = net(x)
    monkeypatch.setattr(sys.modules[__name__], "RATE", 3.0)
    assert torch.equal(net(x), model(x))
    assert not torch.equal(net(x), before)
