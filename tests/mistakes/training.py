"""Mistakes in what a trainer, a schedule, a step and a call of the net are given."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import dnifx
from tests.mistakes.nets import X, Y, decouple, four_steps, model, second_step, sgd, step, trainer, windows

NAN = float("nan")


def in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(8, 6)


def step_in_inference_mode() -> object:
    made = trainer()
    with torch.inference_mode():
        return made.step(X, target=Y)


def of_a_number(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.tensor(F.cross_entropy(output, target).item(), requires_grad=True)


def transformed() -> object:
    net = decouple()
    return torch.func.grad(lambda x: net(x).sum())(X)


def assigned() -> object:
    made = trainer()
    made.net.load_state_dict({name: value.clone() for name, value in made.net.state_dict().items()}, assign=True)
    return made.step(X, target=Y)


def stepped(scheduler: Callable[[torch.optim.Optimizer], object], metric: object = None) -> object:
    made = trainer(given={"lr_scheduler": scheduler})
    return [made.step(X, target=Y, metric=metric) for _ in range(3)]


def made_already() -> torch.optim.Optimizer:
    return sgd(model().parameters())


TRAINER: Mapping[str, Callable[[], object]] = {
    "no loss": lambda: trainer(loss=None),
    "`optimizer=None`": lambda: trainer(optimizer=None),
    "an optimizer's name": lambda: trainer(optimizer="adam"),
    "an optimizer that is made already": lambda: trainer(optimizer=made_already()),
    "`optimizer={name: instance}`": lambda: trainer(optimizer=dict.fromkeys(("submod_0", "submod_1"), made_already())),
    "a partition without an optimizer": lambda: trainer(optimizer={"submod_0": sgd}),
    "an optimizer of other parameters": lambda: trainer(optimizer=lambda p: made_already()),
    "an optimizer of some parameters": lambda: trainer(optimizer=lambda p: sgd(p[:1])),
    "a callable that returns no optimizer": lambda: trainer(optimizer=lambda p: 0.1),
    "a negative learning rate": lambda: trainer(optimizer=lambda p: torch.optim.SGD(p, lr=-1)),
    "LBFGS": lambda: trainer(optimizer=torch.optim.LBFGS),
    "a scheduler that is made already": lambda: trainer(given={"lr_scheduler": StepLR(made_already(), 2)}),
    "a scheduler's class that needs more": lambda: trainer(given={"lr_scheduler": StepLR}),
    "a callable that returns no scheduler": lambda: trainer(given={"lr_scheduler": lambda optimizer: None}),
    "`clip=0`": lambda: trainer(given={"clip": 0}),
    "`accumulate=0`": lambda: trainer(given={"accumulate": 0}),
    "`lag=-1`": lambda: trainer(given={"lag": -1}),
    "a number as a scaler": lambda: trainer(given={"scaler": 1024.0}),
    "`autocast=True`": lambda: trainer(given={"autocast": True}),
    "a scaler of parameters in float16": lambda: trainer(
        module=model().half(), args=(X.half(),), given={"scaler": torch.amp.GradScaler("cpu")}
    ),
    "a scheduler of too few steps": lambda: stepped(lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=1)),
    "a metric that is no number": lambda: stepped(ReduceLROnPlateau, metric="good"),
    "an unknown word for replicas": lambda: trainer(given={"replicas": "mean"}),
}

SCHEDULES: Mapping[str, Callable[[], object]] = {
    "a schedule's name misspelt": lambda: trainer("random"),
    "`schedule=None`": lambda: trainer(None),
    "a number as a schedule": lambda: trainer(3),
    "an empty schedule": lambda: trainer(""),
    "an unknown action": lambda: trainer("F0 X0"),
    "actions in a wrong order": lambda: trainer("B0 F0 S0 U0 F1 B1 T0 M0 U1"),
    "an action that is missing": lambda: trainer("F0 S0 B0 U0 F1 B1 U1"),
    "an action twice": lambda: trainer("F0 F0 S0 B0 U0 F1 B1 T0 M0 U1"),
    "a partition that is not there": lambda: trainer("F0 F9"),
    "an unknown option of a schedule": lambda: trainer("random_order{q=1}"),
    "a probability above 1": lambda: trainer("random_order{p=2}"),
    "a warm-up of -1 steps": lambda: trainer("warm_up{steps=-1}"),
    "unlocked without synthetic inputs": lambda: trainer("unlocked{p=0.5}"),
    "a list of actions": lambda: trainer(["F0"]),
}

STEPS: Mapping[str, Callable[[], object]] = {
    "no input": lambda: trainer().step(target=Y),
    "an unknown argument": lambda: step(named={"mask": X}),
    "a context that nobody sees": lambda: step(named={"context": Y}),
    "a tuple in place of a tensor": lambda: step((X,)),
    "None in place of a tensor": lambda: step(None),
    "an input of another width": lambda: step(X[:, :5]),
    "an input of another dtype": lambda: step(X.half()),
    "an input on another device": lambda: step(X.to("meta")),
    "an input from inference mode": lambda: step(in_inference_mode()),
    "a step under inference mode": step_in_inference_mode,
    "an input that is NaN": lambda: step(X * NAN),
    "an empty batch": lambda: second_step(X[:0], Y[:0]),
    "a target of another batch": lambda: step(target=Y[:3]),
    "a target of another batch, later": lambda: second_step(X, Y[:3]),
    "a target of floats": lambda: step(target=Y.float()),
    "a target beyond the classes": lambda: step(target=Y + 5),
    "a target as a list": lambda: step(target=Y.tolist()),
    "`target=None`": lambda: step(target=None),
    "a target that would be broadcast": lambda: step(loss=F.mse_loss, target=torch.zeros(8, 1)),
    "a loss of one argument": lambda: step(loss=lambda output: output.sum()),
    "a loss that fails": lambda: step(loss=lambda output, target: output.logits),
    "a loss that is a float": lambda: step(loss=lambda output, target: F.cross_entropy(output, target).item()),
    "a loss without a gradient": lambda: step(loss=lambda output, target: F.cross_entropy(output, target).detach()),
    "a loss that is made of a number": lambda: step(loss=of_a_number),
    "a loss that is a matrix": lambda: step(loss=lambda output, target: output),
    "a loss that is a tuple": lambda: step(loss=lambda output, target: (output.sum(), output)),
    "a complex loss": lambda: step(loss=lambda output, target: output.sum() * 1j),
    "a loss of a wrong length": lambda: step(loss=lambda output, target: output.sum(0)),
    "a loss that sums": lambda: step(loss=lambda output, target: F.cross_entropy(output, target, reduction="sum")),
    "a loss that is NaN": lambda: step(loss=lambda output, target: F.cross_entropy(output, target) * NAN),
    "a loss that is None, later": lambda: four_steps(lambda output, target: None),
    "a loss that is detached, later": lambda: four_steps(lambda output, target: output.sum().detach()),
    "a loss of another form, later": lambda: four_steps(
        lambda output, target: F.cross_entropy(output, target, reduction="none")
    ),
    "a loss that fails, later": lambda: four_steps(lambda output, target: output + torch.ones(99)),
    "weights that are assigned, later": assigned,
    "a probe with a wrong target": lambda: trainer().probe(X, target=Y[:3]),
    "a probe of a period without rates": lambda: trainer().probe_period([(X, Y)]),
    "a reset of another number of examples": lambda: windows().reset(torch.ones(3)),
    "a reset by a word": lambda: windows().reset("all"),
    "a smaller batch with a carried state": lambda: windows().step(X[:3], target=Y[:3]),
    "a state of another number of examples": lambda: windows().step(X, torch.zeros(1, 3, 4), target=Y),
    "the net without its context": lambda: decouple(context="label", num_classes=3)(X),
    "the net with a label beyond its classes": lambda: decouple(context="label", num_classes=2)(X, context=Y),
    "one-hot labels as the context": lambda: decouple(context="label", num_classes=3)(X, context=F.one_hot(Y, 3)),
    "labels as a column": lambda: step(
        context="label",
        num_classes=3,
        loss=lambda output, target: F.cross_entropy(output, target[:, 0]),
        target=Y[:, None],
    ),
    "the net with an empty batch": lambda: decouple()(X[:0]),
    "the net with an input from inference mode": lambda: decouple()(in_inference_mode()),
    "the net in a transform of functions": transformed,
    "the net with too many inputs": lambda: decouple()(X, X),
    "the net with an input of another width": lambda: decouple()(X[:, :5]),
    "the net with an input of another dtype": lambda: decouple()(X.double()),
    "the net where an estimator needs the target": lambda: decouple(
        gradient=dnifx.estimators.DirectFeedback(), context="label", num_classes=3
    )(X, context=Y.float()),
}
