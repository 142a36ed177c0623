"""Functions that are recorded as one call, and call modules or read parameters by themselves: their partition trains these."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from tests.passes.capture.both_targets import Batch, trained, trains_like_the_model


class Adjoint(torch.autograd.Function):
    """Solves an ODE by Euler steps; its gradient solves the adjoint ODE. The field's parameters are among its arguments."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, h: Tensor, *parameters: Tensor) -> Tensor:
        ctx.field = field
        for _ in range(4):
            h = h + 0.25 * field(h)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (h,), (g,) = ctx.saved_tensors, gradients
        parameters = list(ctx.field.parameters())
        total = [torch.zeros_like(each) for each in parameters]
        for _ in range(4):
            with torch.enable_grad():
                z = h.detach().requires_grad_()
                y = ctx.field(z)
                gz, *gp = torch.autograd.grad(y, [z, *parameters], g)
            h, g = h - 0.25 * y.detach(), g + 0.25 * gz
            total = [a + 0.25 * b for a, b in zip(total, gp, strict=True)]
        return (None, g, *total)


class Reversible(torch.autograd.Function):
    """Reversible residual blocks, held in a plain list; the blocks' parameters get their gradients inside the backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, blocks: list["Couple"]) -> Tensor:
        ctx.blocks = blocks
        a, b = h.chunk(2, -1)
        for block in blocks:
            a, b = a + block.f(b), b
            b = b + block.g(a)
        ctx.ends = a.detach(), b.detach()
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        a, b = ctx.ends
        ga, gb = gradients[0].chunk(2, -1)
        for block in reversed(ctx.blocks):
            with torch.enable_grad():
                a = a.requires_grad_()
                g = block.g(a)
                g.backward(gb)
            b, ga, a = (b - g).detach(), ga + a.grad, a.detach()
            with torch.enable_grad():
                b = b.requires_grad_()
                f = block.f(b)
                f.backward(ga)
            a, gb, b = (a - f).detach(), gb + b.grad, b.detach()
        return torch.cat([ga, gb], -1), None


class Scale(torch.autograd.Function):
    """Multiplies by a parameter that an object holds, and gives the parameter its gradient by hand."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, holder: "Holder") -> Tensor:
        ctx.holder, ctx.h = holder, h.detach()
        return h * torch.exp(holder.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight = ctx.holder.weight
        given = (gradients[0] * ctx.h * torch.exp(weight)).sum(0).detach()
        weight.grad = given if weight.grad is None else weight.grad + given
        return gradients[0] * torch.exp(weight), None


class Couple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.g = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


class Holder:
    """Holds a parameter of a module."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight


class Ends(nn.Module):
    """A layer before and a layer after the function."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 8), nn.Linear(8, 2)

    def inside(self, h: Tensor) -> Tensor:
        """Call the function."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.leave(self.inside(torch.tanh(self.enter(x))))
        return scores


class AdjointNet(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def inside(self, h: Tensor) -> Tensor:
        made: Tensor = Adjoint.apply(self.field, h, *self.field.parameters())
        return made


class ReversibleNet(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Couple() for _ in range(2))

    def inside(self, h: Tensor) -> Tensor:
        made: Tensor = Reversible.apply(h, list(self.blocks))
        return made


class Wrapped(nn.Module):
    """The function is called by a submodule, which may be kept whole, and by two of them in a row."""

    def __init__(self, kind: type[Ends]) -> None:
        super().__init__()
        self.first, self.second = kind(), kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class ScaleNet(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.holder = Holder(self.weight)

    def inside(self, h: Tensor) -> Tensor:
        made: Tensor = Scale.apply(h, self.holder)
        return made


class EachExample(Ends):
    """A module under ``torch.vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(8, 8)

    def inside(self, h: Tensor) -> Tensor:
        made: Tensor = torch.vmap(lambda row: torch.tanh(self.each(row)))(h)
        return made


KINDS = [AdjointNet, ReversibleNet, ScaleNet, EachExample]


def batches() -> list[Batch]:
    torch.manual_seed(1)
    return [((torch.randn(5, 2, dtype=torch.double),), torch.randn(5, 2, dtype=torch.double)) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [["enter"], 2])
def test_the_partition_of_the_call_trains_what_the_function_reads(kind: type[Ends], cuts: Any) -> None:
    net = trains_like_the_model(kind, cuts, batches(), nn.MSELoss())
    held = [name for name, _ in net.original.named_parameters()]
    assert sorted(name for each in net.partitions for name in each.parameters) == sorted(held)
    assert not [name for name in net.state_dict() if "constants" in name or "kind0" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [["first"], ["first.enter", "second.enter"]])
def test_the_function_may_be_called_by_submodules(kind: type[Ends], cuts: list[str]) -> None:
    trains_like_the_model(lambda: Wrapped(kind), cuts, batches(), nn.MSELoss())


def test_a_cut_at_a_module_that_a_function_calls_is_refused_with_the_functions_name() -> None:
    for name in ("field", "field.0"):
        with pytest.raises(dnifx.errors.CutError, match=f"no cut '{name}': it is called inside 'Adjoint', a function"):
            dnifx.decouple(AdjointNet(), [name], args=(torch.randn(4, 2),))


class Counted(AdjointNet):
    """The function's module has running averages, and is called before the function too."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

    def inside(self, h: Tensor) -> Tensor:
        return super().inside(h + self.field(h))


def test_calls_of_the_same_module_inside_and_outside_keep_their_order() -> None:
    trains_like_the_model(Counted, ["enter"], batches(), nn.MSELoss())


@pytest.mark.parametrize("kind", [AdjointNet, ReversibleNet, ScaleNet])
def test_a_folder_trains_what_the_function_reads(
    kind: type[Ends], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(kind().double(), ["enter"], args=batches()[0][0], gradient="zero", loss=nn.MSELoss())
    net.to_folder(tmp_path / f"emitted_{kind.__name__}")
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    emitted = importlib.import_module(f"emitted_{kind.__name__}").Net()
    found = trained(emitted, emitted, batches(), nn.MSELoss())
    wanted = trained(net, net, batches(), nn.MSELoss())
    for path, _ in net.original.named_parameters():
        torch.testing.assert_close(found[path], wanted[path])
