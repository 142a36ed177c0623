"""The generated step: one block an action, in the schedule's order, what is dead let go, names kept apart."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.ir import Program, Schedule
from dnifx.passes.emit.blocks import Block, dead_after, local
from dnifx.passes.emit.step import StepWriter
from dnifx.runtime.training.steps import STEP_GLOBALS
from tests.passes.programs import Residual, compiled, mlp

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 0, 1])


def source(program: Program, schedule: Schedule | None = None, mean: bool = True, diagnose: bool = False) -> str:
    chosen = schedule or program.schedule
    assert chosen is not None
    return StepWriter(program, chosen, mean, diagnose).source()


def titles(text: str) -> list[str]:
    """Return the actions in the comments."""
    return re.findall(r"^    # (\w\d+):", text, flags=re.M)


def test_the_blocks_are_the_schedules_actions_in_order() -> None:
    program = compiled(mlp(6, 6, 6, 2), ["0", "2"], X)
    assert program.schedule is not None
    text = source(program)
    assert titles(text) == [str(action) for action in program.schedule.actions]
    assert titles(text)[:4] == ["F0", "S0", "B0", "U0"]
    compile(text, "<step>", "exec")


def test_every_value_is_let_go_after_its_last_reader() -> None:
    text = source(compiled(mlp(6, 6, 6, 2), ["0", "2"], X))
    deleted = [name for line in re.findall(r"^    del (.*)$", text, flags=re.M) for name in line.split(", ")]
    assert len(deleted) == len(set(deleted))
    assert {"_0", "leaf__0", "_2", "leaf__2", "estimate_cut_0", "target_cut_0"} <= set(deleted)
    lines = text.splitlines()
    for name in deleted:
        gone = next(
            number
            for number, line in enumerate(lines)
            if line.startswith("    del ") and name in re.findall(r"\w+", line)
        )
        assert not any(name in re.findall(r"\w+", line.partition("#")[0]) for line in lines[gone + 1 :])


def test_dead_after_finds_the_last_block_that_reads() -> None:
    blocks = [
        Block("first", ("lasting = kept = 0",)),
        Block("a", ("x = 1", "y, = 2,")),
        Block("b", ("z = lasting = kept = y", "d['k'] = f(q=x)")),
        Block("c", ("f(z, xy, 'y')", "*u, v = (w for w in z)")),
    ]
    assert list(dead_after(blocks)) == [[], [], ["x", "y"], ["u", "v", "z"]]


@pytest.mark.parametrize(("mean", "scale"), [(True, "scale = 1.0 / examples"), (False, "scale = 1.0\n")])
def test_synthetic_gradients_are_scaled_as_the_loss_is_reduced(mean: bool, scale: str) -> None:
    assert scale in source(compiled(mlp(6, 6, 2), ["0"], X), mean=mean)


def test_no_target_is_asked_for_an_estimator_that_is_not_fitted() -> None:
    text = source(compiled(mlp(6, 6, 2), ["0"], X, gradient="zero"))
    assert "S0" in titles(text)
    assert "T0" not in titles(text)
    assert "M0" not in titles(text)
    assert ".requires_grad_()" not in text, "no gradient is asked of what nobody is fitted to"


def test_an_oracle_gives_what_arrived() -> None:
    text = source(compiled(mlp(6, 6, 2), ["0"], X, gradient="oracle"))
    assert "arrived(leaf__0)" in text
    assert "estimate_cut_0" not in text
    order = titles(text)
    assert set(order) == {"F0", "F1", "B1", "T0", "U1", "B0", "U0"}
    assert [item for item in order if item in ("F1", "B1", "T0", "B0", "U0")] == ["F1", "B1", "T0", "B0", "U0"]


def test_nothing_is_compared_unless_it_is_asked_for() -> None:
    program = compiled(mlp(6, 6, 2), ["0"], X)
    assert "compare(" not in source(program)
    assert "diagnostics['0'] = compare(estimate_cut_0, target_cut_0)" in source(program, diagnose=True)


def test_another_order_is_written_in_that_order() -> None:
    program = compiled(mlp(6, 6, 2), ["0"], X)
    order = "F0 F1 B1 T0 S0 M0 U1 B0 U0"
    schedule = replace(dnifx.schedules.parse(order), name="late")
    assert titles(source(program, schedule)) == order.split()


@pytest.mark.parametrize(
    "name", ["loss", "target", "self", "examples", "leaf_x", "estimate_a", "value_loss", "compare"]
)
def test_a_value_does_not_shadow_a_name_of_the_step(name: str) -> None:
    assert local(name) == f"value_{name}"
    assert local("hidden") == "hidden"


def test_no_value_can_be_called_as_what_a_step_calls() -> None:
    for name in STEP_GLOBALS:
        assert local(name) != name, f"{name} is a function that steps call; add it to RESERVED"


def test_a_model_whose_values_bear_the_steps_names_trains() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loss, self.output, self.features = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, scale: Tensor, examples: Tensor) -> Tensor:
            loss = self.loss(scale)
            output = self.output(torch.relu(loss) + examples)
            result: Tensor = self.features(output + loss)
            return result

    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]

    model, expected = Named(), Named()
    net = dnifx.decouple(model, ["loss", "output"], args=(X, X), loss=F.cross_entropy, gradient="oracle")
    optimizer = sgd(expected.parameters())
    trainer = net.trainer(sgd)
    for _ in range(2):
        trainer.step(X, X, target=Y)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(expected(X, X), Y))
        optimizer.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def backwards(program: Program) -> list[str]:
    """Return what each backward pass of a step calls, in the order of the partitions."""
    found = re.findall(r"^    # B(\d+):.*\n(?:    self\.terms.*\n)*    ([\w.]+)\(", source(program), flags=re.M)
    return [called for _, called in sorted(found)]


SURE, ASKED = "torch.autograd.backward", "backpropagate"


class PassesOn(nn.Module):
    """A value that is computed from another partition's alone goes on beside one that a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        passed = torch.tanh(self.first(x))
        result: Tensor = self.last(self.second(passed) * passed)
        return result


class PassesOnDetached(PassesOn):
    """The same, times what carries no gradient though a layer makes it."""

    def forward(self, x: Tensor) -> Tensor:
        passed = torch.tanh(self.first(x))
        made = self.second(passed)
        result: Tensor = self.last(made + torch.mul(passed, made.detach()))
        return result


@pytest.mark.parametrize(("gradient", "expected"), [("zero", [SURE, ASKED, SURE]), ("synthetic", [SURE, SURE, SURE])])
def test_what_carries_no_gradient_makes_nothing_sure(gradient: str, expected: list[str]) -> None:
    program = compiled(PassesOnDetached(), ["first", "mul"], X, gradient=gradient)
    assert {name for boundary in program.boundaries[1:] for name in boundary.values} == {"second", "mul"}
    assert backwards(program) == expected
    train(dnifx.decouple(PassesOnDetached(), ["first", "mul"], args=(X,), gradient=gradient, loss=F.cross_entropy))


@pytest.mark.parametrize(
    ("gradient", "frozen", "expected"),
    [
        ("zero", False, [SURE, ASKED, SURE]),
        ("synthetic", False, [SURE, SURE, SURE]),
        ({"first": "zero", "second": "synthetic"}, False, [SURE, ASKED, SURE]),
        ({"first": "synthetic", "second": "zero"}, False, [SURE, SURE, SURE]),
        ("synthetic", True, [SURE, SURE]),
    ],
)
def test_what_may_carry_no_graph_is_asked_before_it_is_differentiated(
    gradient: Any, frozen: bool, expected: list[str]
) -> None:
    model = PassesOn()
    model.first.requires_grad_(not frozen)
    assert backwards(compiled(model, ["first", "second"], X, gradient=gradient)) == expected
    train(dnifx.decouple(model, ["first", "second"], args=(X,), gradient=gradient, loss=F.cross_entropy))


class MayReturnItsInput(nn.Module):
    """A layer that branches on values, and is kept whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.inner(x)
        return h if h.sum() > 1e9 else x


@pytest.mark.parametrize("gradient", ["zero", "synthetic"])
def test_a_module_that_is_kept_whole_may_return_what_it_was_given(gradient: str) -> None:
    inside = nn.Sequential(nn.Linear(6, 6), MayReturnItsInput(6), nn.Linear(6, 2))
    net = dnifx.decouple(inside, ["0", "1"], args=(X,), gradient=gradient, loss=F.cross_entropy)
    assert backwards(net.program) == [SURE, ASKED, SURE]
    train(net)
    at_the_end = nn.Sequential(nn.Linear(6, 2), MayReturnItsInput(2))
    net = dnifx.decouple(at_the_end, ["0"], args=(X,), gradient=gradient, loss=F.cross_entropy)
    assert backwards(net.program) == [SURE, ASKED if gradient == "zero" else SURE]


def train(net: dnifx.DecoupledModule) -> None:
    """Make a step."""
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert trainer.step(X, target=Y).loss is not None


def test_each_value_says_its_type_and_each_estimator_its_origin() -> None:
    text = source(compiled(Residual(), ["blocks.0"], X))
    assert "# f32[4, 6], f32[4, 6]" in text
    assert "S0: cut after blocks.0; estimator Affine(" in text
