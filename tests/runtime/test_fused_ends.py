"""The loss and the output's error reach the estimators that need them, in the fused target as in the scheduled one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec, BPLambda, Critic, DirectFeedback, GradientEstimator
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.cases import Case, cases, decoupled
from tests.contracts.checks import close, same
from tests.contracts.running import loss_of, run_scheduled


class Foreseeing(GradientEstimator):
    """Answers from the values, and predicts the loss of each example from them too."""

    needs_loss = True

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7, dtype=spec.values[0].dtype))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        estimates = tuple(torch.tanh(value * self.slope) for value in values)
        return *estimates, estimates[0].reshape(len(estimates[0]), -1).sum(1)


class Echo(GradientEstimator):
    """Answers from the values and the sum of the output's error; not linear in it, so that its scale counts."""

    needs_error = True
    needs_target = False

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        if context is None:
            return tuple(torch.zeros_like(value) for value in values)
        errors = torch.tanh(context.reshape(len(context), -1).sum(1))
        return tuple(torch.tanh(value) * errors.reshape(-1, *[1] * (value.dim() - 1)) for value in values)


def check_both(case: Case, gradient: Callable[[BoundarySpec], nn.Module], told: bool) -> None:
    """Check that a step of the fused target gives the gradients of a step of the scheduled one."""
    net = decoupled(case, gradient)
    wanted = run_scheduled(case, net, case.inputs, case.target)
    again = decoupled(case, gradient)
    torch.manual_seed(0)
    output = again(*case.inputs, **({"target": case.target} if told and again.foresees else {}))
    loss = case.loss(output, case.target)
    torch.autograd.backward(loss)
    same(loss.detach(), loss_of(wanted))
    close({name: item.grad for name, item in again.original.named_parameters()}, wanted.gradients)
    fitted = nn.ModuleList(item.estimator for item in again.program.interfaces)
    found = {key.partition(".")[2]: item.grad for key, item in fitted.named_parameters()}
    assert len(wanted.fits) == 0 or found.keys() <= {"slope"}
    for parameter, fit in zip(fitted.parameters(), wanted.fits.values(), strict=True):
        close({"fit": parameter.grad}, {"fit": fit})


@settings(max_examples=15)
@given(case=cases(training=True))
def test_a_forward_that_knows_the_target_fits_predictions_of_the_loss(case: Case) -> None:
    check_both(case, Foreseeing, told=True)


@settings(max_examples=15)
@given(case=cases(training=True))
def test_the_error_reaches_every_boundary(case: Case) -> None:
    output = case.module()(*case.inputs)
    if not isinstance(output, Tensor) or not output.requires_grad:
        reject()
    check_both(case, Echo, told=False)


def per_example(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


def make_net(gradient: Any, **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    options = {"context": "label", "num_classes": 3, "loss": per_example, **options}
    return dnifx.decouple(model, ["1", "3"], args=(x,), gradient=gradient, **options), x, y


def test_a_forward_that_does_not_know_the_target_says_how_to_call_it() -> None:
    net, x, y = make_net(Critic())
    with pytest.raises(EstimatorError, match=r"net\(x, context=y, target=y\)"):
        net(x, context=y)
    blind, x, y = make_net(Critic(), loss=None)
    with pytest.raises(EstimatorError, match="decouple with loss="):
        blind(x, context=y, target=y)


def test_the_error_mixed_with_the_target_is_for_the_trainer() -> None:
    net, x, y = make_net(BPLambda(0.5, DirectFeedback()))
    with pytest.raises(EstimatorError, match=r"net\.trainer"):
        net(x, context=y)


class Curve(nn.Module):
    """Its only input is one number, so that no input says how many examples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 4), nn.Linear(4, 2)
        self.register_buffer("places", torch.linspace(-1, 1, 5)[:, None])

    def forward(self, scale: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(self.get_buffer("places") * scale)))
        return found


def test_where_no_input_has_examples_a_batch_counts_as_one() -> None:
    weights = []
    for scheduled in (False, True):
        torch.manual_seed(0)
        net = dnifx.decouple(Curve(), ["first"], args=(torch.tensor(0.7),), gradient="paper", loss=nn.MSELoss())
        for parameter in net.interface_parameters():
            nn.init.normal_(parameter)
        x, y = torch.tensor(0.5), torch.randn(5, 2)
        if scheduled:
            net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(x, target=y)
        else:
            nn.functional.mse_loss(net(x), y).backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        weights.append([each.detach() for each in net.original.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two)
