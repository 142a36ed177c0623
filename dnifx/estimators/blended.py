"""An estimator as it is, and another way for its producer to use it."""

from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


class BlendedGradient(GradientEstimator):
    """Answers as another estimator does; the producer receives more than that answer.

    Args:
        inner: The estimator; it has to be one that does not wait itself.
        mix: Share of the target in what the producer receives.
        prop: Weight of the gradient of the estimator's own loss, which the producer receives beside.
        spec: The boundary's spec, for error texts.

    Raises:
        EstimatorError: The estimator knows the true gradient alone.
    """

    def __init__(self, inner: nn.Module, spec: BoundarySpec, mix: float = 0.0, prop: float = 0.0) -> None:
        super().__init__()
        self.inner = inner
        self.mix = mix
        self.prop = prop
        if isinstance(inner, GradientEstimator):
            if inner.locked:
                raise EstimatorError(
                    f"boundary {spec.name!r}: {type(inner).__name__} waits for the true gradient itself, so there is nothing to "
                    "blend; give another estimator"
                )
            self.mix = mix or inner.mix
            self.prop = prop or inner.prop
            self.needs_target = inner.needs_target
            self.needs_loss = inner.needs_loss
            self.needs_error = inner.needs_error
            self.needs_mask = inner.needs_mask

    def forward(
        self, values: tuple[Tensor, ...], context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Answer as the estimator does."""
        answer: tuple[Tensor, ...] = self.inner(values, context) if mask is None else self.inner(values, context, mask)
        return answer
