"""Models that torch compiled: TorchScript inside, torch.compile around, inside, and in place."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError, CutError, DnifxError
from tests.passes.capture.both_targets import Batch, trains_like_the_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


class Net(nn.Module):
    """A layer, a body, and a head."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.body = plain() if body is None else body

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.body(self.first(x))))
        return scores


class Branching(nn.Module):
    """Takes one of two ways by the values, which scripting keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return torch.tanh(self.left(x))
        return torch.tanh(self.right(x))


def gated(x: Tensor) -> Tensor:
    return torch.relu(x) * torch.sigmoid(x)


class WithFunction(Net):
    """Calls a scripted function."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = torch.jit.script(gated)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.gated(self.body(self.first(x))))
        return scores


def compiled_by_torch(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def scripted() -> nn.Module:
    return torch.jit.script(plain())


def with_state() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))


def branching() -> nn.Module:
    return torch.jit.script(Branching())


def traced() -> nn.Module:
    made: nn.Module = torch.jit.trace(plain(), torch.randn(4, 8))
    return made


def loaded() -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(scripted(), file)  # type: ignore[arg-type]
    file.seek(0)
    return torch.jit.load(file)  # type: ignore[no-any-return]


def compiled() -> nn.Module:
    return compiled_by_torch(plain())


CLOSED = [scripted, with_state, branching, traced, loaded, compiled]


def batches(sizes: tuple[int, ...] = (8, 5, 8)) -> list[Batch]:
    torch.manual_seed(2)
    return [((torch.randn(size, 6, dtype=torch.double),), torch.randint(0, 3, (size,))) for size in sizes]


@pytest.mark.parametrize("body", CLOSED)
@pytest.mark.parametrize("cuts", [["first"], ["first", "body"], 3])
def test_a_module_that_was_compiled_is_one_node_and_learns(body: Callable[[], nn.Module], cuts: object) -> None:
    net = trains_like_the_model(lambda: Net(body()), cuts, batches(), nn.CrossEntropyLoss())
    assert [kept.path for kept in net.program.capture.kept] == ["body"]  # type: ignore[union-attr]
    assert not any("_orig_mod" in boundary.name for boundary in net.boundaries)


@pytest.mark.parametrize("body", CLOSED)
def test_a_cut_inside_it_is_refused_with_its_path(body: Callable[[], nn.Module]) -> None:
    inside = "body._orig_mod.0" if body is compiled else "body.left" if body is branching else "body.0"
    with pytest.raises(CutError, match=f"no cut '{inside}': it lies inside 'body', which is kept whole"):
        dnifx.decouple(Net(body()), [inside], args=(torch.randn(4, 6),))


@pytest.mark.parametrize("body", [scripted, compiled])
def test_a_folder_names_what_it_cannot_hold(body: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = dnifx.decouple(Net(body()), ["first"], args=(torch.randn(4, 6),))
    with pytest.raises(DnifxError, match="the module 'body' cannot be saved"):
        net.to_folder(tmp_path / "net")


def test_a_scripted_function_that_was_optimised_before_is_taken() -> None:
    model, x = WithFunction(), torch.randn(8, 6)
    for _ in range(3):
        model(x).sum().backward()
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle")
    assert net.program.capture is not None
    assert net.program.capture.method == "record"


def test_a_scripted_function_is_taken() -> None:
    trains_like_the_model(WithFunction, ["first"], batches(), nn.CrossEntropyLoss())


def test_a_model_that_is_torchscript_itself_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"the model Net is TorchScript.*Decouple the nn.Module that it was made from"
    ):
        dnifx.decouple(torch.jit.script(Net()), ["first"], args=(torch.randn(4, 6),))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("cuts", [["first", "body.0"], 2])
def test_a_compiled_model_is_decoupled_as_the_module_that_it_was_made_of(called: bool, cuts: Any) -> None:
    model = Net()
    whole = compiled_by_torch(model)
    x = torch.randn(4, 6)
    if called:
        whole(x).sum().backward()
    net = dnifx.decouple(whole, cuts, args=(x,), gradient="oracle")
    assert net.original is model
    assert set(model.state_dict()) <= set(net.state_dict())
    assert not any("_orig_mod" in name for name in (*net.state_dict(), *(each.name for each in net.boundaries)))
    assert any("torch.compile" in note for note in net.program.notes)
    assert torch.equal(net(x), model(x))


@pytest.mark.parametrize("where", ["", "body"])
def test_a_module_that_is_compiled_in_place_is_opened(where: str) -> None:
    def make() -> nn.Module:
        model = Net()
        model.get_submodule(where).compile(backend="eager")
        return model

    trains_like_the_model(make, ["first", "body.0"], batches(), nn.CrossEntropyLoss())


@pytest.mark.parametrize("cuts", [["first"], ["body"]])
def test_torchscript_is_compared_as_it_is_written(cuts: list[str]) -> None:
    """Optimised by its second run, TorchScript gives other last bits, and a recording would be refused by chance."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = dnifx.decouple(WithFunction(), cuts, args=(torch.randn(8, 6),))
        assert net.program.capture is not None
        assert net.program.capture.tried == ()
