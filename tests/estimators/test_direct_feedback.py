"""Direct feedback alignment: a fixed random projection of the output's error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import schedules
from dnifx.errors import EstimatorError, ScheduleError
from dnifx.estimators import DirectFeedback
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.schedules import Lock


def make_net(mean: bool = True, **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    loss = nn.CrossEntropyLoss(reduction="mean" if mean else "sum")
    return dnifx.decouple(model, ["1", "3"], args=(x,), gradient=DirectFeedback(), loss=loss, **options), x, y


@pytest.mark.parametrize("mean", [True, False])
def test_a_layer_learns_from_the_projected_error(mean: bool) -> None:
    net, x, y = make_net(mean)
    before = net.original.get_parameter("0.weight").detach().clone()
    value = torch.tanh(net.original.get_submodule("0")(x))
    output = net.original(x)
    error = output.softmax(1) - torch.eye(3)[y]
    matrix = net.program.interfaces[0].estimator.get_buffer("matrix_0")
    weight = net.original.get_parameter("0.weight")
    scale = 1 / len(x) if mean else 1.0
    (wanted,) = torch.autograd.grad(value, weight, (error.detach() @ matrix) * scale)
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
    torch.testing.assert_close(before - weight.detach(), wanted)


def test_the_matrix_is_fixed_drawn_from_the_seed_and_another_elsewhere() -> None:
    (net, x, y), (again, _, _) = make_net(), make_net()
    matrices = [item.estimator.get_buffer("matrix_0") for item in net.program.interfaces]
    kept = [matrix.clone() for matrix in matrices]
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for _ in range(3):
        trainer.step(x, target=y)
    assert all(torch.equal(one, two) for one, two in zip(matrices, kept, strict=True))
    assert torch.equal(again.program.interfaces[0].estimator.get_buffer("matrix_0"), kept[0])
    assert not torch.equal(kept[0][0, :5], kept[1][0])
    assert kept[0].abs().max() <= 3**-0.5


def test_the_update_lock_stays_and_the_backward_lock_is_gone() -> None:
    program = make_net()[0].program
    schedule = schedules.sequential(program)
    order = str(schedule).split()
    assert order.index("F2") < order.index("S0") < order.index("B0")
    assert "T0" not in order
    assert schedules.locks(schedule, program)[0] == frozenset({Lock.UPDATE})
    with pytest.raises(ScheduleError, match="F2"):
        schedules.validate(schedules.parse("F0 S0 B0 U0 F1 F2 S1 B1 U1 B2 U2"), program)


def test_a_step_without_output_leaves_its_producer_idle() -> None:
    net, x, y = make_net(inputs="synthetic")
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), schedules.unlocked(0.5))
    idle = 0
    for _ in range(20):
        before = net.original.get_parameter("0.weight").detach().clone()
        result = trainer.step(x, target=y)
        if result.loss is None:
            idle += 1
            assert torch.equal(before, net.original.get_parameter("0.weight"))
    assert 0 < idle < 20


def test_layers_come_to_align_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(256, 8)
    y = x[:, :3].argmax(1)
    net = dnifx.decouple(model, ["1", "3"], args=(x,), gradient="direct_feedback", loss=cross_entropy)
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    results = [trainer.step(x, target=y, diagnose=True) for _ in range(100)]
    assert results[-1].diagnostics["3"]["cosine"] > results[0].diagnostics["3"]["cosine"] + 0.3


def test_it_refuses_an_output_of_several_tensors() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.second(self.first(x))
            return found, found.exp()

    with pytest.raises(EstimatorError, match="one tensor"):
        dnifx.decouple(Pair(), ["first"], args=(torch.randn(5, 4),), gradient="direct_feedback")
    with pytest.raises(EstimatorError, match="above 0"):
        DirectFeedback(scale=0)
