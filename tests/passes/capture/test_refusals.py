"""What capture refuses, in words: the reason first, then the remedy, then what each method met; short, and no blame."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError, DnifxError
from dnifx.passes.capture.refusals import Refused, no_method

CALLS = itertools.count()
"""State that no module holds."""


class Base(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x))


class Broken(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) @ torch.ones(99, 1)


class NoBackward(Base):
    def forward(self, x: Tensor) -> Any:
        h = super().forward(x).exp()
        return h.add_(1)


class TensorHook(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        h.register_hook(lambda gradient: gradient * 2)
        return self.last(h)


class OutsideState(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * next(CALLS)


class Transform(Base):
    def forward(self, x: Tensor) -> Any:
        jacobian = torch.func.jacrev(self.first)(x[0])
        return self.last(torch.vmap(lambda row: row * 2)(jacobian)[:2] + self.first(x)[:2])


class Stream(Base):
    def forward(self, x: Tensor) -> Any:
        return (row for row in super().forward(x))


class Lazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(4)


class Uncuttable(nn.Module):
    """Holds the module in which nothing can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.only(x)


REFUSED: dict[str, tuple[type[nn.Module], Any, str]] = {
    "the model fails": (
        Broken,
        ["first"],
        r"Broken fails on the example inputs: RuntimeError: mat1 and mat2.*test_refusals",
    ),
    "its backward pass fails": (NoBackward, ["first"], "backward pass of NoBackward fails .* modified by an inplace"),
    "an effect": (
        TensorHook,
        ["first"],
        r"TensorHook cannot be captured: .*register_hook\(\).*test_refusals.py:\d+: h.reg",
    ),
    "state that nothing shows": (
        OutsideState,
        ["first"],
        "OutsideState cannot be captured: its graph differs from the model",
    ),
    "a transform of parameters": (Transform, ["first"], "Transform cannot be captured: .*torch.func transform"),
    "a stream": (Stream, ["first"], "Stream returns a generator"),
    "a lazy parameter": (Lazy, ["first"], "Lazy cannot be captured: the parameter 'first.weight' has no shape"),
    "a number of cuts": (Uncuttable, 2, "cuts=2 asks for 2 partitions, but Uncuttable can be cut at no places"),
}

REMEDY = re.compile(r"\b(Move|Give|Cut|Return|Decouple|Run|Keep|Switch|[Cc]hange|[Nn]ame)\b")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_gives_the_reason_first_and_then_the_remedy(name: str) -> None:
    kind, cuts, reason = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(DnifxError) as caught:
        dnifx.decouple(kind(), cuts, args=(torch.randn(4, 4),))
    text = str(caught.value)
    first, *others = text.splitlines()
    assert re.search(reason, first)
    assert REMEDY.search(text)
    assert len(text) < 600
    assert len(others) <= 5
    assert len(set(others)) == len(others)
    assert not re.search(r"deepcopy|copy\.py|passes/|0 places|or fewer", text)
    assert caught.type.__module__ == "dnifx.errors"


def test_each_method_is_named_once_and_its_text_is_short() -> None:
    same = Refused("no graph repeats this " + "at length " * 80, "Move it. " * 60)
    tried = [("record", same), ("record_cuts", same), ("export", CaptureError("it is not\nat all")), ("symbolic", same)]
    lines = str(no_method("Model", tried)).splitlines()
    assert lines[0].startswith("Model cannot be captured: no graph repeats this at length")
    assert "Move it. Move it." in lines[0]
    assert lines[1:] == ["other methods met:", "  export: it is not"]
    assert len("\n".join(lines)) < 600
