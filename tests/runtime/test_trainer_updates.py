"""How a trainer updates: its optimizers, clipping, accumulation, autocast, freezing, and schedulers that follow a measurement."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import dnifx
from dnifx.errors import OptimizerError, StateError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.passes.programs import mlp

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


@cache
def prototype() -> DecoupledModule:
    """Return a net whose estimators have begun to learn."""
    torch.manual_seed(0)
    model, gradient = mlp(6, 8, 8, 3).double(), dnifx.estimators.Synthetic(hidden=0)
    net = dnifx.decouple(model, ["1", "3"], args=(X.double(),), gradient=gradient, loss=F.cross_entropy)
    train(net.trainer(lambda p: SGD(p, lr=0.01)), 3)
    return net


def made() -> DecoupledModule:
    return copy.deepcopy(prototype())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return SGD(parameters, lr=0.1)


def train(trainer: Trainer, steps: int = 1) -> list[Tensor]:
    for _ in range(steps):
        trainer.step(X.double(), target=Y)
    return [each.detach().clone() for each in trainer.net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


STRAY = nn.Linear(2, 2)
BAD: Mapping[str, tuple[Any, str]] = {
    "other parameters": (lambda p: SGD(STRAY.parameters(), lr=1), r"other parameters than those of submod_0: it lacks"),
    "one too many": (lambda p: SGD([*p, *STRAY.parameters()], lr=1), r"it holds 2 that are not its own \(of 2\)"),
    "one left out": (lambda p: SGD(p[:1], lr=1), r"it lacks '0.bias' \(of 2\)"),
    "the whole model": (lambda p: SGD(prototype().parameters(), lr=1), r"that are not its own"),
    "a closure": (torch.optim.LBFGS, r"LBFGS for submod_0, whose step\(\) computes the loss again through a closure"),
    "a wrong rate": (lambda p: SGD(p, lr=-1), r"optimizer= failed for submod_0: ValueError: Invalid learning rate"),
    "no argument": (lambda: None, r"optimizer= failed for submod_0: TypeError"),
    "an instance": ({"submod_0": SGD(STRAY.parameters())}, r"does not cover its groups exactly"),
    "instances": (
        dict.fromkeys(("submod_0", "submod_1", "submod_2"), SGD(STRAY.parameters())),
        r"optimizer= gives SGD that is made already for submod_0; give a callable from parameters",
    ),
    "nothing": (lambda p: None, r"optimizer= gave NoneType for submod_0"),
    "an empty list": (lambda p: [], r"optimizer= gave list for submod_0"),
    "a list with others": (lambda p: [SGD(p[:1]), SGD(STRAY.parameters())], r"it lacks '0.bias' and holds 2"),
    "a list that overlaps": (lambda p: [SGD(p), SGD(p[:1])], r"it holds '0.weight' twice"),
    "a list with a closure": (lambda p: [SGD(p[:1]), torch.optim.LBFGS(p[1:])], r"through a closure"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("argument", ["optimizer", "estimator_optimizer"])
def test_an_optimizer_that_would_not_train_its_parameters_is_refused(case: str, argument: str) -> None:
    spec, text = BAD[case]
    if argument == "optimizer":
        with pytest.raises(OptimizerError, match=text):
            made().trainer(spec)
        return
    if isinstance(spec, Mapping):
        spec = {f"cut_{number}": each for number, each in zip((1, 3), spec.values(), strict=False)}
    with pytest.raises(OptimizerError, match="estimator_optimizer="):
        made().trainer(sgd, estimator_optimizer=spec)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (lambda each: None, r"lr_scheduler= gave NoneType for submod_0; give a callable from an optimizer"),
        (lambda each: LambdaLR(each, [abs] * 7), r"lr_scheduler= failed for submod_0"),
        (lambda: None, r"lr_scheduler= failed for submod_0: TypeError"),
        (3, r"lr_scheduler=3: give a callable"),
    ],
)
def test_a_scheduler_that_is_none_is_refused(spec: Any, text: str) -> None:
    with pytest.raises(OptimizerError, match=text):
        made().trainer(sgd, lr_scheduler=spec)


def test_a_factory_can_group_parameters_by_name() -> None:
    seen: dict[str, int] = {}

    def factory(parameters: Any) -> torch.optim.Optimizer:
        seen.update((name, each.dim()) for name, each in parameters.named)
        weights = [each for name, each in parameters.named if "bias" not in name]
        biases = [each for name, each in parameters.named if "bias" in name]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
        return AdamW(groups, lr=0.1)

    trainer = made().trainer(factory)
    assert {"0.weight": 2, "0.bias": 1, "4.bias": 1}.items() <= seen.items()
    assert all(name in dict(trainer.net.named_parameters()) for name in seen)
    assert [group["weight_decay"] for group in trainer.optimizers["submod_0"].param_groups] == [0.01, 0.0]
    train(trainer)


def test_a_factory_can_keep_names() -> None:
    trainer = made().trainer(lambda parameters: Adam(parameters.named))
    assert trainer.optimizers["submod_0"].param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    train(trainer)


def halves(kind: Callable[..., torch.optim.Optimizer]) -> Callable[[Any], Any]:
    def factory(parameters: Any) -> list[torch.optim.Optimizer]:
        groups = [[each for each in parameters if each.dim() > 1], [each for each in parameters if each.dim() < 2]]
        return [kind(group, lr=0.05) for group in groups if group]

    return factory


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_several_optimizers_of_a_partition_are_as_one(kind: Any) -> None:
    several = made().trainer(halves(kind), lr_scheduler=lambda each: LambdaLR(each, lambda step: 0.5**step))
    single = made().trainer(
        lambda p: kind(p, lr=0.05), lr_scheduler=lambda each: LambdaLR(each, lambda step: 0.5**step)
    )
    assert same(train(several, 3), train(single, 3))
    again = made().trainer(halves(kind), lr_scheduler=lambda each: LambdaLR(each, lambda step: 0.5**step))
    again.load_state_dict(several.state_dict())
    assert same(train(again, 2), train(single, 2))
    assert "OptimizerSet" in repr(several.optimizers["submod_0"])


def test_clipping_bounds_the_gradient_of_each_partition() -> None:
    norms: dict[int, float] = {}

    def record(parameters: list[nn.Parameter]) -> None:
        norms[len(norms)] = float(nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))

    plain = train(made().trainer(sgd, clip=record))
    assert len(norms) == 3, "each partition, and no estimator"
    bound = sorted(norms.values())[1]
    before = [each.detach().clone() for each in made().parameters()]
    clipped = train(made().trainer(sgd, clip=bound))
    number = 0
    for partition in prototype().partitions:
        places = [place for place, (name, _) in enumerate(made().named_parameters()) if name in partition.parameters]
        factor = min(1.0, bound / (norms[number] + 1e-6)) if places and partition.parameters else 1.0
        for place in places:
            moved = (plain[place] - before[place]) * factor
            torch.testing.assert_close(clipped[place] - before[place], moved, rtol=1e-9, atol=1e-12)
        number += bool(partition.parameters)


@settings(max_examples=8)
@given(count=st.sampled_from([2, 4, 8]), kind=st.sampled_from([SGD, Adam]), rounds=st.integers(1, 3))
def test_steps_that_are_accumulated_are_one_step_of_a_big_batch(count: int, kind: Any, rounds: int) -> None:
    small, big = (made().trainer(lambda p: kind(p, lr=0.05), accumulate=k) for k in (count, 1))
    for _ in range(rounds):
        for x, y in zip(X.double().chunk(count), Y.chunk(count), strict=True):
            small.step(x, target=y)
        big.step(X.double(), target=Y)
        for one, other in zip(small.net.parameters(), big.net.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_accumulated_steps_are_saved_and_schedulers_wait_for_the_update() -> None:
    def trainer() -> Trainer:
        return made().trainer(sgd, accumulate=3, lr_scheduler=lambda each: LambdaLR(each, lambda step: 0.5**step))

    whole, first, second = trainer(), trainer(), trainer()
    train(whole, 3)
    assert whole.optimizers["submod_0"].param_groups[0]["lr"] == 0.05
    train(whole, 4)
    train(first, 5)
    second.load_state_dict(first.state_dict())
    assert same(train(second, 2), [each.detach() for each in whole.net.parameters()])
    with pytest.raises(StateError, match=r"accumulate=1"):
        made().trainer(sgd, lr_scheduler=lambda each: LambdaLR(each, lambda step: 0.5**step)).load_state_dict(
            first.state_dict()
        )


@pytest.mark.parametrize(("options", "text"), [({"accumulate": 0}, "accumulate=0"), ({"accumulate": 1.5}, "1.5")])
@pytest.mark.parametrize("more", [{}, {"clip": 1.0}])
def test_what_cannot_be_accumulated_is_refused(options: Any, text: str, more: Any) -> None:
    with pytest.raises(OptimizerError, match=text):
        made().trainer(sgd, **options, **more)


@pytest.mark.parametrize("clip", [0, -1.0, "norm", True, float("nan")])
def test_what_cannot_clip_is_refused(clip: Any) -> None:
    with pytest.raises(OptimizerError, match=r"clip="):
        made().trainer(sgd, clip=clip)


def test_a_step_runs_under_autocast() -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(mlp(6, 16, 16, 3), ["1", "3"], args=(X,), loss=F.cross_entropy, gradient="paper")
    trainer = net.trainer(lambda p: Adam(p, lr=0.01))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [trainer.step(X, target=Y) for _ in range(60)]
    assert results[0].output.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in net.parameters())
    first, last = results[0].loss, results[-1].loss
    assert first is not None
    assert last is not None
    assert last < 0.5 * first


PARTIAL = dnifx.schedules.fixed(dnifx.schedules.parse("F0 S0 B0 U0 F1 S1 B1 U1 F2 B2 U2"), partial=True)
SCHEDULES = ("sequential", "backprop", "random_order{p=0.3,seed=1}", PARTIAL)


@settings(max_examples=10)
@given(
    frozen=st.sets(st.sampled_from(["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]), min_size=1),
    schedule=st.sampled_from(SCHEDULES),
)
def test_what_is_frozen_in_the_middle_stays_and_the_rest_learns_on(frozen: set[str], schedule: Any) -> None:
    trainer, reference = made().trainer(sgd, schedule), made().trainer(sgd, schedule)
    train(trainer)
    train(reference)
    kept = {name: each.detach().clone() for name, each in reference.net.named_parameters() if name in frozen}
    for name in frozen:
        trainer.net.get_parameter(name).requires_grad_(False)
    for _ in range(2):
        train(trainer)
        train(reference)
        with torch.no_grad():
            for name, value in kept.items():
                reference.net.get_parameter(name).copy_(value)
    assert same(train(trainer, 0), train(reference, 0))
    trainer.probe(X.double(), target=Y)
    for name in frozen:
        trainer.net.get_parameter(name).requires_grad_(True)
    assert same(train(trainer, 2), train(reference, 2)), "unfrozen again, it learns again"


def test_an_estimator_that_is_frozen_is_refused_with_the_remedy() -> None:
    trainer = made().trainer(sgd)
    train(trainer)
    for each in trainer.net.interface_parameters():
        each.requires_grad_(False)
    with pytest.raises(StateError, match=r"the estimators of '1', '3' were frozen .* a schedule without their fits"):
        train(trainer)


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=1)


def test_a_scheduler_that_follows_a_measurement_is_given_the_loss_or_the_metric() -> None:
    trainer = made().trainer(sgd, lr_scheduler=plateau)
    rates, metrics = [], [1.0, 0.5, 0.5, 0.5, 0.5, 0.4]
    reference = plateau(SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    for metric in metrics:
        trainer.step(X.double(), target=Y, metric=metric)
        reference.step(metric)
        rates.append(trainer.optimizers["submod_1"].param_groups[0]["lr"])
        assert rates[-1] == reference.optimizer.param_groups[0]["lr"]
    assert rates[0] > rates[-1]
    by_loss = made().trainer(sgd, lr_scheduler=plateau)
    loss = by_loss.step(X.double(), target=Y).loss
    assert loss is not None
    assert by_loss.lr_schedulers["submod_0"].state_dict()["best"] == loss
