"""Record a small model and compare its graph with it: what the tests of single constructs share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.comparison import Comparison, replay
from dnifx.passes.capture.record.recording import record


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph:
    """Record a model and see that its graph repeats it, bit for bit."""
    recording = record(model, args, kwargs)
    recording.graph.lint()
    assert Comparison(model, recording).under_seeds(args, kwargs) == []
    return recording


def holds_for(recording: CapturedGraph, model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the graph repeats the model on other inputs; False where a guard fires."""
    found = Comparison(model, recording).under_seeds(args, kwargs)
    fired = [text for text in found if "a guard fires" in text]
    assert found == fired
    return not fired


def run(recording: CapturedGraph, model: nn.Module) -> Callable[..., Any]:
    return replay(model, recording)


def kept(recording: CapturedGraph) -> list[str]:
    return [one.path for one in recording.kept]


class Wrapped(nn.Module):
    """A module between two linear layers, small beside them, so that it may be kept whole."""

    def __init__(self, inner: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.inner = inner
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.inner(self.first(x))))  # type: ignore[no-any-return]


class SizeBranch(nn.Module):
    """Takes another way for wide inputs: a guard on a size, and no draw."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + x if x.shape[1] > 5 else x
