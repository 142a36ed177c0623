"""Run a net in both targets, for one step or several, and keep all that it gives."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.cases import Case, estimator_parameters, random_state

TARGETS = ("fused", "scheduled")
"""The two ways to run a decoupled model."""


class Recorder(torch.optim.Optimizer):
    """An optimizer that changes nothing and keeps the gradients that it was asked to apply."""

    def __init__(self, parameters: Iterable[Tensor], kept: dict[int, Tensor | None]) -> None:
        super().__init__(parameters, {})
        self.kept = kept

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in self.kept, "a parameter was updated twice in one step"
                self.kept[id(parameter)] = None if parameter.grad is None else parameter.grad.clone()


@dataclass(frozen=True)
class Result:
    """What a target gave: loss, output, gradients by parameter path, and the estimators' own gradients."""

    loss: Tensor
    output: object
    gradients: dict[str, Tensor | None]
    fits: dict[str, Tensor | None]
    random: Tensor


def run(case: Case, net: DecoupledModule, target: str, inputs: tuple[Tensor, ...] | None = None) -> Result:
    """Run one step of a net in one of the two targets, from the same random state."""
    given = case.inputs if inputs is None else inputs
    goal = case.target if inputs is None else case.target.repeat(len(inputs[0]) // case.batch)
    return (run_fused if target == "fused" else run_scheduled)(case, net, given, goal)


def loss_of(result: Any) -> Tensor:
    assert isinstance(result.loss, Tensor)
    return result.loss.detach()


def run_fused(case: Case, net: DecoupledModule, inputs: tuple[Tensor, ...], goal: Tensor) -> Result:
    net.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = net(*inputs)
    random = random_state(case)
    loss = case.loss(output, goal)
    torch.autograd.backward(loss)
    gradients = {name: item.grad for name, item in net.original.named_parameters() if item.requires_grad}
    fits = {name: item.grad for name, item in estimator_parameters(net).items()}
    return Result(loss.detach(), output, gradients, fits, random)


def run_scheduled(case: Case, net: DecoupledModule, inputs: tuple[Tensor, ...], goal: Tensor) -> Result:
    kept: dict[int, Tensor | None] = {}
    trainer = net.trainer(lambda parameters: Recorder(parameters, kept))
    torch.manual_seed(0)
    result = trainer.step(*inputs, target=goal)
    left = [name for name, item in net.named_parameters() if item.grad is not None and item.grad.any()]
    assert not left, f"the step leaves gradients behind on {left}"
    gradients = {name: kept.get(id(item)) for name, item in net.original.named_parameters() if item.requires_grad}
    fits = {name: kept.get(id(item)) for name, item in estimator_parameters(net).items()}
    return Result(loss_of(result), result.output, gradients, fits, random_state(case))


def descend(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def steps_fused(case: Case, net: DecoupledModule, steps: int) -> list[dict[str, Tensor]]:
    """Train a fused net in a plain loop and return its state after each step."""
    own = [item for item in net.original.parameters() if item.requires_grad]
    optimizers = [descend(group) for group in (own, list(estimator_parameters(net).values())) if group]
    states = []
    for number in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(number)
        torch.autograd.backward(case.loss(net(*case.inputs), case.target))
        for optimizer in optimizers:
            optimizer.step()
        states.append(state_of(net))
    return states


def steps_scheduled(case: Case, net: DecoupledModule, steps: int) -> list[dict[str, Tensor]]:
    """Train a net by its schedule and return its state after each step."""
    trainer = net.trainer(descend)
    states = []
    for number in range(steps):
        torch.manual_seed(number)
        trainer.step(*case.inputs, target=case.target)
        states.append(state_of(net))
    return states


def state_of(net: DecoupledModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def train(case: Case, trainer: Any, numbers: Iterable[int]) -> None:
    for number in numbers:
        torch.manual_seed(number)
        trainer.step(*case.inputs, target=case.target)


def deep_clone(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, value)
