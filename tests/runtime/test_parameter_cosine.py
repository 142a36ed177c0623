"""The cosine between what estimates and targets do to a producer's parameters, and the figures of a net in any loop."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.checkpoint import checkpoint

import dnifx
from dnifx.errors import StateError
from dnifx.estimators import BoundarySpec
from dnifx.runtime.decoupled import DecoupledModule

Y = torch.arange(8) % 3


class Constant(nn.Module):
    """Answers with a map of numbers that the test can read."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(len(spec.name))
        self.answers = nn.ParameterList(
            torch.randn(value.shape[1:], generator=generator, dtype=value.dtype) for value in spec.values
        )

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(answer.expand_as(value) for answer, value in zip(self.answers, values, strict=True))


def answers_of(estimator: nn.Module) -> nn.ParameterList:
    """What an estimator answers for each value."""
    assert isinstance(estimator, Constant)
    return estimator.answers


class Residual(nn.Module):
    """Two values cross its cut, and one of its layers is used on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared, self.last = (
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.first(x))
        inner = self.second(self.shared(skip))
        answer: Tensor = self.last(torch.tanh(self.shared(inner)) + skip)
        return answer


def dense() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(6, 5),
            nn.Sigmoid(),
            nn.Linear(5, 3),
        )
    )


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(18, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "vectors": (dense, (8, 4), ["2", "5"]),
    "maps": (convolutional, (8, 1, 4, 4), ["1", "2"]),
    "two values, a layer on both sides": (Residual, (8, 4), ["second"]),
}


def made(case: str, gradient: Any = Constant) -> tuple[DecoupledModule, Tensor]:
    torch.manual_seed(0)
    make, shape, cuts = CASES[case]
    x = torch.randn(shape).double()
    net = dnifx.decouple(make().double(), cuts, args=(x,), gradient=gradient, loss=cross_entropy)
    return net, x


def by_hand(net: DecoupledModule, x: Tensor, true: bool) -> dict[str, float]:
    """The cosines by plain autograd: each partition run by itself, and the whole once more for what arrives."""
    module = copy.deepcopy(net)
    program, named = module.program, dict(module.original.named_parameters())
    kind = module.input_kinds[0]
    known: dict[str, Tensor] = dict(zip(kind.signature.inputs, (x,), strict=True))
    made: dict[str, Tensor] = {}
    for partition, graph in zip(program.partitions, kind.submodules, strict=True):
        given = []
        for name in partition.inputs:
            leaf = known[name].detach().requires_grad_() if name in made else known[name]
            if name in made and partition.index:
                made[f"{name}@{partition.index}"] = leaf
            given.append(leaf)
        outputs = graph(*given)
        for name, output in zip(partition.outputs, outputs, strict=False):
            known[name] = made[name] = output
    (logits,) = outputs
    found = {}
    arriving: dict[str, Tensor] = {}
    for partition in reversed(program.partitions):
        mine = [boundary for boundary in program.boundaries if boundary.producer == partition.index]
        if partition.index == len(program.partitions) - 1:
            roots, sides = [logits], None
            gradients = list(torch.autograd.grad(cross_entropy(logits, Y), logits))
        else:
            names = [name for boundary in mine for name in boundary.values]
            roots = [made[name] for name in names]
            targets = [arriving[name] for name in names]
            answers = [
                answer.detach().expand_as(made[name]) / len(x)
                for boundary in mine
                for name, answer in zip(
                    boundary.values, answers_of(program.interfaces[boundary.index].estimator), strict=True
                )
            ]
            others = {n for p in program.partitions if p is not partition for n in p.uses}
            own = [named[name] for name in partition.uses if name not in others]
            sides = [torch.autograd.grad(roots, own, side, retain_graph=True) for side in (answers, targets)]
            rows = [torch.cat([each.flatten() for each in side]) for side in sides]
            found[mine[0].name] = float(cosine_similarity(rows[0], rows[1], dim=0))
            gradients = targets if true else answers
        leaves = {n.partition("@")[0]: v for n, v in made.items() if n.endswith(f"@{partition.index}")}
        sent = torch.autograd.grad(roots, list(leaves.values()), gradients, retain_graph=True) if leaves else ()
        for name, each in zip(leaves, sent, strict=True):
            arriving[name] = arriving.get(name, torch.zeros_like(each)) + each
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_plain_autograd_gives_in_steps_probes_and_loops(case: str) -> None:
    net, x = made(case)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    torch.manual_seed(3)
    wanted = by_hand(net, x, true=False)
    torch.manual_seed(3)
    true = by_hand(net, x, true=True)
    torch.manual_seed(3)
    probe = trainer.probe(x, target=Y)
    assert {name: float(found["parameter_cosine"]) for name, found in probe.true.items()} == pytest.approx(true)
    assert {name: float(found["parameter_cosine"]) for name, found in probe.bootstrapped.items()} == pytest.approx(
        wanted
    )
    for scale in (1.0, 1024.0):
        net.diagnosing, net.loss_scale = True, scale
        torch.manual_seed(3)
        twin = copy.deepcopy(net)
        torch.autograd.backward(scale * cross_entropy(twin(x), Y))
        loop = twin.diagnostics()
        assert {name: loop[f"{name}/parameter_cosine"] for name in wanted} == pytest.approx(wanted)
    net.loss_scale = 1.0
    torch.manual_seed(3)
    step = trainer.step(x, target=Y, diagnose=True).diagnostics
    assert {name: float(found["parameter_cosine"]) for name, found in step.items()} == pytest.approx(wanted)
    assert net.diagnostics() == pytest.approx(loop)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["sequential", "backprop"])
def test_to_look_changes_nothing(case: str, schedule: str) -> None:
    steps = []
    for diagnose in (False, True):
        net, x = made(case)
        trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.05), schedule)
        torch.manual_seed(5)
        for _ in range(3):
            trainer.step(x, target=Y, diagnose=diagnose)
        steps.append(net.state_dict())
    loops = []
    for diagnosing in (False, True):
        net, x = made(case)
        net.diagnosing = diagnosing
        torch.manual_seed(5)
        torch.autograd.backward(cross_entropy(net(x), Y))
        loops.append({name: each.grad for name, each in net.named_parameters()})
    for one, other in (steps, loops):
        for name, value in one.items():
            twin = other[name]
            assert (value is None) == (twin is None)
            assert value is None or twin is None or torch.equal(value, twin), name


@pytest.mark.parametrize("case", CASES)
def test_with_the_oracle_both_cosines_are_1(case: str) -> None:
    net, x = made(case, "oracle")
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    probe = trainer.probe(x, target=Y)
    for found in (trainer.step(x, target=Y, diagnose=True).diagnostics, probe.true, probe.bootstrapped):
        assert set(found) == {boundary.name for boundary in net.boundaries}
        for numbers in found.values():
            assert float(numbers["cosine"]) == pytest.approx(1)
            assert float(numbers["parameter_cosine"]) == pytest.approx(1)


def test_figures_are_flat_and_are_asked_for() -> None:
    net, x = made("vectors", "synthetic")
    with pytest.raises(StateError, match=r"net\.diagnosing = True"):
        net.diagnostics()
    net.diagnosing = True
    assert net.diagnostics() == {}
    torch.autograd.backward(cross_entropy(net(x), Y))
    found = net.diagnostics("train/")
    keys = "cosine parameter_cosine relative_error wrong_signs estimate_norm target_norm estimator_loss".split()
    assert set(found) == {f"train/{name}/{key}" for name in ("2", "5") for key in keys}
    assert all(type(value) is float for value in found.values())
    assert found["train/2/estimate_norm"] == 0
    assert found["train/2/estimator_loss"] == pytest.approx(found["train/2/target_norm"] ** 2)


class Checkpointed(nn.Module):
    """Its first layer is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(torch.relu(checkpoint(self.first, x, use_reentrant=False)))
        return answer


def test_what_is_computed_again_has_no_parameter_cosine() -> None:
    x = torch.randn(8, 4)
    net = dnifx.decouple(Checkpointed(), "first", args=(x,), gradient=Constant, loss=cross_entropy)
    found = net.trainer(torch.optim.SGD).step(x, target=Y, diagnose=True).diagnostics["first"]
    assert "cosine" in found
    assert "parameter_cosine" not in found
