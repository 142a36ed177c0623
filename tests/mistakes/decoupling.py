"""Mistakes in what ``dnifx.decouple`` is given."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dnifx
from dnifx import estimators
from tests.mistakes.nets import Answering, Tokens, Windows, X, Y, decouple, model, step


def answering(function: Any) -> Any:
    return lambda spec: Answering(function)


def number(_: Any = None) -> None:
    raise ArithmeticError("no such number")


def inside(function: Callable[[], object]) -> object:
    with torch.inference_mode():
        return function()


class Lazy(nn.Module):
    """An estimator without weights before its first call."""

    def __init__(self, spec: estimators.BoundarySpec) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(spec.values[0].shape[-1])


ZEROS = (X, torch.zeros(1, 8, 4))

MISTAKES: Mapping[str, Callable[[], object]] = {
    "the model's class": lambda: decouple(module=nn.Linear),
    "a function in place of a model": lambda: decouple(module=torch.relu),
    "a state dict in place of a model": lambda: decouple(module=model().state_dict()),
    "a model with lazy layers": lambda: decouple(module=nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3))),
    "a TorchScript model": lambda: decouple(module=torch.jit.script(model())),
    "no example": lambda: decouple(args=()),
    "`args=None`": lambda: decouple(args=None),
    "`args=` a dict": lambda: decouple(args={"input": X}),
    "`args=` a data loader": lambda: decouple(args=torch.utils.data.DataLoader([X])),  # type: ignore[arg-type]
    "an example of another dtype": lambda: decouple(args=(X.double(),)),
    "an example of integers": lambda: decouple(args=(X.long(),)),
    "an example of another width": lambda: decouple(args=(X[:, :5],)),
    "a NumPy array": lambda: decouple(args=(X.numpy(),)),
    "an empty batch as example": lambda: decouple(args=(X[:0],)),
    "`kwargs=` a list": lambda: decouple(kwargs=[X]),
    "`kwargs=` a tensor": lambda: decouple(kwargs=X),
    "an unknown argument in `kwargs=`": lambda: decouple(kwargs={"y": X}),
    "an argument given twice": lambda: decouple(kwargs={"input": X}),
    "a cut that is not there": lambda: decouple("9"),
    "a glob that matches nothing": lambda: decouple("layer*"),
    "an empty list of cuts": lambda: decouple([]),
    "`cuts=None`": lambda: decouple(None),
    "`cuts=1.5`": lambda: decouple(1.5),
    "one partition": lambda: decouple(1),
    "more partitions than layers": lambda: decouple(100),
    "`cuts=True`": lambda: decouple(True),
    "a list of numbers as cuts": lambda: decouple([1]),
    "a module as a cut": lambda: decouple(nn.ReLU()),
    "a dict of cuts": lambda: decouple({"1": 1}),
    "a callable cut without an argument": lambda: decouple(lambda: True),
    "a callable cut that fails": lambda: decouple(number),
    "a callable cut that chooses nothing": lambda: decouple(lambda node: False),
    "a cut after the last layer": lambda: decouple("2"),
    "an edge that is not there": lambda: decouple(dnifx.Edge("2", "0")),
    "an edge of numbers": lambda: decouple(dnifx.Edge(1, 2)),  # type: ignore[arg-type]
    "the class `dnifx.Recurrent`": lambda: decouple(dnifx.Recurrent, module=Windows(), args=ZEROS),
    "a state that is no input": lambda: decouple(dnifx.Recurrent("h", "1")),
    "a next state that is no output": lambda: decouple(dnifx.Recurrent("h", "5"), module=Windows(), args=ZEROS),
    "an exact gradient for an RNN": lambda: decouple(
        dnifx.Recurrent("h", "1"), module=Windows(), args=ZEROS, gradient="exact"
    ),
    "an exact gradient inside the model": lambda: decouple(gradient="exact"),
    "an estimator's name misspelt": lambda: decouple(gradient="syntheti"),
    "an estimator's class": lambda: decouple(gradient=estimators.Synthetic),
    "another estimator's class": lambda: decouple(gradient=estimators.Critic),
    "a module as an estimator": lambda: decouple(gradient=nn.Linear(6, 6)),
    "a layer's class as an estimator": lambda: decouple(gradient=nn.Linear),
    "`gradient=None`": lambda: decouple(gradient=None),
    "`gradient=` a list": lambda: decouple(gradient=["zero"]),
    "a factory that returns None": lambda: decouple(gradient=lambda spec: None),
    "a factory without an argument": lambda: decouple(gradient=lambda: nn.Linear(6, 6)),
    "a factory that fails": lambda: decouple(gradient=number),
    "an estimator for a boundary that is not there": lambda: decouple(gradient={"9": "zero"}),
    "a boundary without an estimator": lambda: decouple(["0", "1"], gradient={"0": "zero"}),
    "a negative width": lambda: decouple(gradient=estimators.Synthetic(width=-1)),
    "an estimator that answers with a tensor": lambda: decouple(gradient=answering(lambda v, w: v * w)),
    "an estimator that answers with None": lambda: decouple(gradient=answering(lambda v, w: None)),
    "an estimator that answers with a tuple of None": lambda: decouple(gradient=answering(lambda v, w: (None,))),
    "an estimator with lazy layers": lambda: decouple(gradient=Lazy),
    "`dnifx.decouple` under inference mode": lambda: inside(decouple),
    "a net that is decoupled already": lambda: decouple(module=decouple()),
    "a model that was made under inference mode": lambda: decouple(module=inside(model)),
    "an estimator that answers with a list": lambda: decouple(gradient=answering(lambda v, w: [v * w])),
    "an answer of another shape": lambda: decouple(gradient=answering(lambda v, w: (v[:, :2] * w,))),
    "an answer that is a mean": lambda: decouple(gradient=answering(lambda v, w: (v.mean(0, keepdim=True) * w,))),
    "too many answers": lambda: decouple(gradient=answering(lambda v, w: (v * w, v * w))),
    "an answer of another dtype": lambda: decouple(gradient=answering(lambda v, w: ((v * w).double(),))),
    "an answer of integers": lambda: decouple(gradient=answering(lambda v, w: ((v * w).long(),))),
    "a detached answer": lambda: decouple(gradient=answering(lambda v, w: ((v * w).detach(),))),
    "an estimator that takes one argument": lambda: decouple(gradient=lambda spec: nn.Linear(6, 6)),
    "an unknown context": lambda: decouple(context="labels", num_classes=3),
    "labels without `num_classes=`": lambda: decouple(context="label"),
    "labels of one class": lambda: decouple(context="label", num_classes=1),
    "`num_classes=` as text": lambda: decouple(context="label", num_classes="3"),
    "`num_classes=` as a float": lambda: decouple(context="label", num_classes=3.0),
    "`num_classes=` without a context": lambda: decouple(num_classes=3),
    "a class as a context": lambda: decouple(context=nn.Linear, num_classes=3),
    "features of another width": lambda: step(context=lambda y: F.one_hot(y, 4).float(), num_classes=3),
    "a context that fails": lambda: step(context=lambda y: y["label"], num_classes=3),
    "a mask that is not there": lambda: decouple(mask="mask"),
    "a mask as a tensor": lambda: decouple(mask=torch.ones(8, 6)),
    "a mask of another length": lambda: decouple(
        "embed", Tokens(), (torch.randn(8, 5, 6),), kwargs={"mask": torch.ones(8, 4)}, mask="mask"
    ),
    "a loss as text": lambda: decouple(loss="mse"),
    "a loss as a number": lambda: decouple(loss=1.0),
    "a loss's class": lambda: decouple(loss=nn.CrossEntropyLoss),
    "a mapping of losses without rates": lambda: decouple(loss={"a": F.cross_entropy}),
    "an unknown reduction": lambda: decouple(reduction="average"),
    "a reduction against the loss": lambda: decouple(loss=nn.CrossEntropyLoss(reduction="sum"), reduction="mean"),
    "an unknown synthetic input": lambda: decouple(inputs="syntheti"),
    "a module as a synthetic input": lambda: decouple(inputs=nn.Linear(6, 6)),
    "a class as a synthetic input": lambda: decouple(inputs=nn.Linear),
    "a rate for what is not there": lambda: decouple(every={"slow": 4}),
    "a rate of 0": lambda: decouple(every={"2": 0}),
    "`every=4`": lambda: decouple(every=4),
    "`callback=` as text": lambda: decouple(callback="print"),
    "a label beyond `num_classes=`": lambda: step(context="label", num_classes=2),
    "a negative label": lambda: step(context="label", num_classes=3, named={"context": Y - 1}),
    "labels as floats": lambda: step(context="label", num_classes=3, named={"context": Y.float()}),
    "labels as a list": lambda: step(context="label", num_classes=3, named={"context": Y.tolist()}),
    "labels of another batch": lambda: step(context="label", num_classes=3, named={"context": Y[:5]}),
}
