"""Answers: an estimator is called once on fake tensors, and its answer is compared with the boundary."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec
from dnifx.ir import Interface, Program, TensorSpec
from dnifx.passes.flops import OperationCounter
from dnifx.passes.measure import NEEDS_VALUES


def check_estimates(interface: Interface, spec: BoundarySpec, program: Program) -> int | None:
    """Call the estimator once, on fake tensors, and compare its answer with the boundary.

    Returns:
        Its FLOPs; None where it needs the values of its tensors.

    Raises:
        EstimatorError: The answer is not one gradient of the right shape for each value.
    """
    estimator = interface.estimator
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    flags = [(module, module.training) for module in estimator.modules()]
    state: dict[str, Tensor] = {
        name: mode.from_tensor(value) for name, value in estimator.state_dict(keep_vars=True).items()
    }
    masked, counter = interface.needs_mask and program.mask is not None, OperationCounter()
    try:
        with mode, torch.enable_grad(), torch.random.fork_rng(devices=[]), counter:
            values = tuple(map(empty, spec.values))
            batch = values[0].shape[0] if spec.batch is None else spec.batch
            each = spec.values[0].shape[2:] if interface.by_pixel else ()
            features = None if spec.context is None else values[0].new_empty(batch, *each, spec.context)
            if interface.needs_error and spec.output is not None:
                features = empty(spec.output)
            mask = tuple(map(empty, program.measures[str(program.mask)].tensors)) if masked else ()
            answer = torch.func.functional_call(estimator.eval(), state, (values, features, *mask))
    except NEEDS_VALUES:
        return None
    except Exception as error:
        raise EstimatorError(
            f"the estimator {type(estimator).__name__} of boundary {spec.name!r} cannot be called: {type(error).__name__}: {error}\n"
            f"its forward takes (values, context): a tuple of {', '.join(map(str, spec.values))} and the context's features"
            + ("; of a masked model (mask=) the mask too, and so does the head that it asks" if masked else "")
        ) from error
    finally:
        for module, flag in flags:
            module.training = flag
    found = "one tensor" if isinstance(answer, Tensor) else type(answer).__name__
    whole = isinstance(answer, tuple) and all(isinstance(item, Tensor) for item in answer)
    if isinstance(answer, tuple) and not whole:
        found = f"a tuple of {', '.join(type(item).__name__ for item in answer)}"
    shapes = [tuple(item.shape) for item in answer] if whole else found
    expected = [value.shape for value in spec.values]
    expected += [expected[0][:1]] if interface.needs_loss else []
    if shapes != expected:
        also = ", and the predicted loss of each example" if interface.needs_loss else ""
        raise EstimatorError(
            f"the estimator {type(estimator).__name__} of boundary {spec.name!r} answered with {shapes}; expected a tuple with "
            f"one gradient for each value{also}: {expected}"
        )
    check_kinds(interface, spec, answer)
    return counter.flops


def check_kinds(interface: Interface, spec: BoundarySpec, answer: tuple[Tensor, ...]) -> None:
    """Raise EstimatorError where an answer has another dtype than the values, or leads to no parameter that could learn."""
    name = f"the estimator {type(interface.estimator).__name__} of boundary {spec.name!r}"
    for item, value in zip(answer, spec.values, strict=False):
        wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(value.dtype, value.dtype)
        if item.dtype not in (value.dtype, wide):
            raise EstimatorError(
                f"{name} answered in {item.dtype} for values of {value.dtype}; answer with {value.dtype}"
            )
    if interface.fits and not any(item.requires_grad for item in answer):
        raise EstimatorError(
            f"{name} has parameters, and its answer carries no gradient to them, so it would never learn: compute the answer from the "
            "parameters by differentiable operations, or freeze them (requires_grad_(False)) if it shall not learn"
        )


def empty(spec: TensorSpec) -> Tensor:
    """Return a tensor of a spec, without values."""
    return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
