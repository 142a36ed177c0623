"""Operations and the regions they run in: the smallest model of each construct, recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dnifx.errors import CaptureError
from dnifx.passes.capture.record.recording import record
from tests.passes.capture.record.recorded import Wrapped, holds_for, kept, recorded, run


class Unseen(nn.Module):
    """Runs an operation as scripted functions and extensions written in C++ do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            y = x * 2
        return y + 1


def test_operations_that_no_torch_function_shows_are_kept_whole() -> None:
    model = Wrapped(Unseen())
    recording = recorded(model, torch.randn(3, 4))
    assert kept(recording) == ["inner"]
    assert holds_for(recording, model, torch.randn(5, 4))


def test_such_operations_at_the_root_are_refused_with_their_line() -> None:
    with pytest.raises(CaptureError, match=r"which no torch function shows, in forward \(.*return y \+ 1"):
        record(Unseen(), (torch.randn(3, 4),), {})


class Converted(nn.Module):
    """Drops some of its input and converts it in one way."""

    def __init__(self, convert: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.convert = convert

    def forward(self, x: Tensor) -> Any:
        return self.convert(F.dropout(x))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.type(torch.float64),
        lambda x: x.type(dtype=torch.float64),
        lambda x: x.type("torch.DoubleTensor"),
        lambda x: x.type(torch.DoubleTensor),
        lambda x: x.type(x.double().dtype),
        lambda x: x.type(x.dtype) * 2,
        lambda x: x.double() if x.type() == "torch.FloatTensor" else x,
        lambda x: x.half().type_as(x),
    ],
)
def test_a_conversion_is_recorded_and_a_question_for_the_type_is_not(convert: Callable[[Tensor], Any]) -> None:
    model, x = Converted(convert), torch.randn(3, 4)
    recording = recorded(model, x)
    assert not any(isinstance(value, Tensor) for value in recording.constants.values())
    assert holds_for(recording, model, torch.randn(5, 4))


class Square(torch.autograd.Function):
    """A square whose gradient is deliberately not the square's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0] * 7, None


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Square.apply(self.linear(x), 2.0)  # type: ignore[no-untyped-call]
        return y


def test_a_custom_autograd_function_keeps_its_gradient() -> None:
    recording = recorded(CustomFunction(), torch.randn(3, 4))
    assert Square in recording.constants.values()


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 4)
        self.student = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x) * self.scale
            target = target.softmax(-1)
        return self.student(x) - target  # type: ignore[no-any-return]


def test_no_grad_regions_are_kept() -> None:
    recording = recorded(NoGradient(), torch.randn(3, 4))
    answer = run(recording, model := NoGradient())(torch.randn(3, 4))
    answer.sum().backward()
    assert model.teacher.weight.grad is None
    assert model.scale.grad is None


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            exact = x.float() @ x.float().t()
        return self.linear(x) + exact.sum()  # type: ignore[no-any-return]


def test_a_region_without_autocast_is_kept() -> None:
    model, x = Autocast(), torch.randn(4, 4)
    recording = recorded(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(recording, model)(x), model(x))


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4)
        y[:, 0] = x[:, 0]
        y[1:, 2:] += 1
        torch.add(y, 1, out=y)
        view = y[:, 1]
        view.mul_(x[:, 1])
        return y.clamp_(max=3)


def test_writes_in_place_and_out_arguments() -> None:
    class NoGrad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Writes()(x.detach())  # type: ignore[no-any-return]

    recording = recorded(NoGrad(), torch.randn(3, 4))
    assert holds_for(recording, NoGrad(), torch.randn(6, 4))


class Vectorised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = self.linear(x)
        scale = x.mean()
        return torch.vmap(lambda row: (row * scale + shift).cumsum(0))(x)  # type: ignore[no-any-return]


def test_vmap_with_a_closure_over_tensors() -> None:
    model = Vectorised()
    recording = recorded(model, torch.randn(3, 4), torch.randn(4))
    assert holds_for(recording, model, torch.randn(5, 4), torch.randn(4))


class Identities(nn.Module):
    """Calls that return their own argument, in some modes or for some dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(x) + x.contiguous() * 2 + x.to(torch.float32)  # type: ignore[no-any-return]


def test_a_call_that_returns_its_argument_is_not_mistaken_for_it() -> None:
    model = Identities().eval()
    recording = recorded(model, torch.randn(3, 4))
    model.train()
    assert holds_for(recording, model, torch.randn(3, 4))


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


def test_a_functional_dropout_belongs_to_its_mode() -> None:
    model = Functional()
    recording = recorded(model, torch.randn(3, 4))
    training = recording.signature.key((torch.randn(3, 4),), {})
    model.eval()
    assert recording.signature.key((torch.randn(3, 4),), {}) != training
    recorded(model, torch.randn(3, 4))


class Devices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-1], device=x.device)


def test_a_device_is_read_from_its_tensor_each_time() -> None:
    recording = recorded(Devices(), torch.randn(3, 4))
    meta = run(recording, Devices())(torch.randn(3, 4, device="meta"))
    assert meta.device.type == "meta"


class Gradient(nn.Module):
    """A force field: the gradient of an energy is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, position: Tensor) -> Tensor:
        position = position.detach().requires_grad_()
        energy = self.energy(position).sum()
        return torch.autograd.grad(energy, position, create_graph=True)[0]


def test_gradients_taken_in_forward() -> None:
    recorded(Gradient(), torch.randn(4, 3))


def test_every_call_target_survives_code_generation() -> None:
    recording = recorded(NoGradient(), torch.randn(3, 4))
    code = recording.graph.python_code("self").src
    assert (
        "dnifx_runtime_emitted_ops_under(False, None, 'torch.softmax'" in code
        or "dnifx_runtime_emitted_ops_under(False, None, '.softmax'" in code
    )
    names = {node.target for node in recording.graph.nodes if node.op == "call_function"}
    assert all(fx.node._get_qualified_name(target) for target in names)


class Casts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        single = x.to(torch.float32)
        return single + 1, x * 2


def test_a_cast_that_does_nothing_is_kept_apart_from_its_argument() -> None:
    recording = recorded(Casts(), torch.randn(3))
    assert [item.dtype for item in run(recording, Casts())(torch.randn(3).double())] == [torch.float32, torch.float64]
