"""Steps per second of the fused and the scheduled target.

    python -m benchmarks.step
    python -m benchmarks.step --rounds 5 --steps 20 --device cuda --json step.json

The contestants train a network of 784-256-256-256-10 units with batch norm, with an interface after
each hidden layer, on batches of 256 random examples, with Adam on one thread. They take turns in
one process. Plain backpropagation runs twice, as its own control.

Compare the fused target with the loop written by hand: both update everything at the end of a step,
with one or two optimizers. Compare the scheduled target with the unlocked loop written by hand:
both give every part its own optimizer, which updates the part as soon as its gradients are there.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import dnifx
from benchmarks.contest import Contest, Contestants, run

BATCH, WIDTH, CLASSES = 256, 256, 10


def network(device: torch.device) -> nn.Sequential:
    """Return three hidden blocks of linear, batch norm and ReLU, and a classifier."""
    torch.manual_seed(0)
    sizes = [784, WIDTH, WIDTH, WIDTH]
    blocks = [
        nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
        for inputs, outputs in pairwise(sizes)
    ]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES)).to(device)


def estimator(hidden: int, device: torch.device) -> nn.Sequential:
    """Return a hand-written estimator whose last layer is zero."""
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    last = nn.Linear(WIDTH, WIDTH)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last).to(device)


def adam(parameters: object) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant."""
    return torch.optim.Adam(parameters, lr=3e-5)  # type: ignore[arg-type]


def backprop_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step of plain backpropagation."""
    model = network(x.device)
    optimizer = adam(model.parameters())
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def hand_written_step(x: Tensor, y: Tensor, hidden: int) -> Callable[[], None]:
    """Return one DNI step with two optimizers, written by hand for this one network."""
    model = network(x.device)
    models = [estimator(hidden, x.device) for _ in range(3)]
    optimizer = adam(model.parameters())
    fit_optimizer = adam([parameter for each in models for parameter in each.parameters()])
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        fit_optimizer.zero_grad()
        value, estimates, leaves = x, [], []
        for block, each in zip(list(model)[:3], models, strict=True):
            output = block(value)
            estimate = each(output.detach())
            output.backward(estimate.detach() / BATCH)
            value = output.detach().requires_grad_()
            estimates.append(estimate)
            leaves.append(value)
        loss(model[3](value), y).backward()
        for estimate, leaf in zip(estimates, leaves, strict=True):
            estimate.backward((estimate.detach() - leaf.grad * BATCH) * (2 / BATCH))
        optimizer.step()
        fit_optimizer.step()

    return step


def unlocked_step(x: Tensor, y: Tensor, hidden: int) -> Callable[[], None]:
    """Return the same step with an optimizer for each block and each estimator.

    Each is updated as soon as its gradients are there.
    """
    blocks, models = list(network(x.device)), [estimator(hidden, x.device) for _ in range(3)]
    optimizers, fit_optimizers = ([adam(each.parameters()) for each in group] for group in (blocks, models))
    loss = nn.CrossEntropyLoss()

    def update(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def fit(number: int, estimate: Tensor, leaf: Tensor) -> None:
        target = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        torch.autograd.backward(estimate, (estimate.detach() - target * BATCH) * (2 / BATCH))
        update(fit_optimizers[number])

    def step() -> None:
        value, before = x, None
        for number, each in enumerate(models):
            output = blocks[number](value)
            estimate = each(output.detach())
            output.backward(estimate.detach() / BATCH)
            if before is not None:
                fit(number - 1, *before)
            update(optimizers[number])
            value = output.detach().requires_grad_()
            before = estimate, value
        loss(blocks[3](value), y).backward()
        if before is not None:
            fit(2, *before)
        update(optimizers[3])

    return step


def decoupled(x: Tensor, hidden: int) -> dnifx.DecoupledModule:
    """Return the network with an interface after each hidden block."""
    synthetic = dnifx.estimators.Synthetic(hidden=hidden, width=WIDTH)
    model = network(x.device)
    return dnifx.decouple(model, ["0", "1", "2"], args=(x,), gradient=synthetic, loss=nn.CrossEntropyLoss())


def fused_step(x: Tensor, y: Tensor, hidden: int) -> Callable[[], None]:
    """Return one step of the fused target in a plain loop."""
    net = decoupled(x, hidden)
    optimizer = adam(net.parameters())
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()

    return step


def scheduled_step(x: Tensor, y: Tensor, hidden: int) -> Callable[[], None]:
    """Return one step of the scheduled target."""
    trainer = decoupled(x, hidden).trainer(adam)

    def step() -> None:
        trainer.step(x, target=y)

    return step


def contestants(hidden: int, device: torch.device) -> Contestants:
    """Return the contestants on a device, with estimators of ``hidden`` hidden layers."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 784, device=device)
    y = torch.randint(CLASSES, (BATCH,), device=device)
    return {
        "backprop": backprop_step(x, y),
        "backprop (control)": backprop_step(x, y),
        "DNI by hand": hand_written_step(x, y, hidden),
        "unlocked by hand": unlocked_step(x, y, hidden),
        "fused": fused_step(x, y, hidden),
        "scheduled": scheduled_step(x, y, hidden),
    }


CONTEST = Contest(
    "step",
    "steps",
    {
        f"estimators of one hidden layer of {WIDTH}": partial(contestants, 1),
        "linear estimators": partial(contestants, 0),
    },
    ("backprop", "DNI by hand", "unlocked by hand"),
)


if __name__ == "__main__":
    run(CONTEST, __doc__, rounds=15, steps=40)
