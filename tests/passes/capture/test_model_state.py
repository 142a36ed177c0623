"""What a forward reads from the model's attributes is guarded, and what it leaves there is left by the net too."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import CaptureError, CutError, DnifxError, LossError, StateError


class Config:
    """An object that modules hold."""

    def __init__(self) -> None:
        self.temperature, self.unread, self.gate = 2.0, 1.0, True


class Remembers(nn.Module):
    """Keeps the state of a cell from call to call; None at first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return x + self.state


class Leaks(nn.Module):
    """A membrane that decays, and fires."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.lift, self.membrane, self.decay = nn.Linear(4, 4), torch.zeros(4), 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.membrane = self.decay * self.membrane.detach() + self.lift(x)
        return torch.sigmoid(self.membrane)


class Averages(nn.Module):
    """A running mean that is no buffer, in a pair with a number of calls."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale, self.mean, self.calls = nn.Linear(4, 4), {"mean": torch.zeros(4), "square": torch.ones(4)}, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        mean = 0.9 * self.mean["mean"] + 0.1 * x.detach().mean(0)
        self.mean = {"mean": mean, "square": self.mean["square"] * 0.9}
        return self.scale(x - mean) / (self.calls + 1)


class Tells(nn.Module):
    """Leaves a result with a gradient and one without for the loss to read."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner, self.penalty = nn.Linear(4, 4), torch.zeros(())
        self.seen: Any = ()

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.inner.weight.square().sum() + x.square().mean()
        self.seen = (x.detach().mean(), "seen")
        return torch.tanh(self.inner(x))


class Anneals(nn.Module):
    """Reads numbers and flags of its own, of its class, and of an object that it holds."""

    slope = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner, self.config, self.weight, self.unread = nn.Linear(4, 4), config, 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) / self.config.temperature
        return (h * self.weight if self.config.gate else h) + self.slope


KINDS = (Remembers, Leaks, Averages, Tells, Anneals)


class Model(nn.Module):
    """Blocks of several kinds between two layers."""

    def __init__(self, kinds: list[Any]) -> None:
        super().__init__()
        self.config = Config()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(kind(self.config) for kind in kinds)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = block(h)
        return self.last(h)


def state_of(model: nn.Module) -> list[Any]:
    """Return what the attributes of the blocks hold, in order."""
    names = ("state", "membrane", "mean", "calls", "penalty", "seen")
    return [
        leaf
        for block in model.get_submodule("blocks").children()
        for name in names
        for leaf in pytree.tree_leaves(getattr(block, name, None))
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


models = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)
changes = st.lists(st.sampled_from(["none", "temperature", "weight", "gate", "slope"]), min_size=3, max_size=5)


@settings(max_examples=12)
@given(models, changes, st.sampled_from(["first", "blocks.0"]), st.booleans())
def test_the_state_after_several_calls_is_the_models(
    kinds: list[Any], steps: list[str], cut: str, scheduled: bool
) -> None:
    """Values that are read may change between the calls; outputs and all that is left behind stay the model's."""
    assume(not (scheduled and Tells in kinds))  # see test_a_trainer_refuses_a_term_that_it_could_not_train
    torch.manual_seed(0)
    model = Model(kinds)
    plain = copy.deepcopy(model)
    net = dnifx.decouple(model, [cut], args=(torch.randn(3, 4),), gradient="oracle", loss=nn.MSELoss())
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0)) if scheduled else None
    for number, change in enumerate(steps):
        for each in (model, plain):
            alter(each, change, number)
        x = torch.randn(3, 4)
        got = trainer.step(x, target=torch.zeros(3, 2)).output if trainer is not None else net(x)
        assert torch.equal(got, plain(x))
        assert same(state_of(model), state_of(plain))


def alter(model: Model, change: str, number: int) -> None:
    """Change a value that some blocks read."""
    if change == "temperature":
        model.config.temperature = 1.0 + number
    if change == "gate":
        model.config.gate = not model.config.gate
    for block in model.blocks:
        if isinstance(block, Anneals) and change in ("weight", "slope"):
            setattr(block, change, 0.25 * number)


@pytest.mark.parametrize(
    ("holder", "name", "value", "captures"),
    [
        ("blocks.0", "unread", 5.0, 1),
        ("", "extra", "new", 1),
        ("blocks.0", "weight", 3.0, 2),
        ("blocks.0", "slope", 3.0, 2),
        ("config", "unread", 7.0, 1),
        ("config", "temperature", 7.0, 2),
        ("config", "gate", False, 2),
    ],
)
def test_a_guard_fires_for_what_was_read_and_for_nothing_else(
    holder: str, name: str, value: Any, captures: int
) -> None:
    torch.manual_seed(0)
    model = Model([Anneals])
    net = dnifx.decouple(model, ["first"], args=(torch.randn(3, 4),), gradient="oracle")
    setattr(model.config if holder == "config" else model.get_submodule(holder), name, value)
    x = torch.randn(3, 4)
    assert torch.equal(net(x), model(x))
    assert len(net.input_kinds) == captures


def test_annealing_costs_one_capture() -> None:
    torch.manual_seed(0)
    model, x = Model([Anneals, Leaks]), torch.randn(3, 4)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle", loss=nn.MSELoss())
    trainer = net.trainer(sgd)
    for step in range(8):
        model.config.temperature = 2.0 + 0.1 * step
        trainer.step(x, target=torch.zeros(3, 2))
    assert len(net.input_kinds) == 2


def test_a_term_that_the_loss_reads_has_its_gradient() -> None:
    torch.manual_seed(0)
    model, x = Model([Tells, Anneals]), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    net = dnifx.decouple(model, ["blocks.0"], args=(x,), gradient="oracle")
    pairs: list[tuple[Any, Any]] = [(net, model), (plain, plain)]
    for run, holder in pairs:
        (run(x).square().mean() + holder.blocks[0].penalty).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert torch.allclose(own.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_a_probe_leaves_the_state_as_it_was() -> None:
    torch.manual_seed(0)
    model, x, target = Model([Averages, Remembers]), torch.randn(3, 4), torch.zeros(3, 2)
    trainer = dnifx.decouple(model, ["first"], args=(x,), loss=nn.MSELoss()).trainer(sgd)
    trainer.step(x, target=target)
    before = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in state_of(model)]
    trainer.probe(x, target=target)
    assert same(before, state_of(model))


def test_a_trainer_refuses_a_term_that_it_could_not_train() -> None:
    x = torch.randn(3, 4)
    net = dnifx.decouple(Model([Tells, Anneals]), ["blocks.0"], args=(x,), gradient="zero", loss=nn.MSELoss())
    with pytest.raises(LossError, match=r"forward leaves self.blocks.0.penalty with a gradient in submod_0"):
        net.trainer(sgd)
    model = Model([Tells])
    net = dnifx.decouple(
        model, ["first"], args=(x,), gradient="zero", loss=lambda output, _: output.mean() + model.blocks[0].penalty
    )
    before = [parameter.clone() for parameter in model.blocks.parameters()]
    net.trainer(sgd).step(x, target=None)
    assert all(not torch.equal(one, other) for one, other in zip(before, model.blocks.parameters(), strict=True))


def test_a_net_that_was_copied_has_a_state_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Model([Remembers]), torch.randn(3, 4)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle")
    net(x)
    block: Any = model.blocks[0]
    block.state = block.state.detach()  # torch copies no tensor that carries a graph
    other = copy.deepcopy(net)
    before = state_of(model)
    other(x)
    assert same(before, state_of(model))
    assert not same(before, state_of(other.original))


class Appends(nn.Module):
    """Keeps all that it saw in a list, and what it computes once in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.past: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = torch.ones(4)
        h = self.first(x) + self.cache["bias"]
        self.past.append(h.detach())
        return self.last(h + torch.stack(list(self.past)).sum(0))


def test_containers_that_a_forward_fills_are_filled_in_place() -> None:
    torch.manual_seed(0)
    model = Appends()
    plain = copy.deepcopy(model)
    held = model.past, model.cache
    net = dnifx.decouple(model, ["first"], args=(torch.randn(3, 4),), gradient="oracle")
    assert (model.past, model.cache) == ([], {})
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(net(x), plain(x))
    assert same(model.past, plain.past)
    assert same([*model.cache.values()], [*plain.cache.values()])
    assert model.past is held[0]
    assert model.cache is held[1]


class Hooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.register_hook(lambda gradient: 0.5 * gradient)
        return self.last(h)


def test_what_no_graph_repeats_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"register_hook\(\) of a tensor"):
        dnifx.decouple(Hooks(), ["first"], args=(torch.randn(3, 4),))


def test_a_folder_and_rates_refuse_state_in_attributes(tmp_path: Path) -> None:
    net = dnifx.decouple(Model([Remembers]), ["first"], args=(torch.randn(3, 4),), loss=nn.MSELoss())
    with pytest.raises(DnifxError, match=r"Model keeps self.blocks.0.state from call to call"):
        net.to_folder(tmp_path / "never")
    with pytest.raises(CutError, match=r"forward keeps self.blocks.0.state on the model"):
        dnifx.decouple(Model([Remembers]), ["first"], every={"last": 2}, args=(torch.randn(3, 4),))


def test_what_was_replaced_or_unfrozen_is_told() -> None:
    model, x = Model([Anneals]), torch.randn(3, 4)
    model.first.requires_grad_(False)
    net = dnifx.decouple(model, ["blocks.0"], args=(x,), gradient="oracle")
    model.first.requires_grad_(True)
    with pytest.raises(StateError, match=r"the parameter 'first.weight' was unfrozen after dnifx.decouple"):
        net(x)
    model.first.requires_grad_(False)
    net(x)
    model.last = nn.Linear(4, 3)
    with pytest.raises(StateError, match=r"the module 'last' was replaced after dnifx.decouple"):
        net(x)


def test_an_object_that_takes_the_place_of_another_is_read() -> None:
    model, x = Model([Anneals]), torch.randn(3, 4)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle")
    block: Any = model.blocks[0]
    block.config = SimpleNamespace(temperature=0.5, gate=False)
    assert torch.equal(net(x), model(x))
