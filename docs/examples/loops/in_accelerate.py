"""Train a cut net with Accelerate: mixed precision, clipping, accumulation, checkpoint and resume.

    python in_accelerate.py folder 20
    python in_accelerate.py folder 40

The second call goes on from the first one's checkpoint, and ends as one call of 40 updates does. The lines that know of
the cuts have a comment.
"""

import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dnifx
from dnifx.adapters.accelerate import tell_loss_scale

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def make_net(gradient: Any, dropout: float = 0.1) -> Any:
    return dnifx.decouple(make_model(dropout), ["1", "4"], args=(X[:4],), gradient=gradient)


class Losses(list[float]):
    """The losses so far; Accelerate saves what has a state_dict."""

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": list(self)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self[:] = state["losses"]


def train(
    net: Any, folder: str, updates: int, parts: int = 4, precision: str = "bf16", tell: Any = tell_loss_scale
) -> list[float]:
    """Train until a number of updates is made, each from all examples in a number of parts; return the losses."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts)
    optimizer = torch.optim.Adam(net.parameter_groups(lr=3e-3, estimator_lr=1e-2))  # estimators in a group of their own
    batches = DataLoader(TensorDataset(X, Y), batch_size=len(X) // parts)
    model, optimizer, batches = accelerator.prepare(net, optimizer, batches)
    tell(accelerator, model)  # tells the net what Accelerate multiplies the loss by
    losses = Losses()
    accelerator.register_for_checkpointing(losses)
    if (Path(folder) / "last").exists():
        accelerator.load_state(str(Path(folder) / "last"))
    while len(losses) < updates * parts:
        for inputs, labels in batches:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.model_parameters(), 1.0)  # the model alone, without fits
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    accelerator.save_state(str(Path(folder) / "last"))
    return losses


if __name__ == "__main__":
    losses = train(make_net(dnifx.estimators.Synthetic(hidden=0)), sys.argv[1], int(sys.argv[2]))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
