"""The exact gradient in time: windows of one step give the gradient of backpropagation through all of them."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import dnifx
from dnifx.errors import InputError
from dnifx.runtime.emitted import exact
from dnifx.zoo.diagonal_cells import LRUCell, MinGRUCell
from tests.passes.time.entrywise_cells import Stream, loss, streams


def close(one: Sequence[Tensor], other: Sequence[Tensor], most: float = 1e-10) -> bool:
    return all(torch.allclose(a, b, rtol=most, atol=most) for a, b in zip(one, other, strict=True))


def by_loop(stream: Stream, net: Any, joined: bool = False) -> list[Tensor]:
    """Return the gradients that a loop of one's own gathers, window by window, or in one backward pass."""
    for parameter in stream.model.parameters():
        parameter.grad = None
    state, total = stream.state, torch.zeros((), dtype=torch.double)
    for x, target, begins in stream.windows():
        output, state = net(x, state, reset=begins)
        value = loss(output, target)
        total = total + value
        if not joined:
            value.backward()
    if joined:
        total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in stream.trained()]


def by_trainer(stream: Stream, net: dnifx.DecoupledModule) -> list[Tensor]:
    """Return the gradients that a trainer gathers before its one update."""
    count = len(stream.inputs)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0), accumulate=count)
    before = [parameter.detach().clone() for parameter in stream.trained()]
    for place, (x, target, begins) in enumerate(stream.windows()):
        trainer.reset(begins)
        given = (x, stream.state) if place == 0 else (x,)
        trainer.step(*given, target=target)
    after = [(old - new.detach()) * count for old, new in zip(before, stream.trained(), strict=True)]
    with torch.no_grad():
        for old, new in zip(before, stream.trained(), strict=True):
            new.copy_(old)
    return after


@settings(max_examples=12)
@given(streams())
def test_windows_give_the_gradient_of_backpropagation_through_all_of_them(stream: Stream) -> None:
    expected = stream.whole_gradient()
    net = stream.decouple()
    assert close(by_trainer(stream, net), expected)
    assert close(by_loop(stream, net), expected)
    assert close(by_loop(stream, net, joined=True), expected)


def plain_stream(windows: int = 12, cell: type[MinGRUCell | LRUCell] = MinGRUCell) -> Stream:
    """Return a cell of the zoo and a stream in which an episode begins."""
    torch.manual_seed(0)
    model = dnifx.unroll(cell(3, 4, 2), steps=1).double()
    zero = torch.zeros(5, 4, dtype=torch.double)
    state = zero if cell is MinGRUCell else (zero, zero.clone())
    shape = windows, 5, 1
    begins = torch.zeros(windows, 5, dtype=torch.bool)
    begins[windows // 2, 1] = True
    inputs, targets = torch.randn(*shape, 3, dtype=torch.double), torch.randn(*shape, 2, dtype=torch.double)
    return Stream(model, state, inputs, targets, begins, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", [MinGRUCell, LRUCell])
def test_the_cells_of_the_zoo_have_exact_gradients(cell: Any) -> None:
    stream = plain_stream(cell=cell)
    expected, net = stream.whole_gradient(), stream.decouple()
    assert close(by_trainer(stream, net), expected)
    assert close(by_loop(stream, net), expected)
    assert not close(by_loop(stream, stream.decouple("zero")), expected, 1e-4)


FAULTS = {
    "the Jacobian is left out": ("through", lambda jacobian, trace, home: trace),
    "examples that begin keep their trace": ("begin_trace", lambda trace, reset: trace),
    "what arrives is not weighted": ("weighted", lambda error, trace, home: trace.sum((0, 1))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_trace_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = plain_stream()
    expected, net = stream.whole_gradient(), stream.decouple()
    monkeypatch.setattr(exact, *FAULTS[fault])
    assert not close(by_loop(stream, net), expected, 1e-6)


def test_memory_does_not_grow_with_the_stream() -> None:
    stream = plain_stream(windows=20)
    net, state, sizes = stream.decouple(), stream.state, []
    for x, _, begins in stream.windows():
        state = net(x, state, reset=begins)[1]
        behind = {type(node).__name__ for node, _ in state.grad_fn.next_functions if node is not None}
        assert behind == {"AccumulateGrad"}, "the state holds the graph of its window"
        sizes.append(sum(each.numel() for each in state.grad_fn.trace))
    assert len(set(sizes)) == 1
    reached = [p for name, p in stream.model.named_parameters() if "readout" not in name]
    assert sizes[0] == 5 * sum(parameter.numel() for parameter in reached)


def test_streams_may_take_turns_and_change_their_size() -> None:
    stream = plain_stream()
    net, states = stream.decouple(), [stream.state, stream.state[:3]]
    for parameter in stream.model.parameters():
        parameter.grad = None
    for x, target, _ in stream.windows():
        for place, size in enumerate((5, 3)):
            output, states[place] = net(x[:size], states[place])
            loss(output, target[:size]).backward()
    found = [parameter.grad for parameter in stream.trained() if parameter.grad is not None]
    whole = torch.zeros((), dtype=torch.double)
    for size in (5, 3):
        state = stream.state[:size]
        for x, target, _ in stream.windows():
            output, state = stream.model(x[:size], state)
            whole = whole + loss(output, target[:size])
    assert close(found, torch.autograd.grad(whole, stream.trained()))


def test_a_detached_state_begins_a_stream_and_a_changed_one_is_refused() -> None:
    stream = plain_stream()
    net, truncated = stream.decouple(), stream.decouple("zero")
    expected = by_loop(stream, truncated)

    def detached(x: Tensor, state: Tensor, reset: Tensor) -> Any:
        return net(x, state.detach(), reset=reset)

    assert close(by_loop(stream, detached), expected)
    left = net(stream.inputs[0], stream.state)[1]
    for state in (0.5 * left, left.clone().detach().requires_grad_()):
        with pytest.raises(InputError, match="with reset= for examples that begin an episode"):
            net(stream.inputs[1], state)


def test_a_resumed_trainer_goes_on_bit_for_bit() -> None:
    def run(saved_at: int | None) -> list[Tensor]:
        stream = plain_stream()
        trainer = stream.decouple().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        for place, (x, target, begins) in enumerate(stream.windows()):
            if place == saved_at:
                kept = copy.deepcopy(trainer.state_dict())
                stream = plain_stream()
                trainer = stream.decouple().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
                trainer.load_state_dict(kept)
            trainer.reset(begins)
            trainer.step(x, target=target)
            trainer.probe(x, target=target)
        return [parameter.detach() for parameter in stream.trained()]

    whole = run(None)
    assert all(map(torch.equal, run(5), whole))
    assert close(run(5), whole, 0)


def test_a_trainer_takes_batches_of_another_size_after_a_reset() -> None:
    stream = plain_stream()
    trainer = stream.decouple().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for size in (5, 5, 2, 2):
        if trainer.parts[0].window.traces and trainer.parts[0].window.examples() != size:
            trainer.reset()
        trainer.step(stream.inputs[0][:size], target=stream.targets[0][:size])
        assert {len(each) for each in trainer.parts[0].window.traces["state"]} == {size}


def test_states_of_two_partitions_are_exact_within_each() -> None:
    torch.manual_seed(0)
    model = Layers().double()
    zero = torch.zeros(3, 4, dtype=torch.double)
    cuts: list[Any] = ["between", dnifx.Recurrent("state", "1")]
    gradient = {"between": "zero", "**": "exact"}
    x, target = torch.randn(6, 3, 4, dtype=torch.double), torch.randn(6, 3, 4, dtype=torch.double)
    net = dnifx.decouple(model, cuts, args=(x[0], (zero, zero)), gradient=gradient, loss=torch.nn.MSELoss())
    assert [each.exact is not None for each in net.program.recurrences] == [True, True]
    state: Any = (zero, zero)
    for each, wanted in zip(x, target, strict=True):
        output, state = net(each, state)
        loss(output, wanted).backward()
    whole, state = torch.zeros((), dtype=torch.double), (zero, zero)
    for each, wanted in zip(x, target, strict=True):
        output, state = model(each, state, True)
        whole = whole + loss(output, wanted)
    for name, parameter in model.named_parameters():
        (expected,) = torch.autograd.grad(
            whole, parameter, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


class Layers(torch.nn.Module):
    """Two layers of minimal GRUs, one above the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = MinGRUCell(4, 4, 4), MinGRUCell(4, 4, 4)
        self.between = torch.nn.Tanh()

    def forward(self, x: Tensor, state: Any, apart: bool = False) -> tuple[Tensor, Any]:
        y, lower = self.lower(x, state[0])
        y = self.between(y)
        output, upper = self.upper(y.detach() if apart else y, state[1])
        return output, (lower, upper)
