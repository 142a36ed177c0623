"""The exact gradient in time, by a trace."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


@dataclass(frozen=True)
class Exact:
    """On a cut in time: the gradient of backpropagation through all windows of a stream, without going back to any.

    It is for states that change entry by entry: what an entry of the next state depends on is its own former value, inputs and
    parameters, as in a minGRU, an LRU or a leaky cell without recurrent weights. With e_w = dh_w/dtheta for the state h_w that window
    w leaves, J_w its Jacobian, which is diagonal, and the weights fixed,

        e_w = J_w e_{w-1} + (dh_w/dtheta within the window),
        dL/dtheta = sum_w (dL_w/dtheta within the window) + (dL_w/dh_{w-1}) e_{w-1}.

    The trace e takes as many numbers for each example as the parameters that reach the state, and does not grow with the stream. So a
    window may be one step. Nothing is estimated, and ``scale`` does not count. A parameter of which an entry reaches several entries
    of the state, such as that of an encoder before the cell, has a trace for each entry of the state. Tensors of one shape in a state
    may depend on each other at the same index, as the real and imaginary parts of an LRU.

    Raises:
        EstimatorError: The boundary is no cut in time, or entries of the state mix; the text names the operation.

    Example:
        >>> import torch, dnifx
        >>> from dnifx.zoo.diagonal_cells import MinGRUCell
        >>> x, zero, cell = torch.randn(9, 5, 2), torch.zeros(5, 4), MinGRUCell(2, 4, 1)
        >>> net = dnifx.decouple(cell, dnifx.Recurrent("state", "1"), args=(x[0], zero), gradient="exact")
        >>> state = zero
        >>> for step in x:
        ...     y, state = net(step, state)
        ...     y.square().sum().backward()
        >>> state, total = zero, 0.0
        >>> for step in x:
        ...     y, state = cell(step, state)
        ...     total = total + y.square().sum()
        >>> (whole,) = torch.autograd.grad(total, cell.gate.weight)
        >>> torch.allclose(cell.gate.weight.grad, whole, atol=1e-5)
        True

    References:
        Williams & Zipser 1989, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks". Zucchet et al. 2023,
        "Online learning of long-range dependencies" (arXiv 2305.15947), for states that change entry by entry.

    Differs from the paper in: a window may have several steps, and what lies before the cell has exact traces too.
    """

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Refuse: only a cut in time has a trace, and the compiler makes that.

        Raises:
            EstimatorError: Always.
        """
        raise EstimatorError(
            f"boundary {spec.name!r} is no cut in time, and the exact gradient is for dnifx.Recurrent alone; name the states, "
            "gradient={'state': 'exact', '**': 'synthetic'}, or give an estimator, such as dnifx.estimators.Synthetic()"
        )


class ExactGradient(GradientEstimator):
    """Stands on a cut in time whose gradient is exact: nothing is estimated at a window's end."""

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return a zero for each value."""
        return tuple(torch.zeros_like(value) for value in values)
