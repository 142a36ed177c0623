"""Direct feedback alignment: the error of the output, through a fixed random matrix."""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


@dataclass(frozen=True)
class DirectFeedback:
    """Answers with a fixed random projection of the error of the model's output.

    g = e R, where e = dL/d(output) of the example, and R is drawn once, uniform in +-scale/sqrt(outputs). Nothing is
    learned here: the layers in front align with R.

    The error is known once the last partition has run forward. So the update lock stays and the backward lock goes: all
    partitions can run backward at the same time.

    Args:
        scale: Bound of the matrix's entries, times the square root of the number of outputs; above 0.
        seed: Seed of the matrix. Each boundary's name gives another matrix.

    Raises:
        EstimatorError: The model's output is not one tensor [batch, ...], or the scale is not positive.

    Example:
        >>> import torch
        >>> from dnifx.estimators import BoundarySpec
        >>> from dnifx.ir import TensorSpec
        >>> float32 = torch.float32
        >>> spec = BoundarySpec("layer", (TensorSpec((4, 3), float32),), output=TensorSpec((4, 2), float32))
        >>> estimator = DirectFeedback()(spec)
        >>> error = torch.tensor([[0.5, -0.5]]).expand(4, 2)
        >>> estimate = estimator((torch.zeros(4, 3),), error)[0]
        >>> tuple(estimate.shape), bool(torch.allclose(estimate, error @ estimator.matrix_0))
        ((4, 3), True)

    References:
        Nøkland 2016, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NIPS; as a synthetic gradient:
        Czarnecki et al. 2017, ICML, Section 5.

    Differs from the paper in: the projection replaces the gradient with respect to a boundary's values. Inside a partition
    of several layers, backpropagation continues from there.
    """

    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise EstimatorError(f"DirectFeedback(scale={self.scale}): the scale must be above 0")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        if spec.output is None or len(spec.output.shape) < 2 or spec.output.shape[0] != spec.values[0].shape[0]:
            raise EstimatorError(
                f"boundary {spec.name!r}: DirectFeedback projects the error of the model's output, which has to be one tensor "
                f"[batch, ...] with the boundary's batch, got {spec.output or 'several values'}; use another estimator"
            )
        generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), self.seed))
        outputs = spec.output.elements_per_example
        bound = self.scale / math.sqrt(outputs)
        sizes = [value.elements_per_example for value in spec.values]
        return FeedbackGradient([(2 * torch.rand(outputs, size, generator=generator) - 1) * bound for size in sizes])


class FeedbackGradient(GradientEstimator):
    """Projects the error."""

    needs_target = False
    needs_error = True

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__()
        for index, matrix in enumerate(matrices):
            self.register_buffer(f"matrix_{index}", matrix)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the projection of the error, which is the context [batch, ...], for each value."""
        if context is None:
            raise EstimatorError("direct feedback needs the error of the model's output; give it as the context")
        error = context.flatten(1)
        matrices = [self.get_buffer(f"matrix_{index}") for index in range(len(values))]
        return tuple(
            (error.to(matrix.dtype) @ matrix).reshape(value.shape)
            for matrix, value in zip(matrices, values, strict=True)
        )
