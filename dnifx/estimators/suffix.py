"""Suffix: the rest of the model, made thin, gives the gradient of the user's own loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.estimators.labelled import uncompiled
from dnifx.runtime.emitted.suffixes import Mirror, take_mirrors, thin_gradients


@dataclass(frozen=True)
class Suffix:
    """Answers with the gradient of the user's own loss through a thin copy of what stands behind the boundary.

    The suffix of a boundary is the part of the model that depends on its values. The compiler removes the blocks from it
    that map one value to one value of the same shape and dtype, all but ``blocks`` of them; a block that changes the shape
    stays whole where others of its class can be left out. What is left ends in the model's own output, so that the user's
    own ``loss=`` can be computed from it. The thin suffix learns from the same loss. No target gradient is needed, and no
    label context.

    Args:
        blocks: How many of the removable blocks are kept, those next to the boundary.
        readout: ``"own"``: what stands behind the removable blocks has parameters of its own. ``"shared"``: it has copies of
            the model's, taken again every ``refresh`` steps.
        refresh: After how many training steps the copies of a shared readout are taken again.
        budget: The most FLOPs that the thin suffix may have, as a multiple of those of the whole suffix. Where it has more,
            images on the boundary are averaged over 2 x 2 or 4 x 4 pixels first, if the model's output keeps its shape.
        decay: If given, the kept blocks are no learners of their own, but moving averages of the model's blocks: each step
            the copies become ``decay`` times themselves plus ``1 - decay`` times the model's.

    Raises:
        EstimatorError: An option is out of range; no suffix can be made; or there is no loss.

    References:
        Belilovsky, Eickenberg, Oyallon 2020, "Decoupled greedy learning of CNNs", ICML: local losses. Ma, Wu, Si, Tan 2024,
        "Scaling supervised local learning with augmented auxiliary networks", ICLR: heads that look like the layers behind.
    """

    blocks: int = 1
    readout: Literal["own", "shared"] = "own"
    refresh: int = 50
    budget: float = 1.0
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.refresh < 1 or self.budget <= 0:
            raise EstimatorError(f"{self}: blocks must be 0 or more, refresh 1 or more, and budget above 0")
        if self.readout not in ("own", "shared"):
            raise EstimatorError(f"readout={self.readout!r}: give 'own' or 'shared'")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise EstimatorError(f"decay={self.decay}: give a number from 0 up to 1, such as 0.995, or None")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Refuse: a suffix is made from the model's graph, which a boundary's spec does not hold.

        Raises:
            EstimatorError: Always.
        """
        raise EstimatorError(
            f"boundary {spec.name!r}: a suffix is made from the graph behind the boundary, which is not known here (a cut in time, or "
            "a message between parts); give dnifx.estimators.Synthetic()"
        )


class SuffixGradient(GradientEstimator):
    """Differentiates the loss of a thin suffix.

    Args:
        thin: The thin suffix: from the boundary's values and what it reads beside them to the model's flat outputs.
        loss: From the flat outputs and the target to a scalar or one loss an example.
        mean: Whether losses are means over examples (else sums).
        mirrors: What it copies from the model.
        refresh: After how many answers in training mode the copies are taken again.
        draws: Whether it draws random numbers.
    """

    needs_target = False
    needs_mask = False

    def __init__(
        self,
        thin: fx.GraphModule,
        loss: Callable[[tuple[Any, ...], Any], Tensor],
        mean: bool,
        mirrors: Sequence[Mirror] = (),
        refresh: int = 1,
        draws: bool = False,
    ) -> None:
        super().__init__()
        self.thin, self.loss, self.mean, self.mirrors = thin, loss, mean, tuple(mirrors)
        self.refresh, self.draws = refresh, draws
        self.answers: Tensor
        self.register_buffer("answers", torch.zeros((), dtype=torch.int64))

    @uncompiled
    def forward(self, values: tuple[Tensor, ...], context: Any = None) -> tuple[Tensor, ...]:
        """Return the gradient of each example's loss with respect to each value.

        Args:
            values: The boundary's values.
            context: The target of the loss, the number of examples, and what the thin suffix reads beside the values.
        """
        self.look()
        parameters = self.thin.parameters()
        return thin_gradients(self.thin, self.loss, values, context, self.mean, parameters, self.draws)

    @property
    def period(self) -> int:
        """After how many answers in training mode copies of the model are taken again: averages move with every answer."""
        return 1 if any(each.decay is not None for each in self.mirrors) else self.refresh

    @property
    def due(self) -> bool:
        """Whether the next answer takes copies of the model again."""
        return self.training and int(self.answers) % self.period == 0

    def asked_elsewhere(self) -> bool:
        """Count an answer that another rank asks for; return whether copies of this rank's parameters are due there."""
        due = self.due
        if self.training:
            self.answers += 1
        return due

    def look(self) -> None:
        """Take the mirrors again where their time has come: those that are averages in every step."""
        if self.training and self.mirrors:
            take_mirrors(self.mirrors, self.answers, self.refresh)
