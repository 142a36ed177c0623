"""After a run the model is as it was: whatever it holds, wherever it holds it, and the objects are the same ones."""

import random
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.passes.capture.record.state import Snapshot, preserved


def picture(item: Any, identities: bool = True, seen: frozenset[int] = frozenset()) -> Any:
    """Describe all that an object holds by plain values, and by the identities of the objects."""
    if id(item) in seen:
        return "seen", identities and id(item)
    seen |= {id(item)}
    look = partial(picture, identities=identities, seen=seen)
    found: list[Any] = [type(item), identities and id(item)]
    if item is None or isinstance(item, bool | int | float | str | bytes | type):
        return type(item), item
    if isinstance(item, Tensor):
        hooks = [look(getattr(item, name)) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        return *found, item.tolist(), item.requires_grad, look(item.grad), hooks, look(vars(item))
    if isinstance(item, np.ndarray | bytearray):
        return *found, bytes(item)
    if isinstance(item, random.Random):
        return *found, item.getstate()
    if isinstance(item, torch.Generator):
        return *found, item.get_state().tolist()
    if isinstance(item, np.random.Generator):
        return *found, str(item.bit_generator.state)
    if isinstance(item, FunctionType):
        return *found, [look(cell) for cell in item.__closure__ or ()]
    if isinstance(item, MethodType):
        return *found, look(item.__self__)
    if isinstance(item, CellType):
        return *found, look(item.cell_contents)
    if isinstance(item, partial):
        return *found, look(item.args), look(item.keywords)
    if isinstance(item, dict):
        found += [(key, look(value)) for key, value in item.items()]
    elif isinstance(item, set | frozenset):
        found += sorted(map(str, item))
    elif isinstance(item, list | tuple | deque):
        found += map(look, item)
    found += [(name, look(value)) for name, value in sorted(getattr(item, "__dict__", {}).items())]
    found += [(name, look(getattr(item, name))) for name in getattr(item, "__slots__", ()) if hasattr(item, name)]
    return tuple(found)


class Config:
    """A plain object."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@dataclass(frozen=True)
class Frozen:
    """An object whose attributes only ``object.__setattr__`` exchanges."""

    entries: list[Any] = field(default_factory=list)


class Slots:
    """An object without a ``__dict__``."""

    __slots__ = ("filled", "unset")

    def __init__(self) -> None:
        self.filled = 1


class Recent(OrderedDict[str, Any]):
    """A dict that moves what is read to its end."""

    def __getitem__(self, key: str) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)


class Noisy(list[Any]):
    """A list whose own methods do something else."""

    def append(self, value: Any) -> None:
        super().append(("noise", value))

    def extend(self, values: Any) -> None:
        raise AssertionError

    def clear(self) -> None:
        raise AssertionError


def in_slots(held: Slots) -> None:
    held.unset = 2  # type: ignore[attr-defined]
    del held.filled


def in_tuple(held: Any) -> None:
    held[0].append(1)
    held[1]["b"] = 1


def in_memory(held: Any) -> None:
    held["later"] = held["first"]
    held.move_to_end("first")
    held.pop("second")


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "dict": (lambda: {"a": 1}, lambda held: held.update(b=2)),
    "dict_reordered": (lambda: {"a": 1, "b": 2}, lambda held: held.update(a=held.pop("a"))),
    "list": (lambda: [1], lambda held: held.append(2)),
    "list_of_lists": (lambda: [[1], [2]], lambda held: held[1].append(2)),
    "list_exchanged": (lambda: [1, 2], lambda held: held.reverse()),
    "set": (lambda: {1}, lambda held: held.add(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "defaultdict": (lambda: defaultdict(list), lambda held: held["a"].append(1)),
    "ordered": (lambda: OrderedDict(first=1, second=[2]), in_memory),
    "ordered_of_a_subclass": (lambda: Recent(a=1, b=2), lambda held: held["a"]),
    "counter": (lambda: Counter("aab"), lambda held: held.update("b")),
    "list_of_a_subclass": (lambda: Noisy([1]), lambda held: held.append(2)),
    "user_dict": (lambda: UserDict(a=1), lambda held: held.update(b=2)),
    "user_list": (lambda: UserList([1]), lambda held: held.append(2)),
    "bytearray": (lambda: bytearray(b"ab"), lambda held: held.extend(b"c")),
    "array": (lambda: np.zeros(3), lambda held: held.fill(1)),
    "tuple": (lambda: ([0], {"a": 1}), in_tuple),
    "config": (lambda: Config(rate=1.0), lambda held: setattr(held, "rate", 2.0)),
    "config_in_config": (lambda: Config(inner=Config(seen=[])), lambda held: held.inner.seen.append(1)),
    "config_loses": (lambda: Config(rate=1.0), lambda held: delattr(held, "rate")),
    "config_gains": (lambda: Config(rate=1.0), lambda held: setattr(held, "more", 2.0)),
    "namespace": (lambda: SimpleNamespace(step=0), lambda held: setattr(held, "step", 1)),
    "frozen": (Frozen, lambda held: held.entries.append(1)),
    "slots": (Slots, in_slots),
    "partial": (lambda: partial(print, [1]), lambda held: held.args[0].append(1)),
    "method": (lambda: [1].append, lambda held: None),
    "python_draws": (lambda: random.Random(1), lambda held: held.random()),
    "numpy_draws": (lambda: np.random.default_rng(1), lambda held: held.random()),
    "torch_draws": (torch.Generator, lambda held: torch.rand(2, generator=held)),
    "tensor": (lambda: torch.zeros(2), lambda held: held.add_(1)),
    "tensor_by_a_view": (lambda: torch.zeros(2, 2), lambda held: held[1].mul_(0).add_(3)),
    "tensor_in_a_list": (lambda: [torch.zeros(2)], lambda held: held[0].add_(1)),
    "tensor_in_a_config": (lambda: Config(mean=torch.zeros(2)), lambda held: held.mean.add_(1)),
    "tensor_expanded": (lambda: torch.zeros(1).expand(3), lambda held: held[:1].add_(1)),
    "tensor_learns": (lambda: torch.zeros(2), lambda held: held.add_(torch.ones(2, requires_grad=True))),
    "tensor_wants_gradient": (lambda: torch.zeros(2), lambda held: held.requires_grad_()),
    "tensor_of_other_memory": (lambda: torch.zeros(2), lambda held: setattr(held, "data", torch.ones(2))),
    "tensor_resized": (lambda: torch.zeros(2), lambda held: held.resize_(5).fill_(1)),
    "tensor_marked": (lambda: torch.zeros(2), lambda held: setattr(held, "original", 1)),
    "module_in_a_list": (lambda: [nn.BatchNorm1d(2)], lambda held: held[0](torch.randn(4, 2))),
    "parameter_in_a_dict": (lambda: {"w": nn.Parameter(torch.ones(2))}, lambda held: held["w"].data.add_(1)),
}
LEFT_OUT = {"torch_draws", "method", "module_in_a_list", "parameter_in_a_dict", "dict_reordered"}
"""What ``changes`` does not report: torch's own, and the order in a dict that has none."""


class Model(nn.Module):
    """Two linear layers; the inner one holds something."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.inner[0].held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_a_module_holds_is_put_back_in_place_and_named(kind: str) -> None:
    make, change = HOLDERS[kind]
    model: Any = Model(make())
    before = picture(model)
    snapshot = Snapshot(model)
    for _ in range(2):
        assert snapshot.changes() == {}
        with snapshot.watching():
            change(model.inner[0].held)
        found = snapshot.changes()
        if kind not in LEFT_OUT | {"tensor_wants_gradient", "tensor_of_other_memory", "tensor_marked"}:
            assert [(module, name) for module, name in found] == [(model.inner[0], "held")]
            assert next(iter(found.values())).startswith("inner.0.held")
        snapshot.restore()
        assert picture(model) == before


VALUES = st.one_of(st.none(), st.integers(0, 3), st.sampled_from(["a", "b"]), st.builds(torch.zeros, st.just(2)))


def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw containers and objects that hold parts."""
    lists = st.lists(parts, max_size=3)
    dicts = st.dictionaries(st.sampled_from("xyz"), parts, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(deque),
        dicts,
        dicts.map(OrderedDict),
        dicts.map(lambda held: defaultdict(list, held)),
        dicts.map(lambda held: Config(**held)),
        dicts.map(lambda held: SimpleNamespace(**held)),
    )


HELD = st.recursive(VALUES, containers, max_leaves=8)


def mutable_parts(item: Any) -> Iterator[Any]:
    """Yield every part of a drawn value that can be changed."""
    if isinstance(item, list | deque | dict | Config | SimpleNamespace | Tensor):
        yield item
    if isinstance(item, Config | SimpleNamespace):
        item = vars(item)
    if isinstance(item, dict | list | deque | tuple):
        for part in [*item.values()] if isinstance(item, dict) else [*item]:
            yield from mutable_parts(part)


def disturb(item: Any, value: Any, clears: bool) -> None:
    """Change one object."""
    if isinstance(item, Tensor):
        item.add_(1)
    elif isinstance(item, list | deque):
        item.clear() if clears else item.append(value)
    else:
        held = item if isinstance(item, dict) else vars(item)
        held.clear() if clears else held.update(x=value)


@given(st.data())
def test_any_change_of_what_a_model_holds_is_undone_and_noticed(data: st.DataObject) -> None:
    model: Any = Model(data.draw(HELD))
    model.held = data.draw(HELD)
    model.first.shared = model.inner[0].held
    before, values = picture(model), picture(model, identities=False)
    with preserved(model) as snapshot, snapshot.watching():
        for _ in range(data.draw(st.integers(0, 3))):
            targets = [model, *mutable_parts(model.held), *mutable_parts(model.inner[0].held)]
            target = data.draw(st.sampled_from(targets))
            if target is model:
                model.held = data.draw(HELD)
            else:
                disturb(target, data.draw(HELD), data.draw(st.booleans()))
        assert bool(snapshot.changes()) == (picture(model, identities=False) != values)
    assert picture(model) == before


class Collects:
    """A hook that is an object and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, *rest: Any) -> None:
        self.calls += 1
        self.seen.append(rest[-1])


def counting() -> Callable[..., None]:
    """Return a hook that counts in a variable that it encloses."""
    calls = 0

    def hook(module: nn.Module, *rest: Any) -> None:
        nonlocal calls
        calls += 1

    return hook


REGISTER = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.parametrize("has_one", [False, True])
@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("hook", [Collects, counting])
def test_hooks_are_put_back_with_what_they_keep(register: str, hook: Callable[[], Any], has_one: bool) -> None:
    model: Any = Model(None)
    if has_one:
        getattr(model.first, register)(hook())
    before = picture(model)
    with preserved(model) as snapshot:
        assert snapshot.new_hooks() == []
        getattr(model.first, register)(hook())
        getattr(model, register)(hook())
        assert snapshot.new_hooks() == ["", "first"]
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert picture(model) == before


def test_hooks_gradients_and_marks_of_parameters_are_put_back() -> None:
    model, x = Model(None), torch.ones(1, 2)
    model(x).sum().backward()
    model.first.weight.register_hook(lambda gradient: gradient * 2)
    model.first.bias.requires_grad_(False)
    before = picture(model)
    with preserved(model) as snapshot, snapshot.watching():
        for parameter in model.parameters():
            parameter.requires_grad_()
            parameter.register_hook(lambda gradient: gradient * 3)
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)
            parameter.original = 1  # type: ignore[attr-defined]
        model(x).sum().backward()
        model.inner[0].weight.data = torch.ones(3, 3)
        model.inner[0].bias.grad = None
    assert picture(model) == before


class Tallies(nn.Module):
    """Keeps state on its class."""

    calls = 0
    cache: dict[str, int] = {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        type(self).more = 1  # type: ignore[attr-defined]
        self.cache[str(len(self.cache))] = 1
        return x


def test_classes_of_modules_are_put_back() -> None:
    model = nn.Sequential(Tallies())
    cache = Tallies.cache
    with preserved(model) as snapshot:
        model(torch.ones(1))
        found = snapshot.changes()
        assert sorted(found.values()) == ["0.cache", "0.calls", "0.more"]
        assert {module for module, _ in found} == {model[0]}
    assert (Tallies.calls, Tallies.cache, hasattr(Tallies, "more")) == (0, {}, False)
    assert Tallies.cache is cache


def test_submodules_parameters_and_buffers_are_put_back_in_their_order() -> None:
    model: Any = Model(None)
    model.register_buffer("mean", torch.zeros(2), persistent=False)
    before, mean = picture(model), model.mean
    with preserved(model), torch.no_grad():
        model.first = nn.Linear(2, 3)
        model.later = nn.Linear(2, 2)
        del model.inner
        model.mean.add_(1)
        model.register_buffer("mean", torch.ones(2))
        model.train(False)
    assert picture(model) == before
    assert model.mean is mean
    assert list(model.state_dict()) == ["first.weight", "first.bias", "inner.0.weight", "inner.0.bias"]


def test_buffers_that_got_a_graph_are_without_one_again() -> None:
    model: Any = Model(None)
    model.register_buffer("mean", torch.zeros(2))
    with preserved(model):
        model.mean.mul_(0.9).add_(model.first(torch.ones(1, 2)).mean(0))
        assert model.mean.requires_grad
    assert not model.mean.requires_grad
    assert model.mean.tolist() == [0, 0]


def test_changes_are_named_once_by_their_dotted_names() -> None:
    config: Any = Config(temperature=1.0, parts=[Config(rate=1)], name="a")
    model: Any = nn.ModuleDict({"a": Model(config), "b": Model(config)})
    snapshot = Snapshot(model)
    config.temperature, config.name = 2.0, "b"
    model["a"].count, model["b"].first.in_features = 1, 2
    texts = snapshot.changes()
    assert texts[model["a"], "count"] == "a.count"
    del model["b"].first.in_features
    del texts[model["a"], "count"]
    assert sorted(texts.values()) in [
        [f"{one}.inner.0.held.name, {one}.inner.0.held.temperature"] for one in ("a", "b")
    ]


def test_equal_values_are_no_changes() -> None:
    model: Any = Model({"a": [1.5, float("nan")], "c": Config(values=np.ones(2))})
    model.step, model.device = 1000, torch.device("cpu")
    snapshot = Snapshot(model)
    model.inner[0].held = {"a": [1.5, float("nan")], "c": Config(values=np.ones(2))}
    model.step, model.device = int("1000"), torch.device("cpu")
    model.eval()
    model.first.weight.data.add_(1)
    assert snapshot.changes() == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_and_sparse_parts_are_left_alone() -> None:
    model: Any = Model(None)
    model.scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model.register_buffer("table", torch.eye(2).to_sparse())
    mean = model.scripted[1].running_mean
    with preserved(model) as snapshot, snapshot.watching():
        model.scripted(torch.randn(4, 2))
        model.table.mul_(2)
        assert snapshot.changes() == {}
    assert mean.tolist() == [0, 0]
    assert torch.equal(model.table.to_dense(), torch.eye(2))


FORWARDS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "deque": (deque, lambda model: model.held.append(1)),
    "ordered": (OrderedDict, lambda model: model.held.update({len(model.held): 1})),
    "nested": (lambda: {"seen": [[]]}, lambda model: model.held["seen"][0].append(1)),
    "config": (lambda: Config(calls=0), lambda model: setattr(model.held, "calls", model.held.calls + 1)),
    "tensor": (lambda: torch.zeros(2), lambda model: model.held.add_(1)),
    "hooks": (list, lambda model: model.first.register_forward_hook(lambda module, given, out: out * 1)),
    "tensor_hooks": (list, lambda model: model.first.weight.register_hook(lambda gradient: gradient)),
    "new_module": (list, lambda model: setattr(model, "later", nn.Linear(2, 2))),
    "replaced": (lambda: [0], lambda model: setattr(model, "held", [*model.held, 1])),
}


class Disturbed(Model):
    """Changes something in every forward."""

    def __init__(self, kind: str) -> None:
        super().__init__(None)
        make, self.change = FORWARDS[kind]
        self.held = make()

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return super().forward(x)


@pytest.mark.parametrize("kind", FORWARDS)
def test_decouple_leaves_the_model_as_it_was(kind: str) -> None:
    model, x = Disturbed(kind), torch.randn(4, 2)
    before = picture(model)
    with suppress(dnifx.DnifxError):
        dnifx.decouple(model, ["first"], args=(x,), gradient="oracle")
    assert picture(model) == before
