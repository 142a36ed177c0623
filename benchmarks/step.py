"""Steps per second of the fused and the scheduled target, against plain backpropagation and a hand-written DNI loop.

``python -m benchmarks.step`` trains 784-256-256-256-10 with batch norm on batches of 256 random examples, a DNI after each
hidden layer, Adam, one thread. Contestants take turns in one process; plain backpropagation runs twice, as its own control.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dnifx
from benchmarks.timing import Timing, as_json, machine, race, waiter

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
    """Return a hand-written gradient model with a zeroed last layer."""
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
    """Return one DNI step as a careful person writes it for this one network: two optimizers, nothing general."""
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


def measure(hidden: int, rounds: int, steps: int, device: torch.device) -> Timing:
    """Race the contestants."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 784, device=device)
    y = torch.randint(CLASSES, (BATCH,), device=device)
    contestants = {
        "backprop": backprop_step(x, y),
        "backprop (control)": backprop_step(x, y),
        "hand-written DNI": hand_written_step(x, y, hidden),
        "fused": fused_step(x, y, hidden),
        "scheduled": scheduled_step(x, y, hidden),
    }
    return race(contestants, rounds, steps, waiter(device))


def table(timing: Timing, hidden: int) -> Table:
    """Show rates and ratios."""
    kind = "linear" if hidden == 0 else f"{hidden} hidden layer of {WIDTH}"
    shown = Table("contestant", "steps/s", "to backprop", "to hand-written", title=f"estimator: {kind}")
    for name in timing.rates:
        ratios = [f"{timing.ratio(name, to):.3f}" for to in ("backprop", "hand-written DNI")]
        shown.add_row(name, f"{timing.median(name):.0f}", *ratios)
    return shown


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    figures = {}
    for hidden in (1, 0):
        timing = measure(hidden, options.rounds, options.steps, device)
        console.print(table(timing, hidden))
        figures[f"hidden={hidden}"] = {
            name: {"steps_per_second": timing.median(name), "to_backprop": timing.ratio(name, "backprop")}
            for name in timing.rates
        }
    if options.json:
        options.json.write_text(as_json("step", device, figures) + "\n")


if __name__ == "__main__":
    main()
