"""The loss that a trainer was given: computed, reduced, and looked at with care the first time."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from dnifx.errors import DnifxError, LossError
from dnifx.runtime.emitted.fitting import example_losses
from dnifx.runtime.net.losses import Loss


@dataclass(frozen=True)
class TaskLoss:
    """What the model is trained on.

    Attributes:
        function: (output, target) to a scalar or one loss an example.
        mean: Whether it averages over examples (else it sums).
        teaches: The parameters that learn from it first: where one of them is trained, the loss has to carry a gradient.
        batch_first: Whether outputs and targets lead with the examples, so that a loss that sums can be found out.
        raises: Whether a loss that is not finite is an error.
        elsewhere: Parameters that the last partition does not use, with their names.
        forms: How many dimensions the loss has, once that is known.
    """

    function: Loss
    mean: bool
    teaches: Sequence[Tensor]
    batch_first: bool = True
    raises: bool = True
    elsewhere: Mapping[Tensor, str] = field(default_factory=dict)
    forms: list[int] = field(default_factory=list)

    def raw(self, output: Any, target: Any, step: int) -> Tensor:
        """Return the loss as the function gives it; that of step 0 is computed with care.

        Raises:
            LossError: It cannot be computed, has a wrong form, depends on parameters of other partitions, or on nothing. The latter two
                are looked for in steps 0, 1, 2, 4, 8, ...
        """
        loss: Tensor = self.first(output, target) if step == 0 else self.computed(output, target)
        if step:
            self.check_form(loss, output)
        if step & (step - 1) == 0:
            nodes = nodes_of(loss)
            refuse_penalty(nodes, self.elsewhere)
            refuse_apart(nodes, output, self.teaches)
        return loss

    def computed(self, output: Any, target: Any) -> Any:
        """Call the function.

        Raises:
            LossError: It fails.
        """
        try:
            return self.function(output, target)
        except (torch.OutOfMemoryError, DnifxError):
            raise
        except Exception as error:
            raise LossError(
                f"the loss cannot be computed: {type(error).__name__}: {error}\n  output: {describe(output)}\n  target: "
                f"{describe(target)}\ngive target= in the form that the loss compares with the output"
            ) from error

    def check_form(self, loss: Any, output: Any) -> None:
        """Raise LossError where a loss is no scalar, not one loss an example, or carries no gradient.

        A loss of several values has one for each example, which the output leads with.
        """
        if not isinstance(loss, Tensor) or loss.dim() > 1 or not loss.dtype.is_floating_point:
            raise LossError(f"the loss gave {describe(loss)}; expected a scalar tensor or one loss an example")
        if not loss.requires_grad and any(each.requires_grad for each in self.teaches):
            raise LossError(
                "the loss carries no gradient, so nothing can learn from it: compute it from the output by differentiable operations "
                "(no argmax, no detach, no .item())"
            )
        if loss.dim() not in self.forms:
            self.forms.append(loss.dim())
        if len(self.forms) > 1:
            del self.forms[1:]
            raise LossError(
                f"the loss gave {describe(loss)}, and {'one loss an example' if self.forms[0] else 'a scalar'} before; return the same "
                "form in every step"
            )
        if loss.dim() and self.batch_first:
            sizes = {leaf.size(0) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()}
            if sizes and len(loss) not in sizes:
                raise LossError(
                    f"the loss gave {describe(loss)}, and the output is of {' or '.join(map(str, sorted(sizes)))} examples; return a "
                    "scalar or one loss an example: average over tokens or pixels inside the loss"
                )

    def reduced(self, loss: Tensor, step: int) -> Tensor:
        """Return a loss as a scalar, on the CPU made sure to be finite.

        Raises:
            LossError: It is not.
        """
        scalar = example_losses(loss, self.mean)
        if self.raises and scalar.device.type == "cpu" and not math.isfinite(scalar.item()):
            raise LossError(
                f"the loss of step {step} is {scalar.item()}: nothing that depends on it was updated; look at the inputs and "
                "targets of this batch, or lower the learning rate; net.trainer(..., on_nonfinite='skip') leaves such updates out and "
                "goes on"
            )
        return scalar

    def first(self, output: Any, target: Any) -> Tensor:
        """Compute the loss with care: turn what it complains of into a LossError, and find out its reduction.

        Raises:
            LossError: It cannot be computed, has a wrong form, teaches nothing, or sums where a mean was asked for.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*target size.*different.*")
            loss: Tensor = self.computed(output, target)
        self.check_form(loss, output)
        if self.mean and self.batch_first and loss.dim() == 0 and sums(self.function, loss, output, target):
            raise LossError(
                "the loss sums over examples, but the interfaces were made for a mean: synthetic gradients would be too small by "
                "the batch size; give dnifx.decouple(..., reduction='sum')"
            )
        return loss


def nodes_of(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph that a loss was computed by."""
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = {*waiting}
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return seen


def refuse_penalty(nodes: Iterable[Any], elsewhere: Mapping[Tensor, str]) -> None:
    """Raise LossError where a loss depends on parameters of partitions before the last one."""
    for node in nodes:
        name = elsewhere.get(getattr(node, "variable", None))  # type: ignore[arg-type]
        if name is not None:
            raise LossError(
                f"the loss reads the parameter {name} of a partition before the last one, which makes its update without the loss: a "
                "penalty inside loss= would train the last partition alone. Take it out of the loss, and give it as "
                "net.trainer(..., penalty=), a callable from a partition's parameters, by name, to a scalar; or use weight decay"
            )


def refuse_apart(nodes: set[Any], output: Any, teaches: Sequence[Tensor]) -> None:
    """Raise LossError where a loss depends neither on the output nor on what learns from it, as one made of a number."""
    own = {id(each) for each in teaches}
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    reached = [get_gradient_edge(leaf).node in nodes for leaf in outputs]
    if reached and not any(reached) and not any(id(getattr(node, "variable", None)) in own for node in nodes):
        raise LossError(
            "the loss has a gradient, but none that reaches the output, so nothing can learn from it: compute it from the output by "
            "differentiable operations (no .item(), no torch.tensor(..., requires_grad=True))"
        )


def sums(loss: Loss, value: Tensor, output: Any, target: Any) -> bool:
    """Whether a loss doubles, rather than stays, when every example is there twice."""
    try:
        twice = [
            pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, item)
            for item in (output, target)
        ]
        with torch.no_grad():
            doubled = loss(*twice)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return bool(value != 0) and bool(value.isfinite()) and bool(torch.isclose(doubled, 2 * value, rtol=1e-3, atol=0))


def describe(value: Any) -> str:
    """Describe a value in an error text."""
    if isinstance(value, Tensor) and not value.is_nested:
        return f"tensor {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__
