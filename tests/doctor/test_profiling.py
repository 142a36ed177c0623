"""Measured costs: every action of a step has one, and the net stays as it is."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dnifx
from dnifx import doctor, schedules
from dnifx.api import step_source
from dnifx.schedules.language import unplaced
from tests.doctor.nets import classifier, sgd, target

LABEL = {"context": "label", "num_classes": 3}
CHOICES: dict[str, dict[str, Any]] = {
    "synthetic": {},
    "label": LABEL,
    "zero": {"gradient": "zero"},
    "suffix": {"gradient": "suffix"},
    "critic": {"gradient": "critic", **LABEL},
    "local_loss": {"gradient": "local_loss", **LABEL},
    "oracle": {"gradient": "oracle"},
    "inputs": {"inputs": "synthetic"},
}
LATE = {"synthetic", "label", "zero", "suffix", "local_loss"}


def tensors(net: dnifx.DecoupledModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_action_has_a_cost_and_the_net_stays_as_it_is(choice: str) -> None:
    net = classifier(**CHOICES[choice])
    before, random = tensors(net), torch.get_rng_state()
    found = doctor.profile(net, sgd, target(), rounds=2)
    assert set(found.costs) == {str(unplaced(action)) for action in schedules.sequential(net.program).actions}
    assert all(cost >= 0 for cost in found.costs.values())
    assert found.costs["F0"] > 0
    assert found.costs["B2"] > 0
    assert found.beside >= 0
    assert found.step == pytest.approx(found.beside + sum(found.costs.values()))
    assert found.examples == 8
    assert all(torch.equal(value, before[name]) for name, value in tensors(net).items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_clock_changes_no_step(choice: str) -> None:
    nets, names = [classifier(**CHOICES[choice]) for _ in range(2)], list[str]()
    trainers = [net.trainer(sgd, lag=1 if choice in LATE else 0) for net in nets]
    functions = trainers[1].parts[0].functions
    functions.emitters = replace(functions.emitters, step=partial(step_source, clocked=True))
    functions.shared = {**functions.shared, "clock": names.append}
    for _ in range(3):
        for net, trainer in zip(nets, trainers, strict=True):
            torch.manual_seed(1)
            trainer.step(*net.program.args, target=target())
    assert all(torch.equal(value, tensors(nets[0])[name]) for name, value in tensors(nets[1]).items())
    step = trainers[1].source.at(3, nets[1].program)
    assert names == ["begin", *(str(unplaced(action)) for action in step.actions)] * 3


def test_optimizers_keep_as_much_as_in_a_run() -> None:
    net = classifier()
    found = doctor.profile(net, sgd, target(), rounds=1)
    momentum = {
        each.name: sum(dict(net.original.named_parameters())[name].nbytes for name in each.parameters)
        for each in net.partitions
    }
    assert {name: size for name, size in found.state_bytes.items() if name in momentum} == momentum


def test_a_part_of_the_batch_is_measured_as_backpropagation_of_it() -> None:
    net = classifier()
    found = doctor.profile(net, sgd, target(), examples=2, locked=True, rounds=1)
    assert found.examples == 2
    assert set(found.costs) == {str(unplaced(action)) for action in schedules.backprop(net.program, fit=False).actions}


def test_a_net_may_be_profiled_in_the_middle_of_a_run() -> None:
    net, twin = classifier(), copy.deepcopy(classifier())
    trainers = [each.trainer(sgd) for each in (net, twin)]
    for number in range(4):
        for each, trainer in zip((net, twin), trainers, strict=True):
            torch.manual_seed(number)
            trainer.step(*each.program.args, target=target())
        doctor.profile(net, sgd, target(), rounds=1)
    assert all(torch.equal(value, tensors(twin)[name]) for name, value in tensors(net).items())
