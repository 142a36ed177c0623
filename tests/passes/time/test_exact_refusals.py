"""What has no exact gradient in time: the error names the operation, and says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import CutError, DnifxError, EstimatorError
from dnifx.estimators import Exact
from dnifx.zoo.cells import LeakyCell, LSTMCell, VanillaCell
from dnifx.zoo.diagonal_cells import MinGRUCell

ZERO = torch.zeros(4, 5)


class Cell(nn.Module):
    """A cell whose next state is given by a function of the layers, the input through one of them, and the state."""

    def __init__(self, change: Callable[[Any, Tensor, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.change = change
        self.enter = nn.Linear(3, 5)
        self.readout = nn.Linear(5, 2)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        left = self.change(self, self.enter(x), state)
        return self.readout(left[0] if isinstance(left, tuple) else left), left


def decouple(model: nn.Module, state: Any = ZERO, gradient: Any = "exact", **options: Any) -> dnifx.DecoupledModule:
    cut = dnifx.Recurrent("state", "1", **options)
    return dnifx.decouple(model, cut, args=(torch.randn(4, 3), state), gradient=gradient, loss=nn.MSELoss())


def rolled(cell: Any, new: Tensor, state: Tensor) -> Tensor:
    return 0.5 * state.roll(1, -1) + new


def written(cell: Any, new: Tensor, state: Tensor) -> Tensor:
    new = new.clone()
    new[:, 1:] += state[:, :-1]
    return new


MIXING: dict[str, tuple[nn.Module, Any, str]] = {
    "vanilla": (VanillaCell(3, 5, 2), ZERO, "RNNCell in module 'core' mixes entries"),
    "leaky": (LeakyCell(3, 5, 2), ZERO, "Linear in module 'across' mixes entries"),
    "lstm": (LSTMCell(3, 5, 2), (ZERO, ZERO), "LSTMCell in module 'core' mixes entries"),
    "product": (Cell(lambda c, new, h: torch.tanh(new + h @ c.readout.weight.t() @ c.readout.weight)), ZERO, "operation matmul"),
    "sum": (Cell(lambda c, new, h: new + h.mean(-1, keepdim=True)), ZERO, "operation mean"),
    "softmax": (Cell(lambda c, new, h: new + h.softmax(-1)), ZERO, "operation softmax"),
    "layer norm": (Cell(lambda c, new, h: c.norm(new + h), norm=nn.LayerNorm(5)), ZERO, "LayerNorm in module 'norm'"),
    "batch norm": (Cell(lambda c, new, h: c.norm(new + h), norm=nn.BatchNorm1d(5)), ZERO, "BatchNorm1d in module 'norm'"),
    "cumulative": (Cell(lambda c, new, h: new + h.cumsum(-1)), ZERO, "operation cumsum"),
    "rolled": (Cell(rolled), ZERO, "move entries of the state to other places"),
    "sorted": (Cell(lambda c, new, h: new + h.sort(-1).values), ZERO, "operation sort"),
    "in place": (Cell(written), ZERO, "mixes entries|other places|writes in place"),
    "examples": (Cell(lambda c, new, h: new + h.mean(0)), ZERO, "operation mean"),
    "layers": (Cell(lambda c, new, h: (0.5 * h[0], c.up(h[0]) + new), up=nn.Linear(5, 5)), (ZERO, ZERO), "cut between the layers"),
    "dropout": (Cell(lambda c, new, h: h + c.drop(new), drop=nn.Dropout()), ZERO, "drop.* draws random numbers"),
    "number of examples": (Cell(lambda c, new, h: h.view(4, 5, 1).squeeze(-1) + new), ZERO, "examples is written in the code"),
    "examples of the input": (Cell(lambda c, new, h: 0.5 * h + c.norm(new), norm=nn.BatchNorm1d(5)), ZERO, "one example at a time"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_entries_of_the_state_is_refused_by_its_name(name: str) -> None:
    model, state, said = MIXING[name]
    with pytest.raises(EstimatorError, match=said) as caught:
        decouple(model, state)
    text = str(caught.value).split("\nwhile decoupling")[0]
    assert "no exact gradient" in text
    assert "SyntheticState()" in text
    assert len(text) < 600


def test_the_default_serves_what_has_no_exact_gradient() -> None:
    for model, state, _ in MIXING.values():
        decouple(model, state, "synthetic")


ENTRY_BY_ENTRY: dict[str, tuple[nn.Module, Any]] = {
    "views": (Cell(lambda c, new, h: (h.view(-1, 5, 1).squeeze(-1) * 0.5).contiguous() + new), ZERO),
    "taken apart": (Cell(lambda c, new, h: torch.cat([each * 0.5 for each in h.split(2, -1)], -1) + new), ZERO),
    "turned": (Cell(lambda c, new, h: (h.t() * 0.5).t() + new), ZERO),
    "in place": (Cell(lambda c, new, h: (h * 0.5).add_(new).tanh_()), ZERO),
    "by columns": (Cell(lambda c, new, h: torch.stack([0.5 * each for each in h.unbind(-1)], -1) + new), ZERO),
    "complex": (Cell(lambda c, new, h: turned(new, *h)), (ZERO, ZERO)),
    "einsum": (Cell(lambda c, new, h: torch.einsum("bn,bn->bn", h, new.sigmoid()) + new), ZERO),
    "twice around": (Cell(lambda c, new, h: h.flip(-1).mul(0.5).flip(-1) + new), ZERO),
    "convolved": (Cell(lambda c, new, h: 0.5 * h + c.conv(new[:, None])[:, 0], conv=nn.Conv1d(1, 1, 3, padding=1)), ZERO),
}  # fmt: skip


def turned(new: Tensor, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    left = torch.complex(real, imaginary) * 0.6j + new
    return left.real, left.imag


@pytest.mark.parametrize("name", ENTRY_BY_ENTRY)
def test_what_goes_entry_by_entry_is_recognised(name: str) -> None:
    net = decouple(*ENTRY_BY_ENTRY[name])
    (each,) = net.program.recurrences
    assert set(each.exact.parameters) >= {"enter.weight", "enter.bias"}
    assert "exact gradient, by a trace" in " ".join(str(net).split())
    homes = dict(zip(each.exact.parameters, each.exact.homes, strict=True))
    assert (homes["enter.weight"] is None) == (name == "convolved")


def test_options_that_need_an_estimator_are_refused() -> None:
    for options in ({"trace": 0.5}, {"auxiliary": True}, {"into_core": True}):
        with pytest.raises(CutError, match="train an estimator, and with gradient='exact' there is none"):
            decouple(MinGRUCell(3, 5, 2), **options)


def test_a_boundary_inside_the_model_has_no_trace() -> None:
    with pytest.raises(EstimatorError, match="is no cut in time"):
        dnifx.decouple(
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ["0"], args=(torch.randn(4, 3),), gradient=Exact()
        )


def test_two_states_that_depend_on_each_other_belong_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 5)

        def forward(self, x: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            one = 0.5 * one + self.enter(x)
            other = 0.5 * other + one
            return other * 2, one, other

    cuts = [dnifx.Recurrent("one", "1"), dnifx.Recurrent("other", "2")]
    with pytest.raises(EstimatorError, match="depends on the state 'one' too, which another cut in time names"):
        dnifx.decouple(Two(), cuts, args=(torch.randn(4, 3), ZERO, ZERO.clone()), gradient="exact")


def test_a_trace_too_large_is_refused_with_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnifx.passes.time.exact.MOST_TRACE_BYTES", 100)
    with pytest.raises(EstimatorError, match=r"GiB for 4 examples, more than .* most of it for 'gate.weight'"):
        decouple(MinGRUCell(3, 5, 2))


def test_a_folder_keeps_no_trace(tmp_path: Any) -> None:
    with pytest.raises(DnifxError, match="cannot be written to a folder, which keeps the state alone"):
        decouple(MinGRUCell(3, 5, 2)).to_folder(tmp_path / "net")


def test_a_state_may_be_the_output_too() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 5)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = 0.5 * state + self.enter(x)
            return state, state

    model, x = Whole(), torch.randn(6, 4, 3)
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x[0], ZERO), gradient="exact")
    state, whole, total = ZERO, ZERO, torch.zeros(())
    for each in x:
        output, state = net(each, state)
        output.square().sum().backward()
        total, whole = total + model(each, whole)[0].square().sum(), model(each, whole)[1]
    torch.testing.assert_close(model.enter.weight.grad, torch.autograd.grad(total, model.enter.weight)[0])
