"""Labels as the context of estimators: checked, and turned into features."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import ContextError
from dnifx.ir import Program


@dataclass(frozen=True)
class Labels:
    """Turns class indices [batch, ...] into features [batch, ..., classes].

    Attributes:
        classes: Number of classes.
    """

    classes: int

    def __call__(self, label: Any) -> Tensor:
        """Return the features.

        Raises:
            ContextError: These are no class indices.
        """
        self.check(label)
        return torch.nn.functional.one_hot(label, self.classes)

    def check(self, label: Any) -> None:
        """Raise ContextError where something is no class indices; values are looked at on the CPU alone, where that is quick."""
        if not isinstance(label, Tensor) or label.dtype != torch.int64:
            got = f"a tensor of {label.dtype}" if isinstance(label, Tensor) else f"a {type(label).__name__}"
            raise ContextError(
                f"context='label' got {got}; estimators see class indices [batch, ...] of torch.int64, from 0 to {self.classes - 1}. Give "
                "context= in that form (by default it is the target)"
            )
        if label.device.type != "cpu" or label.numel() == 0:
            return
        low, high = (int(each) for each in label.aminmax())
        if low < 0 or high >= self.classes:
            raise ContextError(
                f"context='label' got the class {low if low < 0 else high}, and num_classes={self.classes} allows 0 to {self.classes - 1}. "
                "Give num_classes= all classes that there are, and exclude others, such as -100 for padding, from context="
            )


def check_examples(label: Any, inputs: tuple[Any, ...], program: Program) -> None:
    """Raise ContextError where a context has another number of examples than any of the inputs, or labels have too many dimensions."""
    values = [len(spec.shape) for boundary in program.boundaries for spec in boundary.specs]
    labels = program.context is not None and isinstance(program.context.features, Labels) and isinstance(label, Tensor)
    if labels and values and label.dim() >= max(values):
        raise ContextError(
            f"context='label' got a tensor {list(label.shape)}, and the values at the boundaries have up to {max(values)} dimensions: give "
            "one class index an example, [batch], or one a token or pixel. One-hot labels become indices by label.argmax(-1)"
        )
    sizes = {size for value in inputs if isinstance(value, Tensor) for size in value.shape}
    if isinstance(label, Tensor) and label.dim() and sizes and label.size(0) not in sizes:
        raise ContextError(
            f"the context is {list(label.shape)}, of {label.size(0)} examples, and no input has that size; give context= with an entry "
            "for each example of this batch"
        )
