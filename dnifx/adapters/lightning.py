"""Lightning: its trainer divides the loss by ``accumulate_grad_batches``, and scales it in half precision."""

from typing import Any

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


class LogDiagnostics(lightning.Callback):
    """Logs how good the synthetic gradients are: ``Trainer(callbacks=[LogDiagnostics()])``.

    Every ``log_every_n_steps`` steps of the trainer, ``net.diagnostics()`` goes to its loggers, such as TensorBoard's.

    Args:
        prefix: What the names of the numbers begin with.
    """

    def __init__(self, prefix: str = "dni/") -> None:
        self.prefix = prefix

    def on_train_batch_start(
        self, trainer: Any, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compare in the steps that are logged, and in no others.

        Raises:
            InputError: The module holds no net.
        """
        logged = (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0
        for net in nets_of(pl_module):
            net.diagnosing = logged

    def on_train_batch_end(
        self, trainer: Any, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was found."""
        for net in nets_of(pl_module):
            if net.diagnosing:
                pl_module.log_dict(net.diagnostics(self.prefix), batch_size=1)
                net.diagnosing = False
