"""BP(lambda): between synthetic gradients and backpropagation."""

from dataclasses import dataclass, field

from torch import nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.blended import BlendedGradient
from dnifx.estimators.synthetic import Synthetic


@dataclass(frozen=True)
class BPLambda:
    """Mixes the gradient that arrives from the consumers with an estimate of it.

    gbar = lambda * t + (1 - lambda) * g. Here t = gbar' dh'/dh is the gradient that the consumers send (they received
    gbar'), and g is the estimate, which is fitted to t. lambda = 0 is DNI and waits for nothing. lambda = 1 is exactly
    backpropagation. For anything above 0, the producer waits for t, so the backward lock stays.

    On a cut in time (``dnifx.Recurrent``) the state stays attached from one window to the next, and the fused module
    backpropagates one loss over a chain of windows. Let L_w be the loss of window w, h_w the state that it leaves,
    g_w = g(h_w) the estimate there, and gamma the cut's scale. The core of window w receives gamma * gbar_w at its end,
    and g_w is fitted to G_w:

        G_w = dL_{w+1}/dh_w + gamma * gbar_{w+1} dh_{w+1}/dh_w,    gbar_w = lambda * G_w + (1 - lambda) * g_w,

    with gbar = g at the end of the chain's last window, and G_w = 0 where an episode ends. Unrolled, G_w is the
    lambda-return: the targets that bootstrap after 1, 2, 3, ... windows, weighted by (1 - lambda) * (1, lambda,
    lambda^2, ...). lambda = 0 is DNI, window by window. With lambda = 1 and scale 1, G_w is the true gradient of the
    windows in the chain, continued by the last estimate. Detach the state where a chain ends. A trainer sees only one
    window at a time; use ``Recurrent(trace=...)`` with it.

    Args:
        lambda_: Share of the arriving gradient, from 0 to 1.
        estimator: Builds the estimator. On a cut in time, use ``SyntheticState()``.

    Raises:
        EstimatorError: ``lambda_`` is out of its range, or the estimator is an oracle.

    Example:
        >>> import torch, dnifx
        >>> from torch.nn.functional import mse_loss
        >>> def first_gradient(gradient):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        ...     x = torch.randn(8, 4)
        ...     net = dnifx.decouple(model, ["0"], args=(x,), gradient=gradient)
        ...     mse_loss(net(x), torch.ones(8, 1)).backward()
        ...     return model[0].weight.grad.norm().item()
        >>> [round(first_gradient(BPLambda(share)), 4) for share in (0.0, 0.25, 1.0)]
        [0.0, 0.2623, 1.0494]

    References:
        Jaderberg et al. 2017 (ICML), Section 2.4 and supplement A, after TD(lambda) of Sutton 1988.

    Differs from the paper in: this is the usual form of the recursion, as the supplement's text was not available. There
    is one lambda for each boundary, and the target t itself is mixed. In time, the paper's own networks use lambda = 1
    inside a window and 0 at its end; the form for several windows is derived here from the same recursion.
    """

    lambda_: float = 0.5
    estimator: Factory = field(default=Synthetic())

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ <= 1:
            raise EstimatorError(
                f"BPLambda(lambda_={self.lambda_}): lambda_ must be from 0 (DNI) to 1 (backpropagation)"
            )

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return BlendedGradient(self.estimator(spec), spec, mix=self.lambda_)
