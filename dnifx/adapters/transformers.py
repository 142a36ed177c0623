"""transformers.Trainer: it divides the loss for accumulation, and Accelerate scales it in half precision.

A model that returns its loss needs no adapter. It is for a loss that the trainer computes itself, such as one with label smoothing.
"""

from dataclasses import dataclass
from typing import Any

from dnifx.adapters.nets import factor, nets_of
from dnifx.errors import LossError
from dnifx.runtime.emitted.loss_scale import Factor


@dataclass(frozen=True)
class TrainerScale:
    """What a trainer multiplies the loss by now."""

    trainer: Any

    def __call__(self) -> Factor:
        """Return the factor."""
        return factor(self.trainer.accelerator.scaler, self.trainer.current_gradient_accumulation_steps)


def tell_loss_scale(trainer: Any) -> None:
    """Let the nets in the model of a ``transformers.Trainer`` know what it multiplies the loss by.

    Raises:
        InputError: The model holds no net.
        LossError: A function of your own divides the loss by the number of items, of which the net knows nothing.
    """
    if trainer.compute_loss_func is not None:
        raise LossError(
            "compute_loss_func divides the loss by the number of items in all micro-batches, and the net cannot know that factor: return "
            "the loss from the model, or set net.loss_scale in the function"
        )
    trainer.model_accepts_loss_kwargs = False  # so that the loss is a mean, which the trainer divides
    for net in nets_of(trainer.model):
        net.loss_scale = TrainerScale(trainer)
