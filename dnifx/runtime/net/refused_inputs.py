"""Inputs that a step cannot train on: found before it runs, or told where it fails."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dnifx.errors import DerivativeError, InputError
from dnifx.ir import Program
from dnifx.runtime.emitted.ops import GuardError

FAILURES = (IndexError, RuntimeError, TypeError, ValueError)
"""What torch raises where inputs do not fit."""


def refuse_inputs(program: Program, names: Sequence[str], inputs: Sequence[Any]) -> None:
    """Raise InputError where inputs hold no example, or were made in inference mode."""
    made = [
        name for name, value in zip(names, inputs, strict=False) if isinstance(value, Tensor) and value.is_inference()
    ]
    if made:
        raise InputError(
            f"the input {made[0]!r} was made under torch.inference_mode(), and cannot be trained on: make it outside, under "
            "torch.no_grad(), or clone it outside"
        )
    first = next((name for name in names if shape_of(program, name)), None)
    name, dim = (program.carries[0].input, program.carries[0].dim) if program.carries else (first, program.batch_dim)
    value = dict(zip(names, inputs, strict=False)).get(str(name))
    if isinstance(value, Tensor) and value.dim() > dim and value.size(dim) == 0:
        raise InputError(
            f"the batch is empty: the input {name!r} is {list(value.shape)}; a step needs one example or more, so leave such batches out"
        )


def explained(error: Exception, program: Program, names: Sequence[str], inputs: Sequence[Any]) -> Exception:
    """Return an error of a step, as an InputError where inputs differ from those of the example in more than their batch.

    Under a function transform, which torch cannot take through an interface, it is a DerivativeError.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return DerivativeError(
            "interfaces go with backward(), and not with a transform of torch.func (grad, vmap, jacrev, jvp) or forward-mode derivatives. "
            "Call the net under `with net.backprop():`, where gradients are those of the model; or use torch.autograd.grad. Torch says: "
            f"{str(error)[:150]}"
        )
    found = list(differences(program, names, inputs))
    if not found or isinstance(error, torch.OutOfMemoryError):
        return error
    return InputError(
        f"the net fails for these inputs: {type(error).__name__}: {str(error)[:200]}. They are not as in the example of "
        f"dnifx.decouple: {'; '.join(found[:3])}. Give inputs that the model takes, or decouple it with an example of this kind"
    )


@contextmanager
def explaining(program: Program, names: Sequence[str], inputs: Sequence[Any]) -> Iterator[None]:
    """Explain an error inside, as ``explained`` does."""
    try:
        yield
    except GuardError:
        raise  # another graph may hold for these inputs
    except FAILURES as error:
        told = explained(error, program, names, inputs)
        if told is error:
            raise
        raise told from error


def differences(program: Program, names: Sequence[str], inputs: Sequence[Any]) -> Iterable[str]:
    """Yield which inputs are of another type, device or shape than those of the example, their batch left aside."""
    for name, value in zip(names, inputs, strict=False):
        measure = program.measures.get(name)
        if measure is None or not measure.is_tensor or not isinstance(value, Tensor):
            continue
        spec, dim = measure.tensors[0], program.batch_dim
        own, other = (list(shape[:dim]) + list(shape[dim + 1 :]) for shape in (value.shape, spec.shape))
        if (value.dtype, value.device.type, own) != (spec.dtype, spec.device.type, other) or value.dim() != len(
            spec.shape
        ):
            yield (
                f"{name} is {value.dtype} {list(value.shape)} on {value.device}, and was {spec.dtype} {list(spec.shape)} on {spec.device}"
            )


def shape_of(program: Program, name: str) -> tuple[int, ...]:
    """Return the shape of an input in the example; nothing where it is no tensor."""
    measure = program.measures.get(name)
    return measure.tensors[0].shape if measure is not None and measure.is_tensor else ()
