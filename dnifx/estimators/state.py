"""The synthetic gradient model of the paper for recurrent networks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.estimators.layers import network, parted


@dataclass(frozen=True)
class SyntheticState:
    """Predicts the gradients of all values of a state together, from all of them or from some.

    [g_h, g_c] = W_2 ReLU(W_1 [h, c] + b_1) + b_2; with ``reads=(0,)`` it sees only h, an LSTM's output. The last layer
    starts at zero, so the first synthetic gradients are exactly 0.

    Args:
        hidden: Number of hidden layers, 0 or more.
        width: Units of a hidden layer; by default as many as the first value has.
        reads: Indices of the values that it sees; all by default.

    Raises:
        EstimatorError: A value is not floating point, ``reads`` names a value that is not there, or ``hidden`` is negative.

    References:
        Jaderberg et al. 2017, appendix A.3: one hidden layer with as many units as the LSTM, which reads the LSTM's output.

    Differs from the paper in: it reads the cell state too unless told otherwise.
    """

    hidden: int = 1
    width: int | None = None
    reads: tuple[int, ...] | None = None

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        sizes = [value.elements_per_example for value in spec.values]
        reads = tuple(range(len(sizes))) if self.reads is None else self.reads
        if not reads or not set(reads) <= set(range(len(sizes))) or self.hidden < 0:
            raise EstimatorError(
                f"boundary {spec.name!r}: {self} cannot read a state of {len(sizes)} values; give reads=, the indices of some "
                "of these, and hidden=, 0 or more"
            )
        if not all(value.dtype.is_floating_point for value in spec.values):
            raise EstimatorError(
                f"boundary {spec.name!r}: a synthetic gradient needs floating point, got "
                f"{', '.join(map(str, spec.values))}; give a factory (spec -> nn.Module) for this boundary"
            )
        inputs = sum(sizes[place] for place in reads) + (spec.context or 0)
        layers = network(nn.Linear, inputs, sum(sizes), self.hidden, self.width or sizes[0], None)
        return StateGradient(layers, reads, [tuple(value.shape[1:]) for value in spec.values])


class StateGradient(GradientEstimator):
    """One network for all values of a state."""

    def __init__(self, layers: nn.Sequential, reads: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = layers
        self.reads = reads
        self.shapes = shapes

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value, of the value's shape [batch, ...]."""
        seen = [values[place].flatten(1) for place in self.reads]
        if context is not None:
            seen.append(context.flatten(1).to(seen[0].dtype))
        answer = self.layers(torch.cat(seen, 1) if len(seen) > 1 else seen[0])
        parts = zip(parted(answer, [torch.Size(shape).numel() for shape in self.shapes], 1), self.shapes, strict=True)
        return tuple(
            part.unflatten(1, shape) if len(shape) > 1 else part  # type: ignore[no-untyped-call]
            for part, shape in parts
        )
