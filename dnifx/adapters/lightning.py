"""Lightning: its trainer divides the loss by ``accumulate_grad_batches``, and scales it in half precision."""

import lightning
from torch import Tensor

from dnifx.adapters.nets import factor, nets_of


class TellLossScale(lightning.Callback):
    """Lets the nets in a ``LightningModule`` know what the trainer multiplies the loss by: ``Trainer(callbacks=[TellLossScale()])``.

    Raises:
        InputError: The module holds no net.
    """

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Tell them, before each backward pass."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        found = factor(scaler, trainer.accumulate_grad_batches)
        for net in nets_of(pl_module):
            net.loss_scale = found
