"""Each construct that has broken a recorder of models, by the smallest model that has it."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dnifx.errors import CaptureError
from dnifx.passes.capture.record import Recording, finish_draws, record, replay, runnable, verify
from dnifx.passes.capture.record.state import python_draws, seed
from dnifx.runtime.emitted.checkpoints import regions_of
from dnifx.runtime.emitted.ops import GuardError


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> Recording:
    """Record a model and see that its graph repeats it, bit for bit."""
    recording = record(model, args, kwargs)
    recording.graph.lint()
    assert verify(model, recording.graph, recording.constants, recording.signature, args, kwargs) == []
    return recording


def holds_for(recording: Recording, model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the graph repeats the model on other inputs; False where a guard fires."""
    found = verify(model, recording.graph, recording.constants, recording.signature, args, kwargs)
    fired = [text for text in found if "a guard fires" in text]
    assert found == fired
    return not fired


def run(recording: Recording, model: nn.Module) -> Callable[..., Any]:
    return replay(model, recording.graph, recording.constants, recording.signature)


def kept(recording: Recording) -> list[str]:
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


class DataBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def test_a_branch_on_computed_values_keeps_the_smallest_module_whole() -> None:
    model = Wrapped(DataBranch())
    recording = recorded(model, torch.randn(3, 4))
    assert kept(recording) == ["inner"]
    assert "test_recording_hazards.py" in recording.kept[0].reason
    assert "if x.sum() > 0" in recording.kept[0].reason
    for _ in range(6):
        assert holds_for(recording, model, torch.randn(3, 4))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.linear(x)
        return x if bool(mask.all()) else x * mask[:, None]


def test_a_branch_on_the_inputs_alone_is_guarded() -> None:
    model = Masked()
    full, ragged = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    recording = recorded(model, torch.randn(3, 4), full)
    assert (kept(recording), recording.guards) == ([], 1)
    with pytest.raises(GuardError, match="saw True when it was captured and now sees False"):
        run(recording, model)(torch.randn(3, 4), ragged)
    other = recorded(model, torch.randn(3, 4), ragged)
    assert not holds_for(other, model, torch.randn(3, 4), full)


class SizeBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + x if x.shape[1] > 5 else x


def test_a_branch_on_a_size_is_guarded_and_holds_on_its_side() -> None:
    model = SizeBranch()
    recording = recorded(model, torch.randn(2, 4))
    assert holds_for(recording, model, torch.randn(9, 3))
    assert not holds_for(recording, model, torch.randn(2, 6))


class UnrolledOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return state


def test_a_loop_over_a_size_is_unrolled_and_guarded() -> None:
    model = UnrolledOverTime()
    recording = recorded(model, torch.randn(2, 4, 3))
    assert sum(node.target == "cell" for node in recording.graph.nodes) == 4
    assert holds_for(recording, model, torch.randn(5, 4, 3))
    assert not holds_for(recording, model, torch.randn(2, 3, 3))


class Pieces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([piece.sum(0) * index for index, piece in enumerate(x.split(2))]).sum(0)  # type: ignore[no-untyped-call]


def test_the_number_of_pieces_is_guarded() -> None:
    model = Pieces()
    recording = recorded(model, torch.randn(4, 3))
    assert holds_for(recording, model, torch.randn(3, 3))
    assert not holds_for(recording, model, torch.randn(6, 3))


class Arithmetic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        half, rest = divmod(length, 2)
        x = x[:, : half * 2].reshape(batch * half, -1) / math.ceil(batch / 2)
        return x.view(batch, half, 2 * width).sum(1) * (1 + rest) + float(width) ** -0.5 + x.numel() // batch  # type: ignore[no-any-return]


def test_arithmetic_on_sizes_stays_symbolic() -> None:
    model = Arithmetic()
    recording = recorded(model, torch.randn(2, 5, 4))
    assert recording.guards == 1  # float(width)
    for batch, length in ((3, 5), (1, 8), (4, 2)):
        assert holds_for(recording, model, torch.randn(batch, length, 4))


def test_strides_stay_symbolic() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows, width = x.size()
            outer, inner = x.stride()
            return x.as_strided((rows, width - 1, 2), (outer, inner, inner)).sum(-1)

    recording = recorded(Windows(), torch.randn(3, 5))
    assert holds_for(recording, Windows(), torch.randn(4, 7))


class Experts(nn.Module):
    """Mixture of experts: every token goes where the router sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = (choice == index).nonzero().flatten()
            if chosen.numel() > 0:
                out[chosen] = expert(x[chosen])
        return out


def test_experts_are_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4), Experts(), nn.Linear(4, 64), nn.Linear(64, 4))
    recording = recorded(model, torch.randn(6, 4))
    assert kept(recording) == ["2"]
    for _ in range(4):
        assert holds_for(recording, model, torch.randn(6, 4))


class TorchLayerDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(1) < 0.5 else x * 3


class PythonLayerDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else x * 3


class NumpyNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.random.rand(4)).to(x)


@pytest.mark.parametrize("kind", [TorchLayerDrop, PythonLayerDrop, NumpyNoise])
def test_random_control_flow_is_kept_whole(kind: type[nn.Module]) -> None:
    model = Wrapped(kind())
    recording = record(model, (torch.randn(3, 4),), {})
    assert kept(recording) == ["inner"]
    assert not recording.volatile
    found = verify(
        model, recording.graph, recording.constants, recording.signature, (torch.randn(3, 4),), {}, seeds=range(6)
    )
    assert found == []


def test_pythons_random_numbers_at_the_root_make_a_recording_volatile() -> None:
    assert record(PythonLayerDrop(), (torch.randn(3),), {}).volatile
    assert not record(SizeBranch(), (torch.randn(3, 4),), {}).volatile


@pytest.mark.parametrize("kind", [PythonLayerDrop, NumpyNoise])
def test_a_volatile_recording_is_faithful_to_the_step_it_was_made_for(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, 4)
    for number in range(4):
        seed(number)
        recording = record(model, (x,), {})
        assert recording.volatile
        assert recording.after is not None
        got = run(recording, model)(x)
        finish_draws(recording.after)
        state = python_draws()
        seed(number)
        assert torch.equal(got, model(x))
        assert python_draws() == state


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_python_state_keeps_the_module_whole() -> None:
    model = Wrapped(Counter())
    recording = recorded(model, torch.randn(3, 4))
    assert kept(recording) == ["inner"]
    assert model.inner.calls == 0
    assert record(Counter(), (torch.randn(3),), {}).volatile


class Memory(nn.Module):
    """A module whose tensors leave by another door: an attribute that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.linear(x)
        return x + 1


class ReadsMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x)) + self.memory.seen  # type: ignore[no-any-return]


def test_a_tensor_that_leaves_by_an_attribute_opens_the_module() -> None:
    model, x = ReadsMemory(), torch.randn(2, 4)
    recording = record(model, (x,), {}, open_paths=())
    assert verify(model, recording.graph, recording.constants, recording.signature, (x,), {}) == []
    assert "memory.linear" in [node.target for node in recording.graph.nodes]
    recorded(ReadsMemory(), torch.randn(2, 4))


class Cache:
    """A plain object that modules fill."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(self.key(x))
        return x + sum(cache.keys)


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x, cache


@pytest.mark.parametrize("open_paths", [None, ()])
def test_a_cache_comes_back_in_its_own_type(open_paths: tuple[str, ...] | None) -> None:
    model, x = WithCache(), torch.randn(2, 4)
    recording = record(model, (x,), {}, open_paths=open_paths)
    assert verify(model, recording.graph, recording.constants, recording.signature, (x,), {}) == []
    first, second = (run(recording, model)(x)[1] for _ in range(2))
    assert type(first) is Cache
    assert first is not second
    assert len(second.keys) == 3
    assert torch.equal(second.keys[2], model(x)[1].keys[2])


def test_a_cache_goes_in() -> None:
    cache = Cache()
    cache.keys.append(torch.randn(2, 4))
    recording = recorded(Attention(), torch.randn(2, 4), cache)
    assert recording.signature.inputs == ("x", "cache_keys_0")


@dataclass
class Output:
    hidden: Tensor
    loss: Tensor | None = None
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = [self.hidden, *self.history]


def test_a_dataclass_with_a_post_init_comes_back_as_it_was() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x * 2, history=[x])

    recording = recorded(Model(), torch.randn(3))
    answer = run(recording, Model())(torch.ones(3))
    assert type(answer) is Output
    assert [float(item[0]) for item in answer.history] == [2.0, 1.0]


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
    with pytest.raises(CaptureError, match=r"which no torch function shows[^\n]*in module '<root>'\n.*return y \+ 1"):
        record(Unseen(), (torch.randn(3, 4),), {})


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


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.lstm(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        return self.head(padded).sum(1)  # type: ignore[no-any-return]


def test_packed_sequences() -> None:
    model = Packed()
    recording = recorded(model, torch.randn(3, 6, 3), torch.tensor([6, 2, 4]))
    assert "lstm" in [node.target for node in recording.graph.nodes]
    assert holds_for(recording, model, torch.randn(3, 6, 3), torch.tensor([5, 6, 1]))


class MadeInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.5))(x)  # type: ignore[no-any-return]


class ParametersMadeInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(4, 4)(x)  # type: ignore[no-any-return]


def test_modules_made_in_forward() -> None:
    recorded(MadeInForward(), torch.randn(3, 4))
    model = Wrapped(ParametersMadeInForward())
    assert holds_for(recorded(model, torch.randn(3, 4)), model, torch.randn(5, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = self.middle

    def forward(self, ids: Tensor) -> Tensor:
        x = self.alias(self.middle(self.embedding(ids)))
        return self.head(x) + F.linear(x, self.embedding.weight)  # type: ignore[no-any-return]


def test_shared_parameters_and_modules() -> None:
    recording = recorded(Tied(), torch.randint(0, 9, (2, 3)))
    targets = [node.target for node in recording.graph.nodes if node.op == "call_module"]
    assert targets == ["embedding", "middle", "middle", "head"]
    assert [node.target for node in recording.graph.nodes if node.op == "get_attr"] == ["embedding.weight"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU())
        self.last = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x)
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    recording = recorded(Checkpointed(reentrant), torch.randn(3, 4))
    assert "block.0" in [node.target for node in recording.graph.nodes]
    (region,) = {region for node in recording.graph.nodes for region in regions_of(node)}
    assert "checkpoint(self.block, x" in region.place
    assert [node.target for node in recording.graph.nodes if regions_of(node)] == ["block.0", "block.1", "block.2"]
    whole = record(Wrapped(Checkpointed(reentrant)), (torch.randn(3, 4),), {}, keep_whole=("inner",))
    assert not any(regions_of(node) for node in whole.graph.nodes)


def test_forward_hooks_run_as_they_do_in_the_model() -> None:
    model = Wrapped(nn.ReLU())
    model.inner.register_forward_hook(lambda module, args, output: output * 2)
    recording = recorded(model, torch.randn(3, 4))
    model.middle.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert holds_for(recording, model, torch.randn(3, 4))


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


class ReplacesBuffer(nn.Module):
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
        return x - self.running


class AddsToBuffer(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return x / self.steps


def test_buffers_changed_in_forward() -> None:
    recording = recorded(Wrapped(ReplacesBuffer()), torch.randn(3, 4))
    assert kept(recording) == ["inner"]
    with pytest.raises(CaptureError, match=r"replaces the buffer self\.running"):
        record(ReplacesBuffer(), (torch.randn(3, 4),), {})
    model = AddsToBuffer()
    recording = recorded(model, torch.randn(3, 4))
    assert int(model.steps) == 0
    run(recording, model)(torch.ones(1, 4))
    assert int(model.steps) == 1


def test_parametrised_modules_are_leaves() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    recording = recorded(model, torch.randn(3, 4))
    assert [node.target for node in recording.graph.nodes if node.op == "call_module"] == ["0", "1"]


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scaled = {name: parameter * self.scale for name, parameter in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, scaled, (x,))  # type: ignore[no-any-return]


def test_functional_call_uses_the_parameters_it_was_given() -> None:
    recorded(Swapped(), torch.randn(3, 4))


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


class Items(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        number = count.max().item()
        return x[: int(number)] if number > 0 else x


def test_numbers_read_from_inputs_are_guarded() -> None:
    recording = recorded(Items(), torch.randn(5, 2), torch.tensor([1, 3]))
    assert holds_for(recording, Items(), torch.randn(9, 2), torch.tensor([3, 0]))
    assert not holds_for(recording, Items(), torch.randn(5, 2), torch.tensor([2, 2]))


class Truncated(nn.Module):
    """Takes of a tensor's content what Python makes of it: how often to halve, and whether."""

    def __init__(self, item: bool) -> None:
        super().__init__()
        self.item = item

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        if count:
            for _ in range(int(count.item() if self.item else count)):
                x = x / 2
        return x


@pytest.mark.parametrize("item", [True, False])
def test_a_guard_compares_what_python_made_of_the_content(item: bool) -> None:
    recording = recorded(Truncated(item), torch.randn(2), torch.tensor(2.7))
    assert holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(2.2))
    assert not holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(3.2))
    assert not holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(0.0))


class ReadAfterWrite(nn.Module):
    """Reads a view before and after its base is written."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        held = x.new_zeros(3)
        view = held[0]
        before = int(view)
        held.add_(count)
        return x * (before + int(view))


def test_a_guard_reads_a_tensor_when_the_model_did() -> None:
    recording = recorded(ReadAfterWrite(), torch.randn(2), torch.tensor(0.0))
    assert not holds_for(recording, ReadAfterWrite(), torch.randn(2), torch.tensor(2.0))


class FloatOfNaN(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (0.0 if float(weight) != float(weight) else 1.0)


def test_a_guard_on_a_value_that_is_no_number_holds_for_it() -> None:
    recording = recorded(FloatOfNaN(), torch.randn(2), torch.tensor(math.nan))
    assert not holds_for(recording, FloatOfNaN(), torch.randn(2), torch.tensor(1.0))


class Symbolic(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return torch.arange(count.item()).sum() + x


def test_a_number_read_from_inputs_stays_symbolic_where_it_can() -> None:
    recording = recorded(Symbolic(), torch.randn(2), torch.tensor(3))
    assert holds_for(recording, Symbolic(), torch.randn(2), torch.tensor(7))


class Sizes(nn.Module):
    """A leaf that gives numbers beside tensors, as vision backbones do."""

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        return x.flatten(1), x.shape[1], x.shape[2]


class UsesSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        flat, height, width = self.sizes(x)
        return flat.view(-1, width, height) * self.scale  # type: ignore[no-any-return]


def test_numbers_from_a_module_kept_whole_stay_symbolic() -> None:
    model = UsesSizes()
    recording = record(model, (torch.randn(2, 3, 4),), {}, keep_whole=("sizes",))
    assert holds_for(recording, model, torch.randn(3, 5, 6))


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


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_tensors_that_are_no_buffers_are_constants() -> None:
    model = Frozen()
    recording = recorded(model, torch.randn(3, 4))
    assert any(value is model.table for value in recording.constants.values())
    assert all(isinstance(name, str) and name.isidentifier() for name in recording.constants)


def test_every_call_target_survives_code_generation() -> None:
    recording = recorded(NoGradient(), torch.randn(3, 4))
    code = recording.graph.python_code("self").src
    assert (
        "dnifx_runtime_ops_under(False, None, 'torch.softmax'" in code
        or "dnifx_runtime_ops_under(False, None, '.softmax'" in code
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


class Appends(nn.Module):
    def forward(self, x: Tensor, log: list[str]) -> Tensor:
        log.append("called")
        return x * len(log)


class KeepsLog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Appends() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        log: list[str] = []
        for layer in self.layers:
            x = layer(x, log)
        return x


def test_a_list_that_modules_fill_starts_empty_in_every_call() -> None:
    model = KeepsLog()
    recording = record(model, (torch.ones(2),), {}, open_paths=())
    assert [run(recording, model)(torch.ones(2)).tolist() for _ in range(2)] == [[2.0, 2.0], [2.0, 2.0]]


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            bias = x.mean(0).softmax(0)
        y = torch.zeros(x.shape[0], 4)
        y[:, 0] = self.linear(x).sum(1)
        return sum(piece for piece in torch.split(y, 1, dim=1)) + bias * (x.shape[0] // 2)


def test_a_graph_with_guards_and_regions_compiles_whole() -> None:
    model, x = Compiled(), torch.randn(6, 4)
    recording = recorded(model, x)
    assert recording.guards > 0
    compiled = torch.compile(runnable(model, recording.graph, recording.constants), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)[0], model(x))
