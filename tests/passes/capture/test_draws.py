"""Forwards that draw random numbers in Python: each call draws anew, as the model does, or the model is refused in short."""

import copy
import itertools
import math
import os
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError, DnifxWarning
from dnifx.passes.capture import methods
from dnifx.passes.capture.record.generators import generators, seed

Step = Callable[["Drawing", Tensor], Tensor]
EXAMPLE = torch.linspace(-1, 1, 24).reshape(4, 6)
ITEMS = iter(range(1, 1000))


class Drawing(nn.Module):
    """Layers, and between them steps that draw."""

    def __init__(self, early: Sequence[Step], late: Sequence[Step] = ()) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.early, self.late = tuple(early), tuple(late)
        self.numpy_draws, self.python_draws = np.random.default_rng(3), random.Random(4)
        self.old_draws, self.torch_draws = np.random.RandomState(5), torch.Generator().manual_seed(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for step in self.early:
            h = step(self, h)
        h = torch.tanh(self.b(h))
        for step in self.late:
            h = step(self, h)
        return self.c(h)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Drawing":
        other = Drawing(self.early, self.late)
        other.load_state_dict(self.state_dict())
        return other


def relu_by_torch(model: Drawing, h: Tensor) -> Tensor:
    return torch.relu(h) if torch.rand(()) < 0.5 else h


def relu_by_item(model: Drawing, h: Tensor) -> Tensor:
    return torch.relu(h) if torch.rand(1).item() < 0.5 else h


def relu_by_python(model: Drawing, h: Tensor) -> Tensor:
    return torch.relu(h) if random.random() < 0.5 else h


def relu_by_numpy(model: Drawing, h: Tensor) -> Tensor:
    return torch.relu(h) if np.random.rand() < 0.5 and np.random.rand(2).sum() > 0.5 else h


def chosen_function(model: Drawing, h: Tensor) -> Tensor:
    function: Any = random.choice([torch.sin, torch.cos, torch.relu])
    return function(h)  # type: ignore[no-any-return]


def place_in_a_list(model: Drawing, h: Tensor) -> Tensor:
    return h * [0.5, 1.0, 2.0][random.randrange(3)]


def key_of_a_dict(model: Drawing, h: Tensor) -> Tensor:
    return h * {"0": 0.5, "1": 2.0}[str(torch.randint(2, (1,)).item())]


def several_times(model: Drawing, h: Tensor) -> Tensor:
    for _ in range(random.randint(0, 2)):
        h = torch.sin(h)
    return h


def kept_columns(model: Drawing, h: Tensor) -> Tensor:
    return h * torch.tensor([float(random.random() < 0.5) for _ in range(2)] * 3)


def scaled(model: Drawing, h: Tensor) -> Tensor:
    return h * random.uniform(0.5, 1.5) + np.random.normal() * 0.1


def rolled(model: Drawing, h: Tensor) -> Tensor:
    return torch.roll(h, random.randint(1, 5), 1) + h[:, : np.random.randint(2, 6)].sum(1, keepdim=True)


def mixed(model: Drawing, h: Tensor) -> Tensor:
    share = np.random.beta(0.4, 0.4)
    return share * h + (1 - share) * h[torch.randperm(len(h))]


def permuted(model: Drawing, h: Tensor) -> Tensor:
    return h[np.random.permutation(h.shape[0])] + h[:, random.sample(range(6), 6)]


def noise_of_numpy(model: Drawing, h: Tensor) -> Tensor:
    uniform = np.random.uniform(size=h.shape)
    return h + torch.from_numpy(-np.log(-np.log(uniform + 1e-9))).to(h)


def mask_of_numpy(model: Drawing, h: Tensor) -> Tensor:
    mask = np.random.rand(*h.shape) < 0.5
    mask[0] = True
    return h * torch.tensor(mask.astype(np.float32))


def spans(rows: int, length: int) -> Any:
    mask = np.zeros((rows, length), dtype=bool)
    for row in range(rows):
        mask[row, np.random.randint(0, length - 2) :] = True
    return mask


def some_order(size: int) -> list[int]:
    order = list(range(size))
    random.shuffle(order)
    return order


class Helper:
    """Draws in its methods."""

    rate = 0.5

    def share(self) -> float:
        return float(np.random.beta(self.rate, self.rate))

    @staticmethod
    def gate(h: Tensor) -> Tensor:
        return torch.relu(h) if random.random() < 0.5 else torch.sin(h)


HELPER = Helper()


def mask_of_a_function(model: Drawing, h: Tensor) -> Tensor:
    return torch.where(torch.tensor(spans(h.shape[0], h.shape[1])), torch.zeros(()), h)


def order_of_a_function(model: Drawing, h: Tensor) -> Tensor:
    return h[:, some_order(h.shape[1])]


def share_of_a_method(model: Drawing, h: Tensor) -> Tensor:
    share = HELPER.share()
    return share * h + (1 - share) * h.flip(0)


def gate_of_a_method(model: Drawing, h: Tensor) -> Tensor:
    return HELPER.gate(h)


def learned_noise(model: Drawing, h: Tensor) -> Tensor:
    return h + model.a.weight.mean() * random.random()


def noise_by_a_parameter(model: Drawing, h: Tensor) -> Tensor:
    return learned_noise(model, h)


def dropped(model: Drawing, h: Tensor) -> Tensor:
    return nn.functional.dropout(h, 0.3, training=model.training)


def numpy_generator(model: Drawing, h: Tensor) -> Tensor:
    draws: Any = model.numpy_draws
    return h * torch.tensor(draws.random(6)).to(h) + draws.integers(3)


def python_generator(model: Drawing, h: Tensor) -> Tensor:
    return h * model.python_draws.uniform(0.5, 1.5) if model.python_draws.random() < 0.5 else h


def old_generator(model: Drawing, h: Tensor) -> Tensor:
    return h + torch.from_numpy(model.old_draws.randn(6)).to(h)


def torch_generator(model: Drawing, h: Tensor) -> Tensor:
    return h * torch.rand(6, generator=model.torch_draws) if torch.rand((), generator=model.torch_draws) < 0.5 else h


def seeded_here(model: Drawing, h: Tensor) -> Tensor:
    torch.manual_seed(7)
    return h * torch.rand(6)


STEPS: tuple[Step, ...] = (
    *(relu_by_torch, relu_by_item, relu_by_python, relu_by_numpy, chosen_function, place_in_a_list, key_of_a_dict),
    *(several_times, kept_columns, scaled, rolled, mixed, permuted, noise_of_numpy, mask_of_numpy),
    *(mask_of_a_function, order_of_a_function, share_of_a_method, gate_of_a_method, noise_by_a_parameter),
    *(dropped, numpy_generator, python_generator, old_generator, torch_generator, seeded_here),
)


def states() -> Any:
    cpu, _, python, of_numpy = generators()
    return cpu.tolist(), python, of_numpy[1].tolist(), of_numpy[2:]


def one_call(model: nn.Module, x: Tensor, number: int) -> Any:
    """Run forward and backward under a seed; return the output, the gradients, and the random states afterwards."""
    seed(number)
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    return output.detach(), {name: each.grad for name, each in model.named_parameters()}, states()


def assert_same(model: nn.Module, plain: nn.Module, net: nn.Module, calls: int, *sizes: int) -> None:
    """See that net and model give the same over several calls, each under another seed."""
    for number in range(calls):
        x = torch.randn(*sizes)
        expected, found = one_call(plain, x, number), one_call(net, x, number)
        assert torch.equal(expected[0], found[0]), number
        for name, gradient in expected[1].items():
            other = model.get_parameter(name).grad
            assert (gradient is None) == (other is None), (number, name)
            assert gradient is None or other is None or torch.allclose(gradient, other), (number, name)
        assert expected[2] == found[2], number


def loss(output: Tensor, target: None) -> Tensor:
    return output.square().mean()


def decoupled(model: nn.Module, cut: str = "b", **options: Any) -> dnifx.DecoupledModule:
    return dnifx.decouple(model, cut, args=(EXAMPLE,), gradient="oracle", loss=loss, **options)


def check(early: Sequence[Step], late: Sequence[Step] = (), start: int = 0, calls: int = 4) -> dnifx.DecoupledModule:
    """See that a model of these steps is taken, and does in each call what the model does."""
    seed(start)
    model = Drawing(early, late)
    plain, net = copy.deepcopy(model), decoupled(model)
    assert_same(model, plain, net, calls, 4, 6)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    for number in range(2):
        x = torch.randn(4, 6)
        expected = one_call(plain, x, number)
        seed(number)
        assert torch.equal(trainer.step(x, target=None).output.detach(), expected[0])
        assert states() == expected[2]
    return net


@pytest.mark.parametrize("step", STEPS)
def test_each_draw_is_made_anew_in_each_call(step: Step) -> None:
    check([step], start=1, calls=3)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=2), st.lists(st.sampled_from(STEPS), max_size=1), st.integers(0, 99))
def test_models_that_draw_in_many_ways(early: list[Step], late: list[Step], start: int) -> None:
    check(early, late, start, calls=3)


def test_what_is_only_drawn_as_a_number_or_an_array_costs_no_capture() -> None:
    steps = (scaled, rolled, mixed, permuted, noise_of_numpy, mask_of_numpy, dropped, numpy_generator, old_generator)
    functions = (mask_of_a_function, order_of_a_function, share_of_a_method, gate_of_a_method, noise_by_a_parameter)
    assert len(check(steps, functions, calls=5).input_kinds) == 1


def as_float(model: Drawing, h: Tensor) -> Tensor:
    return h * float(np.random.beta(0.4, 0.4))


def shuffled(model: Drawing, h: Tensor) -> Tensor:
    order = list(range(6))
    random.shuffle(order)
    return h[:, order]


def random_bytes(model: Drawing, h: Tensor) -> Tensor:
    return torch.relu(h) if os.urandom(1)[0] < 8 else h


def identifier(model: Drawing, h: Tensor) -> Tensor:
    return h * (uuid.uuid4().int % 7)


def unseeded(model: Drawing, h: Tensor) -> Tensor:
    return h * float(np.random.default_rng().random())


def next_item(model: Drawing, h: Tensor) -> Tensor:
    return h * next(ITEMS)


REFUSED: dict[Step, str] = {
    as_float: r"numpy\.random\.beta",
    shuffled: r"random\.shuffle\(\)",
    random_bytes: r"os\.urandom\(\)",
    identifier: r"uuid\.uuid4\(\)",
    unseeded: r"numpy\.random\.default_rng\(\)",
    next_item: "does not repeat itself.*an iterator",
}


@pytest.mark.parametrize("step", REFUSED)
def test_what_no_graph_follows_is_refused_in_short_whatever_the_seed(step: Step) -> None:
    for number in range(4):
        seed(number)
        model = Drawing([step])
        before = states()
        with pytest.raises(CaptureError, match=REFUSED[step]) as caught:
            decoupled(model)
        assert len(str(caught.value)) < 600
        assert "submodule" in str(caught.value)
        assert states() == before


class Alone(nn.Module):
    """A step in a module of its own."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(self, h: Tensor) -> Tensor:
        return self.step(None, h)  # type: ignore[no-any-return]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.inner, self.b, self.c = nn.Linear(6, 6), inner, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.inner(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("step", [as_float, shuffled, relu_by_torch, relu_by_python, place_in_a_list])
def test_a_module_that_draws_is_kept_whole_by_itself(step: Step) -> None:
    seed(0)
    model = Around(Alone(step))
    plain, net = copy.deepcopy(model), decoupled(model)
    assert net.program.capture is not None
    assert [each.path for each in net.program.capture.kept] == ["inner"]
    assert_same(model, plain, net, 6, 4, 6)
    assert len(net.input_kinds) == 1


@pytest.mark.parametrize("iterator", [itertools.count(2), (each for each in range(99)), iter([1, 2, 3])])
def test_an_iterator_on_the_model_is_refused_before_an_item_is_taken(iterator: Any) -> None:
    def step(model: Any, h: Tensor) -> Tensor:
        return h * next(model.items)

    model: Any = Drawing([step])
    model.items = iterator
    with pytest.raises(CaptureError, match=r"self\.items is an iterator .*h \* next\(model\.items\)"):
        decoupled(model)
    assert next(iterator) in (0, 1, 2)
    assert next(iterator) in (1, 2, 3)


class Blocks(nn.Module):
    """Drops blocks; a coin in a block, too."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.rate, self.c = rate, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand(()) < self.rate:
                continue
            x = x + torch.tanh(block(x))
        return self.c(x)  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Most of this model drops its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.trunk, self.leave = nn.Linear(6, 6), Blocks(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.trunk(self.enter(x)))  # type: ignore[no-any-return]


def test_a_large_module_that_draws_is_opened_only_where_a_cut_lies_in_it() -> None:
    kept = {}
    for cut in ("enter", "trunk.blocks.1"):
        seed(0)
        capture = decoupled(Trunk(), cut).program.capture
        assert capture is not None
        kept[cut] = [each.path for each in capture.kept], bool(capture.steered)
    assert kept == {"enter": (["trunk"], False), "trunk.blocks.1": ([], True)}


def test_every_outcome_of_layer_drop_trains_and_one_without_the_cut_trains_by_backpropagation() -> None:
    seed(0)
    model = Blocks()
    plain = copy.deepcopy(model)
    net = decoupled(model, "blocks.1")
    assert net.program.capture is not None
    assert net.program.capture.steered
    assert {each.path for each in (net.program.capture.kept or ())} == set()
    assert {f"blocks.{number}.weight" for number in range(3)} <= {
        name for partition in net.program.partitions for name in partition.parameters
    }
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.warns(DnifxWarning, match=r"draws at .*torch\.rand.*one outcome cannot be cut as the others") as warned:  # noqa: PT031
        for number in range(12):
            x = torch.randn(4, 6)
            one_call(plain, x, number)
            optimizer.step()
            after = states()
            seed(number)
            trainer.step(x, target=None)
            assert states() == after
            for name, parameter in plain.named_parameters():
                assert torch.allclose(parameter, model.get_parameter(name), atol=1e-6), (number, name)
    assert len(warned) == 1
    assert_same(model, plain, net, 3, 4, 6)


class Sometimes(nn.Module):
    """Runs each of its layers in about half of the calls, and is followed by plain ones; the first layer is drawn, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        self.drawn = Layers()
        self.plain = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if torch.rand([]) < 0.9:
            x = torch.tanh(x)
        x = self.drawn(x)
        for layer in self.plain:
            x = torch.tanh(layer(x))
        return self.last(x)  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Layers, each of which runs in about half of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand([]) < 0.5:
                x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:estimators")
def test_a_number_of_cuts_gives_the_same_cuts_whatever_the_random_state() -> None:
    """Else a saved state would not fit the net of another process."""
    found = set()
    for number in range(6):
        torch.manual_seed(number)
        net = dnifx.decouple(Sometimes(), 3, args=(torch.zeros(4, 3),), verify=False)
        found.add(tuple(each.name for each in net.boundaries))
    assert len(found) == 1


def test_a_float_taken_unseen_is_refused_where_every_outcome_is_rare() -> None:
    class Rare(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(12):
                x = torch.sin(x) if random.random() < 0.5 else x
            return super().forward(x) * math.sqrt(random.random())

    seed(0)
    with pytest.raises(CaptureError, match=r"what Python makes of the number drawn at .*math\.sqrt"):
        decoupled(Rare(0.5), "blocks.1")


@pytest.mark.parametrize("step", [as_float, lambda model, h: (h.register_hook(lambda each: each * 2), h)[1]])
def test_no_other_method_takes_what_recording_found_unsafe(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    for name, method in methods.METHODS.items():
        monkeypatch.setitem(methods.METHODS, name, lambda program, name=name: tried.append(name))  # type: ignore[index]
        assert callable(method)
    with pytest.raises(CaptureError, match="no graph repeats"):
        decoupled(Drawing([step]))
    assert tried == []
