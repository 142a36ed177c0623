"""The fused target in other people's loops: plain, compiled, in several processes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dnifx
from dnifx.estimators import Critic, LocalLoss, Sobolev
from dnifx.runtime.decoupled import DecoupledModule
from tests.engines.pool import Pool


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    )


def make_net(**options: Any) -> DecoupledModule:
    model = make_model()
    return dnifx.decouple(model, ["2", "5"], args=(torch.randn(16, 6),), loss=cross_entropy, **options)


def make_data(examples: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train(
    net: Callable[..., Tensor], parameters: Any, steps: int, make_optimizer: Any = adam, **context: Any
) -> list[float]:
    inputs, labels = make_data()
    optimizer = make_optimizer(parameters)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(inputs, **dict.fromkeys(context, labels)), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options", [{"gradient": "paper"}, {"context": "label", "num_classes": 3}, {"gradient": "oracle"}]
)
def test_it_learns_in_a_plain_loop(options: dict[str, Any]) -> None:
    net = make_net(**options)
    given = {"context": True} if "context" in options else {}
    losses = train(net, net.parameters(), 80, **given)
    assert losses[-1] < 0.7 * losses[0]


def test_without_gradients_across_the_cuts_it_learns_less() -> None:
    nothing, synthetic = make_net(gradient="zero"), make_net(gradient="paper")
    first = nothing.get_submodule("0").weight
    assert isinstance(first, Tensor)
    before = first.detach().clone()
    without = train(nothing, nothing.parameters(), 80)
    assert torch.equal(first, before)
    assert train(synthetic, synthetic.parameters(), 80)[-1] < without[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_fused_net_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    plain, other = make_net(), make_net()
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    wanted, found = train(plain, plain.parameters(), 3, sgd), train(compiled, other.parameters(), 3, sgd)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


LABELLED: dict[str, Any] = {"context": "label", "num_classes": 3}
NAMES: dict[Any, Any] = {Critic(): {"context", "target"}, Sobolev(): {"context", "target"}, LocalLoss(): {"context"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("gradient", NAMES, ids=lambda choice: type(choice).__name__)
def test_an_estimator_with_a_loss_of_its_own_runs_beside_the_compiled_graphs(gradient: Any) -> None:
    torch._dynamo.reset()
    plain, other = (make_net(gradient=gradient, **LABELLED) for _ in range(2))
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    told = dict.fromkeys(NAMES[gradient], True)
    compiled = torch.compile(other, backend="aot_eager")
    wanted, found = (
        train(net, owner.parameters(), 3, sgd, **told) for net, owner in ((plain, plain), (compiled, other))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    whole = torch.compile(other, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the estimator differentiates a loss of its own"):
        train(whole, other.parameters(), 1, sgd, **told)


def replicated(net: DecoupledModule) -> Callable[..., Any]:
    """Return the net under DistributedDataParallel."""
    return DistributedDataParallel(net)


def sharded(net: DecoupledModule) -> Callable[..., Any]:
    """Shard layers of the model, then the net as a whole with its estimators (FSDP2)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net.get_submodule("0"), net.get_submodule("4")):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)  # type: ignore[return-value]


def sharded_within(net: DecoupledModule) -> Callable[..., Any]:
    """Shard a layer of an estimator by itself."""
    layer = next(
        each for name, each in net.named_modules() if name.startswith("interfaces.") and type(each) is nn.Linear
    )
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return sharded(net)


def train_on_a_part(spread: Callable[[DecoupledModule], Callable[..., Any]]) -> Any:
    """Train on every so-manieth example, with a net whose examples do not see each other; return its state."""
    rank, world = dist.get_rank(), dist.get_world_size()
    apart = spread is sharded_within
    net = make_plain_net("suffix" if apart else dnifx.estimators.Synthetic(hidden=0))
    parallel = spread(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs, labels = make_data(32)
    for _ in range(4):
        optimizer.zero_grad()
        own = labels[rank::world]
        given = {"target": own} if apart else {}
        torch.autograd.backward(cross_entropy(parallel(inputs[rank::world], **given), own))
        optimizer.step()
    whole = {name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in net.state_dict().items()}
    return {name: tensor.tolist() for name, tensor in whole.items()}


def make_plain_net(gradient: Any) -> DecoupledModule:
    """Return a net whose examples do not see each other: no batch norm, in the model or in the estimators."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return dnifx.decouple(model, ["1", "3"], args=(torch.randn(16, 6),), loss=cross_entropy, gradient=gradient)


@pytest.mark.parametrize("spread", [replicated, sharded])
def test_two_processes_train_as_one(pool: Pool, spread: Callable[[DecoupledModule], Callable[..., Any]]) -> None:
    states = pool.run(train_on_a_part, spread, count=2)
    assert states[0] == states[1]
    net = make_plain_net(dnifx.estimators.Synthetic(hidden=0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs, labels = make_data(32)
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(net(inputs), labels))
        optimizer.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(torch.tensor(states[0][name]), tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_an_estimator_whose_layers_are_sharded_apart_is_refused(pool: Pool) -> None:
    for each in pool.run(train_on_a_part, sharded_within, count=2):
        assert each.kind == "EstimatorError", each
        assert "a module inside of an estimator is sharded by itself (fully_shard)" in each.text
