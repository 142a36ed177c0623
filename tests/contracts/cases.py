"""Cases for the contracts: a random model with cuts and a batch, and its decoupled net."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import CutError, LegalizeError
from dnifx.estimators.base import BoundarySpec
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts import reference
from tests.random_models.cuts import Cuts, cut_sets
from tests.random_models.draft import Draw
from tests.random_models.model import Model
from tests.random_models.strategies import models


class Bent(nn.Module):
    """An estimator of a user's own that is never zero and smooth: ``tanh(value * slope + offset)`` for each value."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        places = enumerate(spec.values)
        self.slopes = nn.ParameterList([torch.tensor(0.7 + 0.1 * i, dtype=v.dtype, device=v.device) for i, v in places])
        self.offset = nn.Parameter(torch.tensor(0.3, dtype=spec.values[0].dtype, device=spec.values[0].device))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.tanh(value * slope + self.offset) for value, slope in zip(values, self.slopes, strict=True))


class Silent(Bent):
    """The same answers, from an estimator that learns nothing and through which no gradient flows."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__(spec)
        self.requires_grad_(False)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return super().forward(values, context)


@dataclass(frozen=True)
class Case:
    """A model, cuts, and the batch that they are tried on."""

    model: Model
    cuts: Cuts
    batch: int = 3
    training: bool = True
    mean: bool = True
    device: str = "cpu"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in self.model.example(self.batch, seed=self.batch))

    @property
    def target(self) -> Tensor:
        return torch.linspace(-1, 2, self.batch, dtype=torch.float64).to(self.device)

    @property
    def loss(self) -> Callable[[object, Tensor], Tensor]:
        return reference.mean_loss if self.mean else reference.sum_loss

    def module(self) -> nn.Module:
        return self.model.build(seed=1).to(self.device).train(self.training)


@st.composite
def cases(draw: Draw, /, without: Iterable[str] = (), training: bool | None = None) -> Case:
    """Draw a case, in training, in evaluation or in either."""
    model = draw(models(without=frozenset(without)))
    modes = [True, False] if training is None else [training]
    return Case(
        model=model,
        cuts=draw(cut_sets(model)),
        batch=draw(st.integers(2, 4)),
        training=draw(st.sampled_from(modes)),
        mean=draw(st.sampled_from([True, True, False])),
    )


def decoupled(case: Case, gradient: Any) -> DecoupledModule:
    """Decouple a case's model; a case whose cuts are refused for a reason is no example of the property."""
    module = case.module()
    reduction: Literal["mean", "sum"] = "mean" if case.mean else "sum"
    try:
        net = dnifx.decouple(
            module, case.cuts, args=case.inputs, gradient=gradient, loss=case.loss, reduction=reduction
        )
    except (CutError, LegalizeError) as error:
        refused(case, error)
    return net.train(case.training)


def refused(case: Case, error: CutError | LegalizeError) -> NoReturn:
    """Leave the example out, if the refusal is one that the case calls for."""
    text = str(error)
    expected = ("leaves nothing behind", "can be cut at", "does not separate", "chose no node", "finds no block")
    if isinstance(error, CutError) and not any(part in text for part in (*expected, "no cut", "no edge")):
        raise AssertionError(f"an unexpected refusal: {text}") from error
    if isinstance(error, LegalizeError) and not case.model.features & {"in-place", "tuple", "attention"}:
        raise AssertionError(f"nothing in the model calls for this refusal: {text}") from error
    reject()


def estimators(net: DecoupledModule) -> dict[str, nn.Module]:
    """Return each boundary's estimator."""
    return {net.boundaries[item.boundary].name: item.estimator for item in net.program.interfaces}


def estimator_parameters(net: DecoupledModule) -> dict[str, nn.Parameter]:
    found = nn.ModuleList(estimators(net).values())
    return dict(found.named_parameters())


def random_state(case: Case) -> Tensor:
    return torch.get_rng_state() if case.device == "cpu" else torch.cuda.get_rng_state()
