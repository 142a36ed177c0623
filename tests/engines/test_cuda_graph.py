"""Whole steps as one graph: the numbers of steps that run as they come. On the CPU, graphs are replayed by hand."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import dnifx
from dnifx.engines import cuda_graph
from dnifx.engines.base import OneProcess
from dnifx.engines.cuda_graph import MOST, WARM, CudaGraph
from dnifx.errors import DnifxError, InputError, OptimizerError, PlaceError, ScheduleError
from dnifx.estimators import Late
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.engines.replaying import nothing_aside, recorder, tensors_of
from tests.passes.programs import mlp

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
momentum = partial(SGD, lr=0.1, momentum=0.9)


def net(gradient: Any = "synthetic", model: nn.Module | None = None, loss: Any = cross_entropy) -> DecoupledModule:
    torch.manual_seed(0)
    whole = mlp(6, 8, 8, 3) if model is None else model
    return dnifx.decouple(whole, 3, args=(X,), gradient=gradient, context="label", num_classes=3, loss=loss)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Trainer, list[int]]]:
    """Make trainers whose steps are recorded on the CPU, each with the steps in which it recorded."""

    def made(own: DecoupledModule, optimizer: Any = momentum, *given: Any, **options: Any) -> tuple[Trainer, list[int]]:
        engine = CudaGraph(torch.device("cpu"))
        own.__dict__["emitters"] = replace(own.emitters, engine=lambda *_: engine)
        trainer, steps = own.trainer(optimizer, *given, **options), list[int]()
        record = recorder(lambda: tensors_of(trainer))

        def noted(run: Callable[[], Any], pool: Any) -> Any:
            steps.append(trainer.steps)
            return record(run, pool)

        monkeypatch.setattr(cuda_graph, "record", noted)
        monkeypatch.setattr(cuda_graph, "aside", nothing_aside)
        return trainer, steps

    return made


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    return X.roll(step, 0)[:size] + step / 8, Y.roll(step)[:size]


GRADIENTS: dict[str, Any] = {
    "linear": "synthetic",
    "hidden": dnifx.estimators.Synthetic(hidden=1),
    "suffix": "suffix",
    "oracle": "oracle",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": 0.1},
    "rates": {"lr_scheduler": partial(StepLR, step_size=6)},
    "unfitted": {"schedule": "fit_every{every=2}"},
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_recorded_steps_have_the_numbers_of_others(gradient: str, options: str, on_cpu: Any) -> None:
    one, other = net(GRADIENTS[gradient]), net(GRADIENTS[gradient])
    one.train(), other.train()
    trainer, recorded = on_cpu(one, **OPTIONS[options])
    plain = other.trainer(momentum, **OPTIONS[options])
    assert isinstance(plain.engine, OneProcess)
    for step in range(14):
        x, y = batch(step)
        made, expected = trainer.step(x, target=y), plain.step(x, target=y)
        assert torch.equal(made.output, expected.output)
        assert repr(made.loss) == repr(expected.loss)
    schedules = 2 if options == "unfitted" and gradient != "oracle" else 1  # an oracle is never fitted
    assert len(recorded) == (2 if options == "rates" else schedules), "one for each rate and schedule"
    for (name, value), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


def test_each_kind_of_batch_is_recorded_once(on_cpu: Any) -> None:
    trainer, recorded = on_cpu(net())
    plain = net().trainer(momentum)
    for step in range(16):
        x, y = batch(step, 8 if step % 2 else 5)
        made, expected = (each.step(x, target=y, diagnose=step % 2 == 1) for each in (trainer, plain))
        assert repr(made.diagnostics) == repr(expected.diagnostics)
    assert recorded == [2 * WARM, 2 * WARM + 1]
    for step in range(16, 16 + 2 * MOST * (WARM + 1)):
        trainer.step(*batch(step, 1 + step % 8)[:1], target=batch(step, 1 + step % 8)[1])
    assert len(recorded) <= MOST


def test_what_a_step_gives_is_not_overwritten_by_the_next(on_cpu: Any) -> None:
    trainer, _ = on_cpu(net())
    kept = [trainer.step(*batch(step)[:1], target=batch(step)[1]) for step in range(8)]
    assert len({each.loss.item() for each in kept if each.loss is not None}) == 8


def test_a_loaded_run_is_recorded_anew(on_cpu: Any) -> None:
    """The states of its optimizers are other tensors."""
    trainer, recorded = on_cpu(net())
    plain = net().trainer(momentum)
    for step in range(6):
        for each in (trainer, plain):
            each.step(*batch(step)[:1], target=batch(step)[1])
    state = copy.deepcopy(plain.state_dict())
    trainer.load_state_dict(state)
    for step in range(6, 12):
        losses = [each.step(*batch(step)[:1], target=batch(step)[1]).loss for each in (trainer, plain)]
        assert repr(losses[0]) == repr(losses[1])
    assert recorded == [WARM, 6 + WARM]


def test_a_model_that_reads_sizes_is_recorded(on_cpu: Any) -> None:
    """What sizes decide is the same for batches of one kind."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            if x.size(0) > 6:
                x = x * 2
            out: Tensor = self.last(x)
            return out

    one, other = (dnifx.decouple(Sized(), ["tanh"], args=(X,), loss=cross_entropy) for _ in range(2))
    other.load_state_dict(one.state_dict())
    trainer, recorded = on_cpu(one)
    plain = other.trainer(momentum)
    for step in range(12):
        x, y = batch(step, 8 if step % 2 else 5)
        losses = [each.step(x, target=y).loss for each in (trainer, plain)]
        assert repr(losses[0]) == repr(losses[1])
    assert len(recorded) == 2


def test_a_batch_elsewhere_is_refused(on_cpu: Any) -> None:
    trainer, _ = on_cpu(net())
    with pytest.raises(InputError, match="takes batches on cpu, and a tensor is on meta"):
        trainer.engine.graphs.kind_of(torch.ones(1, device="meta"))
    with pytest.raises(InputError, match="cannot tell one list in a batch from another"):
        trainer.engine.graphs.kind_of([])


class Reads(nn.Module):
    """A model whose Python reads a value, or keeps a number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.last, self.what, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), what, 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.what == "value" and x.sum() > -1000:
            x = x * 2
        if self.what == "counter":
            self.calls += 1
            x = x * (1 + self.calls / 100)
        out: Tensor = self.last(x)
        return out


def reading(what: str) -> DecoupledModule:
    return dnifx.decouple(Reads(what), ["tanh"], args=(X,), loss=cross_entropy)


REFUSED: dict[str, tuple[Callable[[], DecoupledModule], dict[str, Any], type[DnifxError], str]] = {
    "a lag": (net, {"lag": 2}, ScheduleError, "late targets changes from step to step"),
    "late gradients": (lambda: net(Late(1)), {}, ScheduleError, "late targets changes from step to step"),
    "accumulation": (net, {"accumulate": 2}, ScheduleError, "accumulate=2 updates in some steps alone"),
    "a value": (lambda: reading("value"), {}, ScheduleError, "Python reads a value in forward"),
    "a counter": (lambda: reading("counter"), {}, ScheduleError, "what the model keeps in Python (self.calls"),
    "an optimizer": (net, {"optimizer": partial(Adam, lr=0.1)}, OptimizerError, "Adam(parameters, capturable=True)"),
    "a scaler": (net, {"scaler": torch.amp.GradScaler("cpu")}, ScheduleError, "a gradient scaler keeps its state"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_is_refused(case: str, on_cpu: Any) -> None:
    make, options, kind, text = REFUSED[case]
    with pytest.raises(kind) as caught:
        on_cpu(make(), **options)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "needs the model on one CUDA device, and it is on cpu"),
        ({"places": ["cpu:0", "cpu:1", "cpu:1"]}, "places= names others"),
        ({"engine": "graph"}, "engine='graph': there is one by name"),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PlaceError, match=text):
        net().trainer(momentum, **{"engine": "cuda-graph", **options})


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("optimizer", [momentum, partial(Adam, lr=1e-2, capturable=True)], ids=["sgd", "adam"])
def test_a_step_on_a_gpu_is_one_graph(gradient: str, optimizer: Any) -> None:
    trainers = []
    for engine in ("cuda-graph", None):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        own = dnifx.decouple(
            model.cuda(),
            ["2", "4"],
            args=(X.cuda(),),
            gradient=GRADIENTS[gradient],
            context="label",
            num_classes=3,
            loss=cross_entropy,
        )
        trainers.append(own.trainer(optimizer, engine=engine))
    for step in range(12):
        x, y = (each.cuda() for each in batch(step))
        losses = [each.step(x, target=y).loss for each in trainers]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for value, wanted in zip(*(each.net.state_dict().values() for each in trainers), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
