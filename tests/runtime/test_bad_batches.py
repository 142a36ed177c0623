"""One bad batch: what is not finite is not applied, and a penalty reaches every partition."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import dnifx
from dnifx.errors import LossError, OptimizerError
from dnifx.estimators import Synthetic
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted import finite
from dnifx.runtime.training import updates

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
BROKEN = X.clone()
BROKEN[3, 1] = float("nan")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, capturable=False),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


def made(**options: Any) -> DecoupledModule:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)]
    given: dict[str, Any] = {"gradient": Synthetic(batch_norm=True), "loss": cross_entropy, **options}
    return dnifx.decouple(nn.Sequential(*layers, nn.Linear(4, 3)), ["0", "1", "2"], args=(X,), **given)


def state(net: nn.Module, trainer: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {"net": net.state_dict(), "optimizers": [each.state_dict() for each in trainer.optimizers.values()]}
    )


def equal(one: Any, two: Any) -> bool:
    leaves, spec = torch.utils._pytree.tree_flatten(one)
    others, other = torch.utils._pytree.tree_flatten(two)
    same = (torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True))
    return spec == other and all(same)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_that_is_not_finite_changes_nothing_and_the_error_says_so(optimizer: str) -> None:
    net = made()
    trainer = net.trainer(OPTIMIZERS[optimizer])
    trainer.step(X, target=Y)
    before = state(net, trainer)
    with pytest.raises(LossError, match=r"gradient of submod_0 is not finite.*on_nonfinite='skip'") as caught:
        trainer.step(BROKEN, target=Y)
    assert "before it had updated anything" in caught.value.__notes__[0]
    assert equal(state(net, trainer), before)
    trainer.step(X, target=Y)
    assert not equal(state(net, trainer), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipping_goes_on_as_if_the_batch_had_not_been(optimizer: str) -> None:
    one, two = made(), made()
    first, second = (net.trainer(OPTIMIZERS[optimizer], on_nonfinite="skip") for net in (one, two))
    for batch in (X, BROKEN, -X):
        found = first.step(batch, target=Y)
        assert len(found.skipped) == (7 if batch is BROKEN else 0)
    for batch in (X, -X):
        second.step(batch, target=Y)
    assert equal(state(one, first), state(two, second))


def test_what_was_finite_before_the_fault_is_updated_and_named() -> None:
    net = made(loss=lambda output, target: mse_loss(output, target))
    trainer = net.trainer(OPTIMIZERS["adam"])
    with pytest.raises(LossError, match="the loss of step 0 is inf") as caught:
        trainer.step(X, target=torch.full((8, 3), 1e30))
    assert "Updated: submod_0, the estimator of '0', submod_1" in caught.value.__notes__[0]
    assert "Not updated: submod_3" in caught.value.__notes__[0]
    assert all(bool(each.isfinite().all()) for each in net.state_dict().values())


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let the host not know, as where it does not wait for a device."""

    def not_finite(gradients: list[Tensor]) -> Tensor:
        return ~torch.stack([each.isfinite().all() for each in gradients]).all()

    patch.setattr(updates, "not_finite", not_finite)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_device_that_is_not_waited_for_leaves_the_update_out(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    net = made()
    trainer = net.trainer(OPTIMIZERS[optimizer], on_nonfinite="skip")
    trainer.step(X, target=Y)
    before = state(net, trainer)
    result = trainer.step(BROKEN, target=Y)
    assert all(isinstance(flag, Tensor) and bool(flag) for flag in result.skipped.values())
    assert len(result.skipped) == 7
    after = state(net, trainer)
    assert equal(after["net"], before["net"])
    assert equal(after["optimizers"], before["optimizers"])
    assert not any(map(bool, trainer.step(X, target=Y).skipped.values()))
    assert not equal(state(net, trainer)["net"], before["net"])


class Carrying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRUCell(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.readout(state), state


@pytest.mark.parametrize("waits", [True, False])
def test_a_carried_state_stays_what_it_was(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not waits:
        as_on_a_gpu(monkeypatch)
    cut = dnifx.Recurrent("state", "1")
    net = dnifx.decouple(
        Carrying(), cut, args=(X, torch.zeros(8, 5)), loss=lambda output, target: cross_entropy(output, target)
    )
    trainer = net.trainer(OPTIMIZERS["sgd"], on_nonfinite="skip")
    trainer.step(X, target=Y)
    window = trainer.parts[0].window
    before = [each.clone() for each in torch.utils._pytree.tree_leaves(window.states)]
    trainer.step(BROKEN, target=Y)
    assert all(map(torch.equal, torch.utils._pytree.tree_leaves(window.states), before))
    trainer.step(X, target=Y)
    assert not all(map(torch.equal, torch.utils._pytree.tree_leaves(window.states), before))


def test_a_micro_batch_that_is_not_finite_is_not_added_up() -> None:
    net = made(gradient="zero")
    trainer = net.trainer(OPTIMIZERS["sgd"], on_nonfinite="skip", accumulate=2)
    trainer.step(X, target=Y)
    trainer.step(BROKEN, target=Y)
    assert all(bool(each.isfinite().all()) for each in net.state_dict().values())


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(OptimizerError, match="give 'raise' or 'skip'"):
        made().trainer(OPTIMIZERS["sgd"], on_nonfinite="ignore")  # type: ignore[arg-type]


def squares(parameters: Any) -> Tensor:
    total = torch.zeros(())
    for each in parameters:
        total = total + each.square().sum()
    return 0.1 * total


LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "all weights": lambda model: squares(model.parameters()),
    "one weight": lambda model: model.get_submodule("0.0").weight.norm(),  # type: ignore[operator, union-attr]
    "orthogonality": lambda model: (model.get_parameter("1.0.weight") @ model.get_parameter("1.0.weight").T).sum(),
}


@pytest.mark.parametrize("penalty", LOSSES)
def test_a_loss_that_reads_weights_of_other_partitions_is_refused(penalty: str) -> None:
    torch.manual_seed(0)
    net = made()
    own = net.original

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + LOSSES[penalty](own)

    refused = dnifx.decouple(own, ["0", "1", "2"], args=(X,), loss=loss)
    with pytest.raises(LossError, match=r"penalty inside loss= would train the last partition alone.*penalty="):
        refused.trainer(OPTIMIZERS["sgd"]).step(X, target=Y)


def test_a_penalty_that_begins_later_is_refused_too() -> None:
    steps: list[int] = []
    net = made()
    own = net.original

    def loss(output: Tensor, target: Tensor) -> Tensor:
        steps.append(1)
        return cross_entropy(output, target) + (squares(own.parameters()) if len(steps) > 8 else 0)

    trainer = dnifx.decouple(own, ["0"], args=(X,), loss=loss).trainer(OPTIMIZERS["sgd"])
    for _ in range(5):
        trainer.step(X, target=Y)
    with pytest.raises(LossError, match="penalty="):
        assert not [trainer.step(X, target=Y) for _ in range(15)]


def test_a_loss_may_read_the_weights_of_the_last_partition() -> None:
    net = made()
    last = net.get_submodule("3")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + squares(last.parameters())

    dnifx.decouple(net.original, ["0"], args=(X,), loss=loss).trainer(OPTIMIZERS["sgd"]).step(X, target=Y)


def test_a_penalty_trains_every_partition_as_the_fused_net_would() -> None:
    scheduled, fused = made(gradient="zero"), made(gradient="zero")
    seen: list[set[str]] = []

    def penalty(parameters: Any) -> Tensor:
        seen.append(set(parameters))
        return squares(parameters.values())

    trainer = scheduled.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), penalty=penalty)
    optimizer = torch.optim.SGD(fused.model_parameters(), lr=0.1)
    for _ in range(3):
        trainer.step(X, target=Y)
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(fused(X), Y) + squares(fused.model_parameters()))
        optimizer.step()
    assert seen[0] == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(scheduled.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(
    "wrong", [0.1, lambda parameters: 0.1, lambda parameters: torch.ones(2), lambda parameters: torch.ones(())]
)
def test_what_is_no_penalty_is_refused(wrong: Any) -> None:
    with pytest.raises((OptimizerError, LossError), match="penalty="):
        made().trainer(OPTIMIZERS["sgd"], penalty=wrong).step(X, target=Y)


def test_the_undoing_of_an_update_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite.Statistics, "end", lambda self, refused, otherwise: None)
    with pytest.raises(AssertionError):
        test_a_batch_that_is_not_finite_changes_nothing_and_the_error_says_so("adam")
