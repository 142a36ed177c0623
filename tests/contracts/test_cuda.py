"""The contracts on a GPU; a half-precision region; a fused step captured in one CUDA graph."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts import checks
from tests.contracts.cases import Case, cases
from tests.contracts.running import TARGETS, loss_of

pytestmark = pytest.mark.cuda


def on_gpu(case: Case) -> Case:
    return replace(case, device="cuda")


@settings(max_examples=20)
@given(cases())
def test_the_forward_is_the_originals(case: Case) -> None:
    checks.check_forward(on_gpu(case))


@settings(max_examples=20)
@given(cases(training=True))
def test_the_scheduled_forward_is_the_originals(case: Case) -> None:
    checks.check_scheduled_forward(on_gpu(case))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(case=cases(training=True))
def test_the_oracle_gives_backprop(target: str, case: Case) -> None:
    checks.check_oracle(on_gpu(case), target)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(case=cases(training=True))
def test_a_partition_learns_from_its_synthetic_gradient_alone(target: str, case: Case) -> None:
    checks.check_isolated(on_gpu(case), target)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(case=cases(training=True))
def test_an_estimator_is_fitted_to_the_sum_over_its_consumers(target: str, case: Case) -> None:
    checks.check_targets(on_gpu(case), target)


@settings(max_examples=20)
@given(cases(training=True))
def test_both_targets_agree_step_after_step(case: Case) -> None:
    checks.check_targets_agree(on_gpu(case))


def make_net() -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    model = model.cuda()
    return dnifx.decouple(
        model,
        ["2", "4"],
        args=(torch.randn(64, 32, device="cuda"),),
        loss=cross_entropy,
        context="label",
        num_classes=4,
    )


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(64, 32, device="cuda", generator=generator)
    return x, x[:, :4].argmax(1)


def test_estimators_live_where_the_model_does() -> None:
    assert {item.device.type for item in make_net().parameters()} == {"cuda"}


def test_it_learns_under_autocast_to_bfloat16_in_both_targets() -> None:
    x, labels = make_batch()
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            output = net(x, context=labels)
            loss = cross_entropy(output, labels)
        assert output.dtype is torch.bfloat16
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(item.dtype is torch.float32 for item in net.parameters())
    trainer = make_net().trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    with torch.autocast("cuda", torch.bfloat16):
        scheduled = [loss_of(trainer.step(x, target=labels)).item() for _ in range(60)]
    assert scheduled[-1] < 0.5 * scheduled[0]


def one_step(net: DecoupledModule, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = cross_entropy(net(x, context=labels), labels)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss


def test_a_fused_step_is_captured_in_one_cuda_graph() -> None:
    x, labels = make_batch()
    captured, plain = make_net(), make_net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (captured, plain)]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one_step(captured, optimizers[0], x, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step(captured, optimizers[0], x, labels)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(3 + 5):
        one_step(plain, optimizers[1], x, labels)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
