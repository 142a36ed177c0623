"""Train a model by itself and decoupled, in both targets, with the true gradient at every cut: what several tests share."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dnifx

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[tuple[Any, ...], Any]
"""The positional arguments of a call, and the target."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def trained(model: nn.Module, run: Callable[..., Any], batches: Sequence[Batch], loss: Loss) -> dict[str, Tensor]:
    """Train in an ordinary loop; return the model's state."""
    optimizer = sgd(model.parameters())
    for args, target in batches:
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss(run(*args), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def trains_like_the_model(
    make: Callable[[], nn.Module], cuts: Any, batches: Sequence[Batch], loss: Loss, **options: Any
) -> dnifx.DecoupledModule:
    """See that fused and scheduled training are those of the model, in float64; return the fused net.

    Args:
        make: Makes the model.
        cuts: Where it is cut.
        batches: The batches of the training steps; the first is the example.
        loss: The loss.
        options: More arguments of ``dnifx.decouple``.
    """
    torch.manual_seed(0)
    first = make().double()
    model, fused, scheduled = first, make().double(), make().double()
    for other in (fused, scheduled):
        other.load_state_dict(first.state_dict())
    args = copy.copy(batches[0][0])
    net = dnifx.decouple(fused, cuts, args=args, gradient="oracle", **options)
    trainer = dnifx.decouple(scheduled, cuts, args=args, loss=loss, gradient="oracle", **options).trainer(sgd)
    assert len(net.partitions) > 1
    found = {"fused": trained(fused, net, batches, loss)}
    for given, target in batches:
        torch.manual_seed(1)
        trainer.step(*given, target=target)
    found["scheduled"] = scheduled.state_dict()
    wanted = trained(model, model, batches, loss)
    for name, state in found.items():
        for path, value in wanted.items():
            torch.testing.assert_close(state[path], value, rtol=1e-9, atol=1e-11, msg=f"{name}: {path}")
    return net
