"""First states: None in the first window, and streams whose batch changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import CutError, InputError
from tests.passes.time.recurrent_models import Stacked


class Optional(Stacked):
    """An nn.RNN and its like; without a state it begins with zeros."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return super().forward(x, state)


class Cells(nn.Module):
    """A stack of cells in a Python loop over time; its state is a list with one entry for each, None at first."""

    def __init__(self, kind: type[nn.GRUCell | nn.LSTMCell], layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(kind(3 if layer == 0 else 4, 4) for layer in range(layers))
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Any = None) -> dict[str, Any]:
        states: list[Any] = [None] * len(self.cells) if state is None else list(state)
        outputs = []
        for time in range(x.size(1)):
            h = x[:, time]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(h, states[layer])
                h = states[layer][0] if isinstance(cell, nn.LSTMCell) else states[layer]
            outputs.append(self.readout(h))
        return {"y": torch.stack(outputs, 1), "left": states}


class Batch(nn.Module):
    """A GRU whose input and state are in one dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.readout = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        y, left = self.core(batch["x"], batch["memory"])
        return self.readout(y), left


class Learned(nn.Module):
    """A GRU with a first state of its own."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.core, self.readout = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.first = nn.Parameter(torch.full((1, 1, 4), value))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, left = self.core(x, self.first.expand(-1, len(x), -1).contiguous() if state is None else state)
        return self.readout(y), left


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LSTM": (lambda: Optional(nn.LSTM, 2, True), "1"),
    "GRU, time first": (lambda: Optional(nn.GRU, 1, False), "1"),
    "RNN": (lambda: Optional(nn.RNN, 1, True), "1"),
    "GRU cells": (lambda: Cells(nn.GRUCell, 2), "left"),
    "LSTM cells": (lambda: Cells(nn.LSTMCell, 1), "left"),
}
WINDOWS = [torch.randn(3, 5, 3) for _ in range(3)]
TARGETS = [torch.randn(3, 5, 2) for _ in range(3)]


def loss(output: Any, target: Tensor) -> Tensor:
    y = output if isinstance(output, Tensor) else output["y"] if isinstance(output, dict) else output[0]
    return nn.functional.mse_loss(y, target)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def zeros_of(model: nn.Module, path: str) -> Any:
    """Return zeros in the structure of the state that a window leaves."""
    left = model(WINDOWS[0])
    return pytree.tree_map(torch.zeros_like, left[int(path)] if path.isdigit() else left[path])


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("given_none", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_none_in_the_example_is_as_zeros_in_it(name: str, given_none: bool) -> None:
    torch.manual_seed(0)
    make, path = MODELS[name]
    model = make()
    twin, cut = copy.deepcopy(model), dnifx.Recurrent("state", path)
    zeros = zeros_of(model, path)
    torch.manual_seed(1)
    none = dnifx.decouple(model, cut, args=(WINDOWS[0], None) if given_none else (WINDOWS[0],), loss=loss)
    torch.manual_seed(1)
    zero = dnifx.decouple(twin, cut, args=(WINDOWS[0], zeros), loss=loss)
    trainers = none.trainer(sgd), zero.trainer(sgd)
    for x, y in zip(WINDOWS, TARGETS, strict=True):
        made = [trainer.step(x, target=y).loss for trainer in trainers]
        assert made[0] is not None
        assert made[1] is not None
        assert torch.equal(made[0], made[1])
    assert same(none, zero)


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_of_ones_own_begins_with_none(name: str) -> None:
    torch.manual_seed(0)
    make, path = MODELS[name]
    net = dnifx.decouple(make(), dnifx.Recurrent("state", path), args=(WINDOWS[0],), loss=loss)
    for size in (3, 2):
        x, state = (
            WINDOWS[0][:size],
            pytree.tree_map(lambda each, size=size: batch_of(each, size), zeros_of(net.original, path)),
        )
        wanted = net(x, state)
        for made in (net(x), net(x, None), net(x, state=None)):
            assert all(map(torch.equal, pytree.tree_leaves(made), pytree.tree_leaves(wanted)))
    assert len(net.input_kinds) == 1


def batch_of(state: Tensor, size: int) -> Tensor:
    """Return a state of so many examples."""
    return state[:, :size] if state.dim() == 3 else state[:size]


def test_a_state_in_a_structure_may_be_none() -> None:
    net = dnifx.decouple(
        Batch(), dnifx.Recurrent("batch.memory", "1"), args=({"x": WINDOWS[0], "memory": None},), loss=loss
    )
    trainer = net.trainer(sgd)
    for x, y in zip(WINDOWS, TARGETS, strict=True):
        trainer.step({"x": x, "memory": None}, target=y)
    assert net({"x": WINDOWS[0], "memory": None})[0].shape == (3, 5, 2)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_first_state_of_the_models_own_is_refused(value: float) -> None:
    with pytest.raises(CutError, match=r"starts from something else than zeros.*Give the first state in args="):
        dnifx.decouple(Learned(value), dnifx.Recurrent("state", "1"), args=(WINDOWS[0],))


def test_a_model_that_cannot_begin_with_none_is_refused() -> None:
    class Adds(Optional):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return super().forward(x, state + 0)

    with pytest.raises(CutError, match="fails on the example inputs, in which the state 'state' is None: TypeError"):
        dnifx.decouple(Adds(nn.GRU, 1, True), dnifx.Recurrent("state", "1"), args=(WINDOWS[0],))


def test_what_none_means_is_not_guessed() -> None:
    model, zero = Learned(1.0), torch.zeros(1, 3, 4)
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(WINDOWS[0], zero), loss=loss)
    for call in (lambda: net(WINDOWS[0]), lambda: net.trainer(sgd).step(WINDOWS[0], None, target=TARGETS[0])):
        with pytest.raises(InputError, match="it is not known what None means to Learned"):
            call()
    with torch.no_grad():
        assert torch.equal(net(WINDOWS[0])[0], model(WINDOWS[0])[0])
    net.trainer(sgd).step(WINDOWS[0], target=TARGETS[0])


def test_none_in_the_place_of_a_carried_state_is_refused_until_reset() -> None:
    net = dnifx.decouple(Optional(nn.GRU, 1, True), dnifx.Recurrent("state", "1"), args=(WINDOWS[0],), loss=loss)
    trainer = net.trainer(sgd)
    trainer.step(WINDOWS[0], None, target=TARGETS[0])
    with pytest.raises(InputError, match=r"None is given in the place of a state that is carried.*reset"):
        trainer.step(WINDOWS[1], None, target=TARGETS[1])
    trainer.reset()
    trainer.step(WINDOWS[1], None, target=TARGETS[1])


def test_capture_leaves_buffers_and_random_state_alone() -> None:
    class Counted(Optional):
        def __init__(self) -> None:
            super().__init__(nn.GRU, 1, True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            self.get_buffer("calls").add_(1)
            return super().forward(nn.functional.dropout(x, 0.5, self.training), state)

    model, cut = Counted(), dnifx.Recurrent("state", "1")
    torch.manual_seed(0)
    dnifx.decouple(model, cut, args=(WINDOWS[0],), gradient="zero")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    dnifx.decouple(model, cut, args=(WINDOWS[0], torch.zeros(1, 3, 4)), gradient="zero")
    assert torch.equal(drawn, torch.rand(1))
    assert model.get_buffer("calls") == 0


@given(
    st.sampled_from(sorted(MODELS)), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)
)
def test_a_stream_with_another_batch_is_refused_and_begins_anew(name: str, streams: list[tuple[int, int]]) -> None:
    make, path = MODELS[name]
    torch.manual_seed(0)
    net = dnifx.decouple(make(), dnifx.Recurrent("state", path), args=(WINDOWS[0],), loss=loss, verify=False)
    trainer, before = net.trainer(sgd), None
    for size, steps in streams:
        x, y = torch.randn(size, 5 if steps == size else steps, 3), torch.randn(size, 5 if steps == size else steps, 2)
        if before is not None and before != size:
            with pytest.raises(
                InputError, match=rf"carried is of {before} examples, and the inputs are of {size}.*reset\(\)"
            ):
                trainer.step(x, target=y)
            trainer.reset()
        trainer.step(x, target=y)
        trainer.step(x, target=y)
        before = size


def test_after_reset_a_stream_of_another_batch_trains_as_a_first_one() -> None:
    torch.manual_seed(0)
    model = Optional(nn.LSTM, 1, True)
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(WINDOWS[0],), loss=loss)
    first = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    first.step(WINDOWS[0], target=TARGETS[0])
    first.reset()
    fresh = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    short, wanted = WINDOWS[1][:2], TARGETS[1][:2]
    made, other = first.step(short, target=wanted).loss, fresh.step(short, target=wanted).loss
    assert made is not None
    assert other is not None
    assert torch.equal(made, other)


def test_a_reset_of_some_examples_does_not_begin_anew() -> None:
    net = dnifx.decouple(Optional(nn.GRU, 1, True), dnifx.Recurrent("state", "1"), args=(WINDOWS[0],), loss=loss)
    trainer = net.trainer(sgd)
    trainer.step(WINDOWS[0], target=TARGETS[0])
    trainer.reset(torch.tensor([True, True, False]))
    with pytest.raises(InputError, match="carried is of 3 examples, and the inputs are of 2"):
        trainer.step(WINDOWS[1][:2], target=TARGETS[1][:2])
    trainer.step(WINDOWS[1], target=TARGETS[1])


def test_a_first_window_may_have_another_batch_than_the_example() -> None:
    net = dnifx.decouple(
        Stacked(nn.LSTM, 1, False),
        dnifx.Recurrent("state", "1"),
        args=(WINDOWS[0], (torch.zeros(1, 3, 4),) * 2),
        loss=loss,
    )
    trainer = net.trainer(sgd)
    for size in (2, 2):
        trainer.step(WINDOWS[0][:size], target=TARGETS[0][:size])
    assert trainer.probe(WINDOWS[0][:2], target=TARGETS[0][:2]).loss.isfinite()
