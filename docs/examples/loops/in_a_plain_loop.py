"""Train a cut net in a loop of your own: half precision, clipping, accumulation, checkpoint and resume.

    python in_a_plain_loop.py checkpoint.pt 20
    python in_a_plain_loop.py checkpoint.pt 40

The second call goes on from the first one's checkpoint, and ends as one call of 40 updates does. The loop is the usual
one of torch. The lines that know of the cuts have a comment.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dnifx

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def make_net(gradient: Any, dropout: float = 0.1) -> Any:
    return dnifx.decouple(make_model(dropout), ["1", "4"], args=(X[:4],), gradient=gradient)


def train(net: Any, path: Path, updates: int, parts: int = 4, dtype: torch.dtype = torch.float16) -> list[float]:
    """Train until a number of updates is made, each from all examples in a number of parts; return the losses."""
    optimizer = torch.optim.Adam(net.parameter_groups(lr=3e-3, estimator_lr=1e-2))  # estimators in a group of their own
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    net.loss_scale = lambda: scaler.get_scale() / parts  # what the loss is multiplied by, read in the backward pass
    losses = []
    if path.exists():
        saved = torch.load(path)
        net.load_state_dict(saved["net"])  # estimators too
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        losses = saved["losses"]
    while len(losses) < updates:
        optimizer.zero_grad()
        total = 0.0
        for inputs, labels in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = cross_entropy(net(inputs), labels) / parts
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        net.clip_grad_norm_(1.0)  # the model alone: the fits of estimators do not count
        scaler.step(optimizer)
        scaler.update()
        losses.append(total)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    torch.save({**state, "random": torch.get_rng_state(), "losses": losses}, path)
    return losses


if __name__ == "__main__":
    losses = train(make_net(dnifx.estimators.Synthetic(hidden=0)), Path(sys.argv[1]), int(sys.argv[2]))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
