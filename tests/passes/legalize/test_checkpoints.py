"""Checkpointed regions: computed again in the backward pass as the model does, in both targets and in emitted folders."""

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import dnifx
from dnifx.passes.graph import captured
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.checkpoints import regions_of
from tests.real_models.model_checks import spread_loss
from tests.wild.checks import check_call

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ENTRANCE = [False, True]


class Block(nn.Module):
    """Running statistics, dropout, and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.drop, self.back = (
            nn.Linear(8, 32),
            nn.BatchNorm1d(32),
            nn.Dropout(0.3),
            nn.Linear(32, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.back(self.drop(self.norm(self.wide(x)).relu_()).tanh())
        return result


class Blocks(nn.Module):
    """A row of blocks between two layers; what runs them is drawn in by a subclass.

    Args:
        reentrant: Which kind of checkpoint.
        kept: Whether there are checkpoints at all.
    """

    def __init__(self, reentrant: bool = False, kept: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.kept = reentrant, kept
        self.first, self.blocks, self.last = (
            nn.Linear(8, 8),
            nn.Sequential(*(Block() for _ in range(4))),
            nn.Linear(8, 2),
        )
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.means: Tensor
        self.register_buffer("means", torch.zeros(()))

    def region(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a function, under a checkpoint or as it is."""
        return checkpoint(function, *args, use_reentrant=self.reentrant, **options) if self.kept else function(*args)

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.region(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.middle(self.first(x)))
        return result


class Together(Blocks):
    """All blocks in one region."""

    def middle(self, x: Tensor) -> Tensor:
        result: Tensor = self.region(self.blocks, x)
        return result


class Nested(Blocks):
    """A region within a region, around a size that is read."""

    def middle(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            result: Tensor = self.blocks[1](x) * x.shape[0]
            return result

        def outer(x: Tensor) -> Tensor:
            result: Tensor = self.blocks[2](self.region(inner, self.blocks[0](x)))
            return result

        result: Tensor = self.region(outer, x)
        return result


class Several(Blocks):
    """Several inputs and outputs, some of them no tensors, a buffer that is written, and a weight that is read as it is."""

    def middle(self, x: Tensor) -> Tensor:
        def several(x: Tensor, count: int, other: Tensor) -> tuple[Tensor, Tensor, int]:
            self.calls.add_(1)
            h: Tensor = self.blocks[0](x @ self.first.weight) * count
            made = h, h.sigmoid() * other, h.shape[0]
            self.calls.mul_(2)  # where recomputation has ended, but for a reentrant checkpoint
            return made

        one, two, examples = self.region(several, x, 3, x.tanh())
        result: Tensor = one * two / examples + self.calls
        return result


class Counts(Blocks):
    """Regions that keep count of how often they are computed, and of what: nothing reads that."""

    def middle(self, x: Tensor) -> Tensor:
        def counted(x: Tensor) -> Tensor:
            self.calls.add_(1)
            result: Tensor = self.blocks[0](x)
            self.means.add_(result.detach().mean())
            return result.tanh()

        for _ in range(2):
            x = self.region(counted, x)
        return x


class InSegments(Blocks):
    """``checkpoint_sequential``."""

    def middle(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.reentrant)
        return result


class Forgetful(Blocks):
    """Random numbers are not put back, so that the backward pass draws others."""

    def middle(self, x: Tensor) -> Tensor:
        result: Tensor = self.region(self.blocks[0], x, preserve_rng_state=False)
        return result


MODELS = (Blocks, Together, Nested, Several, Counts, InSegments)


def decoupled(model: nn.Module, cuts: Any, gradient: str = "oracle", loss: Any = spread_loss) -> DecoupledModule:
    return dnifx.decouple(model.double(), cuts, args=(X,), gradient=gradient, loss=loss)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the bytes that autograd saves within the block, beside those that a checkpoint gives up."""
    found = [0]

    def pack(tensor: Tensor) -> Tensor:
        found[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def saved(net: Any, target: str) -> int:
    """Return the bytes that a forward pass saves, or a whole step of a trainer."""
    with counting() as found:
        if target == "scheduled":
            net.trainer(descend).step(X, target=None)
        else:
            net(X)
    return found[0]


@pytest.mark.parametrize("reentrant", ENTRANCE)
@pytest.mark.parametrize("target", ["fused", "scheduled"])
@pytest.mark.parametrize("cuts", [["blocks.0"], ["first", "blocks.1", "blocks.2"]])
def test_as_few_bytes_are_saved_as_in_the_model(reentrant: bool, target: str, cuts: list[str]) -> None:
    without, checkpointed = (saved(Blocks(kept=kept).double(), "model") for kept in (False, True))
    assert without > 5 * checkpointed
    nets = [decoupled(Blocks(reentrant, kept), cuts) for kept in (False, True)]
    assert saved(nets[0], target) - saved(nets[1], target) == without - checkpointed


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # of an inner one in a reentrant one: torch's own
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("reentrant", ENTRANCE)
@pytest.mark.parametrize("cuts", [["first"], ["blocks.0.wide"], 3])
def test_outputs_gradients_buffers_and_random_state_are_the_models(make: Any, reentrant: bool, cuts: Any) -> None:
    model = make(reentrant).double()
    net = decoupled(model, cuts)
    assert net.program.capture is not None
    assert net.program.capture.method.startswith("record")
    assert "torch.utils.checkpoint.checkpoint(" in net.code
    model = copy.deepcopy(model)
    check_call(model, net, ((X,), {}))
    check_call(model.eval(), net.eval(), ((X[:4],), {}))


def test_running_statistics_move_twice_as_in_the_model() -> None:
    net = decoupled(Blocks(), ["blocks.1"])
    torch.autograd.backward(spread_loss(net(X), None))
    assert [int(block.norm.num_batches_tracked) for block in net.original.blocks] == [2, 2, 2, 2]  # type: ignore[union-attr]
    net.trainer(descend).step(X, target=None)
    assert [int(block.norm.num_batches_tracked) for block in net.original.blocks] == [4, 4, 4, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", ENTRANCE)
@pytest.mark.parametrize("target", ["fused", "scheduled"])
def test_a_region_that_is_cut_is_computed_again_side_by_side(reentrant: bool, target: str) -> None:
    net = decoupled(Together(reentrant), ["blocks.0", "blocks.2.norm"], "zero")
    note = [note for note in net.program.notes if "checkpoint" in note]
    assert len(note) == 1
    assert "checkpoint(function, *args" in note[0]
    assert note[0].endswith("is cut: each side is computed again by itself")
    plain = decoupled(Together(reentrant, kept=False), ["blocks.0", "blocks.2.norm"], "zero")
    assert saved(net, target) < 0.4 * saved(plain, target)


class Counting(Blocks):
    """A region whose values depend on how often it was computed."""

    def middle(self, x: Tensor) -> Tensor:
        def counting(x: Tensor) -> Tensor:
            count = self.calls.add_(1)
            return self.blocks[1].back(self.blocks[0].wide(x).tanh() * count)  # type: ignore[no-any-return,union-attr,operator]

        result: Tensor = self.region(counting, x)
        return result


@pytest.mark.parametrize("make", [Counting, Forgetful])
def test_what_gives_something_else_when_computed_again_is_kept_whole_or_not_at_all(make: type[Blocks]) -> None:
    whole = decoupled(make(), ["first"])
    assert not any("checkpoint" in note for note in whole.program.notes)
    check_call(copy.deepcopy(whole.original), whole, ((X,), {}))
    cut = decoupled(make(), ["blocks.0.wide"])
    (note,) = [note for note in cut.program.notes if "checkpoint" in note]
    assert (
        "is not kept (it is cut, and computed again it would give other values): its activations stay in memory" in note
    )
    assert "torch.utils.checkpoint" not in cut.code
    check_call(make(kept=False).double(), cut, ((X,), {}))


def test_a_checkpoint_that_chooses_what_it_keeps_is_computed_again_whole() -> None:
    class Selective(Blocks):
        def middle(self, x: Tensor) -> Tensor:
            policy = lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE  # noqa: E731
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            result: Tensor = self.region(self.blocks, x, context_fn=contexts)
            return result

    net = decoupled(Selective(), ["first"])
    (note,) = [note for note in net.program.notes if "checkpoint" in note]
    assert note.startswith("the context_fn of the checkpoint at test_checkpoints.py:")
    assert note.endswith("is ignored: all of it is computed again")
    assert saved(net, "fused") == saved(decoupled(Together(), ["first"]), "fused")
    check_call(copy.deepcopy(net.original), net, ((X,), {}))


def test_what_each_partition_computes_by_itself_does_not_part_a_region() -> None:
    class Reshaped(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.first.weight.t().exp()
            middle = self.region(lambda x, weight: (self.blocks[1](x).sigmoid() @ weight).tanh(), x @ weight, weight)
            result: Tensor = self.last(middle)
            return result

    net = decoupled(Reshaped(), ["matmul"])
    fused = net.code.partition("def submod_0")[0]
    assert fused.count("torch.utils.checkpoint.checkpoint(") == 1
    check_call(copy.deepcopy(net.original), net, ((X,), {}))


def test_without_gradients_a_region_is_run_as_it_is() -> None:
    class Frozen(Blocks):
        def middle(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                aside = self.region(self.blocks[0], x)
            return self.region(self.blocks[1], x) + aside  # type: ignore[no-any-return]

    net = decoupled(Frozen(), ["first"])
    assert {region.number for node in captured(net.program).nodes for region in regions_of(node)} == {1}
    check_call(copy.deepcopy(net.original), net, ((X,), {}))
    with torch.no_grad(), counting() as found:
        net(X)
    assert found == [0]


def test_an_eligibility_trace_keeps_what_a_window_made() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(16, 8)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = checkpoint(lambda *each: self.cell(torch.cat(each, 1)).tanh(), x, state, use_reentrant=False)
            return state.sum(1), state

    made = [
        dnifx.decouple(
            Cell().double(), dnifx.Recurrent("state", "1", trace=trace), args=(X, torch.zeros_like(X)), loss=spread_loss
        )
        for trace in (None, 0.5)
    ]
    assert ["torch.utils.checkpoint.checkpoint(" in net.code for net in made] == [True, False]
    assert [sum("activations stay in memory" in note for note in net.program.notes) for net in made] == [0, 1]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", ENTRANCE)
def test_the_folder_computes_again_as_the_net_does(reentrant: bool, packages: Path) -> None:
    bytes_saved = []
    for name, kept in (("kept", True), ("without", False)):
        net = decoupled(Nested(reentrant, kept), ["blocks.1"], "synthetic")
        net.to_folder(packages / f"emitted_{name}")
        package = importlib.import_module(f"emitted_{name}")
        emitted = package.Net()
        trainers = net.trainer(descend), package.Trainer(emitted, descend, spread_loss)
        for trainer, given in zip(trainers, ({"target": None}, {}), strict=True):
            torch.default_generator.manual_seed(0)
            with counting() as found:
                trainer.step(X, *(() if given else (None,)), **given)
            bytes_saved.append(found[0])
        state = net.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in emitted.state_dict().items())
        with counting() as found:
            torch.autograd.backward(spread_loss(emitted(X), None))
    net_kept, emitted_kept, net_without, emitted_without = bytes_saved
    assert net_without - net_kept == emitted_without - emitted_kept > 0.3 * net_without


def test_copies_and_saved_modules_compute_again() -> None:
    net = decoupled(Blocks(), ["blocks.1"])
    assert (
        saved(copy.deepcopy(net), "fused")
        == saved(net, "fused")
        < saved(decoupled(Blocks(kept=False), ["blocks.1"]), "fused")
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_torch_compile_takes_a_region_whole() -> None:
    torch._dynamo.reset()
    net = decoupled(Blocks().eval(), ["blocks.1"], "zero")
    compiled: Any = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = []
    for each in (net, compiled):
        net.zero_grad(set_to_none=True)
        torch.autograd.backward(spread_loss(each(X), None))
        found.append({name: parameter.grad for name, parameter in net.original.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
