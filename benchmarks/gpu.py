"""Steps per second on a GPU: dnifx beside eager and compiled backpropagation.

    python -m pytest -m cuda && python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --device cpu --small --models fcn cnn

It trains the fully connected and the convolutional network of MNIST in float32, and a transformer of 12 blocks and ResNet-50
under autocast to bfloat16, each with Adam and the default estimators, cut into four parts (the MNIST networks after each hidden
layer). The contestants of a model take turns in one process. Plain backpropagation runs twice, as its own control. Beside each
rate stand the FLOPs of a step as a share of backpropagation's (``torch.utils.flop_counter``), and the most bytes that a step takes
beyond weights, estimators and what the optimizers keep. A step that is a CUDA graph holds its memory always, and has no such figure.
Where it is in phases, estimators that are alike are asked in one call.

What fails is told, and the others run. After ``--minutes`` no further contestant begins. Figures are written after each model.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import dnifx
from benchmarks.timing import as_json, machine, race, waiter
from dnifx.zoo.cnn import CNN
from dnifx.zoo.fcn import FCN
from dnifx.zoo.language_model import LanguageModel

SECONDS = 0.3
"""How long a turn of a contestant takes, about."""

Step = Callable[[], object]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: Makes the model.
        cuts: Where it is cut.
        x: A batch.
        y: Its classes, for each example or for each token.
        cast: What autocast casts to; None for none.
    """

    model: Callable[[], nn.Module]
    cuts: Sequence[str]
    x: Tensor
    y: Tensor
    cast: torch.dtype | None

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over examples, or over tokens."""
        return cross_entropy(output.flatten(0, -2), y.flatten())

    def casting(self) -> Any:
        """Run something under autocast, where the task asks for it."""
        return nullcontext() if self.cast is None else torch.autocast(self.x.device.type, self.cast)


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut around them (He et al. 2016, figure 5, right)."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * filters
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, filters, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()),
            *(nn.Conv2d(filters, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()),
            *(nn.Conv2d(filters, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = inputs == outputs and stride == 1
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else projection

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return torch.relu(self.shortcut(x) + self.body(x))


def resnet50(filters: int, blocks: Sequence[int]) -> nn.Module:
    """Return a residual network for images of 1,000 classes; 64 filters and 3, 4, 6, 3 blocks make ResNet-50."""
    stem = nn.Sequential(
        *(nn.Conv2d(3, filters, 7, 2, 3, bias=False), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    )
    widths = [filters, *(4 * filters * 2**stage for stage in range(4))]
    stages = [
        nn.Sequential(
            *(
                Bottleneck(before if number == 0 else after, after // 4, 2 if stage and number == 0 else 1)
                for number in range(blocks[stage])
            )
        )
        for stage, (before, after) in enumerate(pairwise(widths))
    ]
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))


def fcn(device: torch.device, small: bool) -> Task:
    """Return the fully connected network of MNIST, with four layers."""
    x, y = torch.rand(256, 784, device=device), torch.randint(10, (256,), device=device)
    return Task(FCN, ["hidden.*"], x, y, None)


def cnn(device: torch.device, small: bool) -> Task:
    """Return the convolutional network of MNIST, with three layers."""
    batch = 16 if small else 256
    x, y = torch.rand(batch, 1, 28, 28, device=device), torch.randint(10, (batch,), device=device)
    return Task(partial(CNN, layers=3), ["hidden.*"], x, y, None)


def transformer(device: torch.device, small: bool) -> Task:
    """Return a causal transformer of 12 blocks of 768 features, with 8,192 symbols."""
    width, symbols, length, batch = (32, 64, 16, 2) if small else (768, 8192, 512, 16)
    x = torch.randint(symbols, (batch, length + 1), device=device)
    cuts = ["blocks.2", "blocks.5", "blocks.8"]
    make = partial(LanguageModel, symbols, layers=12, width=width, heads=width // 16 if small else 12, length=length)
    return Task(make, cuts, x[:, :-1], x[:, 1:], torch.bfloat16)


def residual(device: torch.device, small: bool) -> Task:
    """Return ResNet-50 on images of 224 by 224 pixels."""
    batch, size, blocks = (2, 32, (1, 1, 1, 1)) if small else (128, 224, (3, 4, 6, 3))
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    return Task(lambda: resnet50(8 if small else 64, blocks), ["1", "2", "3"], x, y, torch.bfloat16)


TASKS: Mapping[str, Callable[[torch.device, bool], Task]] = {
    "fcn": fcn,
    "cnn": cnn,
    "transformer": transformer,
    "resnet-50": residual,
}


def adam(parameters: Any, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant, on a GPU one that a CUDA graph can record."""
    return torch.optim.Adam(parameters, lr=1e-5, capturable=device.type == "cuda")


def made(task: Task) -> nn.Module:
    """Return the model, with the same weights for all contestants."""
    torch.manual_seed(0)
    return task.model().to(task.x.device)


def backprop(task: Task, compiled: bool = False) -> Step:
    """Return a step of backpropagation."""
    return looped(task, made(task), compiled)


def fused(task: Task, compiled: bool = False) -> Step:
    """Return a step of the fused target, in the same loop."""
    return looped(task, dnifx.decouple(made(task), task.cuts, args=(task.x,), loss=task.loss), compiled)


def looped(task: Task, model: nn.Module, compiled: bool) -> Step:
    """Return a step of a plain loop."""
    optimizer, call = adam(model.parameters(), task.x.device), torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with task.casting():
            loss = task.loss(call(task.x), task.y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def scheduled(task: Task, **options: Any) -> Step:
    """Return a step of the scheduled target."""
    net = dnifx.decouple(made(task), task.cuts, args=(task.x,), loss=task.loss)
    trainer = net.trainer(partial(adam, device=task.x.device), autocast=task.cast, **options)
    return lambda: trainer.step(task.x, target=task.y)


GRAPHS = ("scheduled, as a CUDA graph", "the same, in phases")
CONTESTANTS: Mapping[str, Callable[[Task], Step]] = {
    "backprop": backprop,
    "backprop (control)": backprop,
    "backprop, compiled": partial(backprop, compiled=True),
    "fused": fused,
    "fused, compiled": partial(fused, compiled=True),
    "scheduled": scheduled,
    GRAPHS[0]: partial(scheduled, engine="cuda-graph"),
    GRAPHS[1]: partial(scheduled, engine="cuda-graph", schedule="phases"),
}


def flops(step: Step) -> int:
    """Return the FLOPs of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def taken(step: Step, device: torch.device) -> int:
    """Return the most bytes that a step takes on a GPU, beyond what is held before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def turn(step: Step, wait: Callable[[], None]) -> int:
    """Return how many steps a turn has, after some that do not count: compiled ones are compiled by then."""
    for _ in range(5):
        step()
    wait()
    started = time.perf_counter()
    step()
    wait()
    return max(3, min(200, round(SECONDS / (time.perf_counter() - started))))


def measured(task: Task, rounds: int, ends: float) -> dict[str, Figures]:
    """Return the figures of each contestant of a task; of one that fails, what it said.

    Args:
        task: The task.
        rounds: Turns of each contestant.
        ends: When no further contestant begins, by ``time.monotonic``.
    """
    device, found, steps = task.x.device, dict[str, Figures](), dict[str, Step]()
    wait = waiter(device)
    counts = []
    for name, make in CONTESTANTS.items():
        if name in GRAPHS and device.type != "cuda":
            continue
        if time.monotonic() > ends:
            found[name] = {"failed": "no time was left"}
            continue
        try:
            step = make(task)
            counts.append(turn(step, wait))
            steps[name], found[name] = step, {}
            if device.type == "cuda" and name not in GRAPHS:
                found[name]["bytes"] = taken(step, device)
            if "compiled" not in name and name not in GRAPHS:
                found[name]["flops"] = flops(step)
        except Exception as error:  # noqa: BLE001 - the others run
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    if "backprop" not in steps:
        return found
    timing = race(steps, rounds, min(counts), wait)
    for name in steps:
        found[name]["steps_per_second"] = timing.median(name)
        found[name]["to_backprop"] = timing.ratio(name, "backprop")
    return found


def table(title: str, found: Mapping[str, Figures]) -> Table:
    """Return the figures of a task as a table."""
    shown = Table("contestant", "steps/s", "to backprop", "FLOPs, to backprop", "bytes of a step", title=title)
    base = found["backprop"].get("flops")
    for name, each in found.items():
        if "failed" in each:
            shown.add_row(name, each["failed"])
            continue
        share = f"{each['flops'] / base:.2f}" if base and "flops" in each else ""
        size = f"{each['bytes'] / 2**20:,.0f} MiB" if "bytes" in each else ""
        shown.add_row(name, f"{each['steps_per_second']:.1f}", f"{each['to_backprop']:.3f}", share, size)
    return shown


def main() -> None:
    """Measure the tasks, print a table of each, and write the figures to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--models", nargs="*", default=list(TASKS), choices=TASKS, help="(all)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="when no contestant begins any more (%(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try this on a CPU")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    console, device, ends = Console(), torch.device(asked.device), time.monotonic() + 60 * asked.minutes
    if device.type == "cuda" and not torch.cuda.is_available():
        console.print("skipped: torch sees no CUDA device")
        return
    console.print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    figures = {}
    for name in asked.models:
        figures[name] = measured(TASKS[name](device, asked.small), asked.rounds, ends)
        console.print(table(name, figures[name]))
        torch._dynamo.reset()
        if asked.json:
            asked.json.write_text(as_json("gpu", device, figures) + "\n")


if __name__ == "__main__":
    main()
