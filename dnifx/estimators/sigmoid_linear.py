"""The smallest estimator that can represent the gradient of a log loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.estimators.base import BoundarySpec, GradientEstimator, need_features
from dnifx.estimators.layers import zeroed
from dnifx.ir import TensorSpec
from dnifx.runtime.emitted.gradients import spread_context

fx.wrap("spread_context")


@dataclass(frozen=True)
class SigmoidLinear:
    """Predicts g(h, y) = sigmoid(h A + a) D + y B + C.

    For a log loss over a linear map theta of h, the gradient is (sigmoid(h theta) - y) theta', which has this form with A =
    theta, D = theta', B = -theta' and C = 0. D, B and C start at 0, so the first synthetic gradients are exactly 0.

    Values are vectors [batch, features], tokens [batch, length, features] or maps [batch, channels, height, width]; y is
    the context, if there is one. A map is taken as a whole: h is the flattened map. So a sigmoid sees every position, and
    a label adds a different term at each. The gradient of a classifier over the flattened map has this form, and
    convolutions over constant label channels do not. The maps must have the size of the example's.

    Args:
        width: Number of sigmoids; by default one for each feature of the context. Without a context, one for each feature
            of a vector or token and each channel of a map.

    Raises:
        EstimatorError: A value is not a floating-point vector, sequence of tokens or map.

    Example:
        >>> import torch
        >>> from dnifx.estimators import BoundarySpec
        >>> from dnifx.ir import TensorSpec
        >>> spec = BoundarySpec("layer", (TensorSpec((4, 3), torch.float32),), context=2)
        >>> estimator = SigmoidLinear()(spec)
        >>> sum(parameter.numel() for parameter in estimator.parameters())  # 3*2 + 2 for A, a; 2*3 for D; 2*3 for B; 3 for C
        23
        >>> estimator((torch.ones(4, 3),), torch.ones(4, 2))[0].abs().sum().item()
        0.0

    References:
        Czarnecki et al. 2017, "Understanding Synthetic Gradients and Decoupled Neural Interfaces", ICML, Section 4:
        SG(h, y) = d sigmoid(hA) + yB + C.

    Differs from the paper in: d is a matrix, which allows several classes, and the sigmoids have a bias.
    """

    width: int | None = None

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        need_features("SigmoidLinear", spec, "use Synthetic(), or cut elsewhere")
        return SigmoidLinearGradient([self.single(spec, value) for value in spec.values])

    def single(self, spec: BoundarySpec, value: TensorSpec) -> nn.Module:
        """Build the model of one value."""
        if len(value.shape) == 4:
            channels, height, width = value.shape[1:]
            model = SigmoidModel(channels * height * width, self.width or spec.context or channels, spec.context)
            return MapModel(model, (height, width, channels))
        return SigmoidModel(value.shape[-1], self.width or spec.context or value.shape[-1], spec.context)


class SigmoidModel(nn.Module):
    """sigmoid(h A + a) D + y B + C for one value."""

    def __init__(self, features: int, width: int, context: int | None) -> None:
        super().__init__()
        self.logits = nn.Linear(features, width)
        self.mixture = zeroed(nn.Linear(width, features))
        self.label = None if context is None else zeroed(nn.Linear(context, features, bias=False))

    def forward(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Predict the gradient of one value."""
        answer: Tensor = self.mixture(torch.sigmoid(self.logits(value)))
        if self.label is None or context is None:
            return answer
        added: Tensor = self.label(spread_context(context, value))
        return answer + added


class MapModel(nn.Module):
    """Takes maps [batch, channels, height, width] as vectors: all positions one after the other.

    Args:
        model: The model of vectors.
        size: Height, width and channels of the maps.
    """

    def __init__(self, model: SigmoidModel, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Predict the gradient of one value."""
        answer: Tensor = self.model(value.movedim(1, -1).flatten(1), context)
        return answer.reshape(-1, *self.size).movedim(-1, 1)


class SigmoidLinearGradient(GradientEstimator):
    """One model for each value."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value."""
        return tuple(model(value, context) for model, value in zip(self.models, values, strict=True))
