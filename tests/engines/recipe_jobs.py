"""What each process of a recipe over ranks does."""

import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dnifx.zoo.recipes import feedforward
from dnifx.zoo.recipes.learners import TrainerLearner
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.settings import Feedforward
from tests.engines.fault_jobs import here

BRIEF = Feedforward(
    width=8,
    estimator_width=8,
    steps=9,
    batch=32,
    seeds=1,
    evaluate_every=3,
    lr=(1e-2,),
    gradient=("backprop", "synthetic"),
    context=("label",),
    layers=(3,),
    lag="2",
    diagnose_every=4,
)

Found = dict[str, tuple[float, list[Point], Any]]


def trained(places: str, out: str = "", net: str = "fcn") -> Found:
    """By variant, the test error, the curve and the looks of a run."""
    torch.set_num_threads(1)
    options = replace(BRIEF, places=places, out=Path(out) if out else None, net=net)
    results = feedforward.run(options)
    return {each.name: (run.test_error, list(run.curve), run.looks) for each in results.variants for run in each.runs}


def keep(found: Found, path: str) -> None:
    """Write what a run found to a file."""
    Path(path).write_bytes(pickle.dumps(found))


def interrupted(out: str, step: int) -> str:
    """Train until a variant has measured itself at a step; then be interrupted."""
    whole = Line.point

    def point(self: Line, point: Point, unit: str = "error %") -> None:
        whole(self, point, unit)
        if point.step == step:
            raise KeyboardInterrupt

    Line.point = point  # type: ignore[method-assign]
    try:
        trained("ranks", out)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        Line.point = whole  # type: ignore[method-assign]
    return ""


def signalled(out: str, step: int, culprit: int) -> Any:
    """Train until a process is sent a signal in a step of the synthetic gradients; return the exit code."""
    whole = TrainerLearner.compute

    def compute(self: TrainerLearner, inputs: Tensor, targets: Tensor) -> Tensor | None:
        guesses = bool(self._trainer.estimator_optimizers)
        if guesses and self._trainer.steps == step and here() == culprit:
            os.kill(os.getpid(), signal.SIGTERM)
        if guesses and self._trainer.steps >= step and dist.is_initialized():
            time.sleep(0.3)  # such short steps would be over before all have agreed
        return whole(self, inputs, targets)

    TrainerLearner.compute = compute  # type: ignore[method-assign]
    try:
        trained("ranks" if dist.is_initialized() else "here", out)
    except SystemExit as error:
        return error.code
    finally:
        TrainerLearner.compute = whole  # type: ignore[method-assign]
    return "no signal"
