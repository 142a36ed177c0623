"""Train a cut net in Lightning: mixed precision, clipping, accumulation, checkpoint and resume.

    python in_lightning.py folder 20
    python in_lightning.py folder 40

The second call goes on from the first one's checkpoint, and ends as one call of 40 updates does. The lines that know of
the cuts have a comment.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dnifx
from dnifx.adapters.lightning import TellLossScale

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def make_net(gradient: Any, dropout: float = 0.1) -> Any:
    return dnifx.decouple(make_model(dropout), ["1", "4"], args=(X[:4],), gradient=gradient)


class Classifier(lightning.LightningModule):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameter_groups(lr=3e-3, estimator_lr=1e-2))  # estimators in their own group

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.net.clip_grad_norm_(gradient_clip_val)  # the model alone: the fits of estimators do not count

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"], checkpoint["losses"] = torch.get_rng_state(), self.losses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random"])
        self.losses = checkpoint["losses"]


def train(net: Any, folder: str, updates: int, parts: int = 4, **options: Any) -> list[float]:
    """Train until a number of updates is made, each from all examples in a number of parts; return the losses."""
    module = Classifier(net)
    trainer = lightning.Trainer(
        max_epochs=updates,
        accelerator="cpu",
        accumulate_grad_batches=parts,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        # TellLossScale tells the net what Lightning multiplies the loss by
        **{"callbacks": [TellLossScale()], "precision": "bf16-mixed", **options},
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    path = Path(folder) / "last.ckpt"
    batches = DataLoader(TensorDataset(X, Y), batch_size=len(X) // parts)
    trainer.fit(module, batches, ckpt_path=path if path.exists() else None, weights_only=False)
    trainer.save_checkpoint(path)
    return module.losses


if __name__ == "__main__":
    losses = train(make_net(dnifx.estimators.Synthetic(hidden=0)), sys.argv[1], int(sys.argv[2]))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
