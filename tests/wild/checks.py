"""Checks of decoupled random programs, compared with plain autograd."""

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import DnifxError, InputError
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import Recorder
from tests.real_models.model_checks import (
    Detached,
    Values,
    own_gradients,
    same_buffers,
    same_gradients,
    same_outputs,
    spread_loss,
)
from tests.wild.programs import Call, Wild, input_kinds

TOLERANCE = 1e-12
"""How far a gradient in float64 may be from backprop's, relative to the largest element of all."""


def decoupled(wild: Wild, gradient: str, verify: bool = True) -> DecoupledModule:
    """Decouple a program as it was drawn.

    Raises:
        DnifxError: The program is refused.
    """
    args, kwargs = wild.call()
    return dnifx.decouple(
        wild.build(), wild.cuts, args=args, kwargs=kwargs, gradient=gradient, loss=spread_loss, verify=verify
    )


def examine(wild: Wild, verify: bool = True) -> tuple[int, list[DnifxError]]:
    """Run every check, and return the number of boundaries and what was refused on the way.

    Args:
        wild: The program.
        verify: Whether capture verifies itself; without, the checks here are the only ones.

    Raises:
        DnifxError: The program is refused as a whole.
        AssertionError: Something silently wrong.
    """
    net = decoupled(wild, "oracle", verify)
    refusals: list[DnifxError] = []
    model = wild.build()
    for batch, masked in input_kinds(wild):
        for training in (wild.training, not wild.training):
            try:
                check_call(model.train(training), net.train(training), wild.call(batch, masked))
            except InputError as error:
                refusals.append(error)
                model.load_state_dict(net.original.state_dict())
    check_zero(wild, decoupled(wild, "zero", verify))
    return len(net.boundaries), refusals


def check_call(model: nn.Module, net: DecoupledModule, call: Call) -> None:
    """With the oracle, outputs, buffers, random state, gradients and what is written to inputs are the model's, in both targets."""
    for target in (fused, scheduled):
        given, own = copy.deepcopy(call), copy.deepcopy(call)
        wanted, gradients = plain(model, *own)
        random_after = torch.get_rng_state()
        found, other = target(net, *given)
        same_outputs(given, own)
        same_outputs(found, wanted)
        assert structure(found) == structure(wanted), f"the output is {structure(found)}, not {structure(wanted)}"
        assert torch.equal(torch.get_rng_state(), random_after), "other random numbers were drawn"
        same_buffers(net, model)
        same_gradients(other, gradients, TOLERANCE)


def structure(value: Any) -> Any:
    """Return an output with every tensor replaced by its shape."""
    if isinstance(value, dict):
        return {name: structure(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(structure, value))
    if is_dataclass(value):
        return structure(vars(value))
    return tuple(value.shape) if isinstance(value, Tensor) else value


def plain(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Values]:
    """Return a model's output and gradients by backprop."""
    model.zero_grad(set_to_none=True)
    torch.default_generator.manual_seed(1)
    output = model(*args, **kwargs)
    torch.autograd.backward(spread_loss(output, None))
    return output, own_gradients(model)


def fused(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Values]:
    """Return the output and the gradients of the fused target."""
    net.zero_grad(set_to_none=True)
    torch.default_generator.manual_seed(1)
    output = net(*args, **kwargs)
    loss = spread_loss(output, None)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    found = {name: None if item is None else item.clone() for name, item in own_gradients(net.original).items()}
    net.zero_grad(set_to_none=True)
    return output, found


def scheduled(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Values]:
    """Return the output of a step, and the gradients that its optimizers are given."""
    kept: dict[int, Tensor | None] = {}
    trainer = net.trainer(lambda parameters: Recorder(parameters, kept))
    torch.default_generator.manual_seed(1)
    result = trainer.step(*args, target=None, **kwargs)
    return result.output, {name: kept.get(id(item)) for name, item in net.original.named_parameters()}


def detached(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Values:
    """Return the gradients of detaching at the cuts, by the captured graph, and leave buffers as they were."""
    buffers = [buffer.clone() for buffer in net.original.buffers()]
    net.zero_grad(set_to_none=True)
    torch.default_generator.manual_seed(1)
    signature = net.program.signature
    assert signature is not None
    output = signature.unflatten(Detached(net).run(*signature.flatten(args, kwargs)))
    loss = spread_loss(output, None)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    with torch.no_grad():
        for buffer, held in zip(net.original.buffers(), buffers, strict=True):
            buffer.copy_(held)
    found = own_gradients(net.original)
    net.zero_grad(set_to_none=True)
    return found


def check_zero(wild: Wild, net: DecoupledModule) -> None:
    """With zero estimates gradients are those of detaching at the cuts, in both targets."""
    for target in (fused, scheduled):
        wanted = detached(net, *wild.call())  # each time anew: a run leaves other buffers behind
        same_gradients(target(net, *wild.call())[1], wanted, TOLERANCE)
