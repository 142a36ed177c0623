"""What BPLambda and Prop share: another estimator's answers, of which the producer makes something else."""

from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


class BlendedGradient(GradientEstimator):
    """Answers as another estimator does; the producer receives more than that answer.

    Args:
        inner: The other estimator. It must not wait for the true gradient itself.
        spec: The boundary's spec, for error texts.
        mix: Share of the target in what the producer receives.
        prop: Weight of the gradient of the estimator's own loss, which the producer receives as well.

    Raises:
        EstimatorError: The other estimator is an oracle.
    """

    def __init__(self, inner: nn.Module, spec: BoundarySpec, mix: float = 0.0, prop: float = 0.0) -> None:
        super().__init__()
        self.inner = inner
        self.mix = mix
        self.prop = prop
        if isinstance(inner, GradientEstimator):
            if inner.locked:
                raise EstimatorError(
                    f"boundary {spec.name!r}: {type(inner).__name__} gives the true gradient alone, so there is nothing to blend; "
                    "give another estimator"
                )
            self.mix, self.prop = mix or inner.mix, prop or inner.prop
            self.needs_target, self.needs_loss = inner.needs_target, inner.needs_loss
            self.fit, self.fit_weight = inner.fit, inner.fit_weight
            self.needs_error, self.needs_mask = inner.needs_error, inner.needs_mask

    def forward(
        self, values: tuple[Tensor, ...], context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the other estimator's answer."""
        answer: tuple[Tensor, ...] = self.inner(values, context) if mask is None else self.inner(values, context, mask)
        return answer
