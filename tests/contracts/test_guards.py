"""Contract 13: a change of a value that forward read is another input kind, or an input; no other change is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import InputKindWarning
from tests.random_models.stateful import WIDTH, Fills, Logs, Remembers, Stateful

VALUES: dict[str, tuple[Any, ...]] = {
    "number": (0.5, 1.5, 2.5),
    "count": (1, 2, 3),
    "flag": (True, False, True),
    "text": ("a", "bcd", "ef"),
    "nothing": (None, 2.0, None),
    "pair": ((1, 2), (3, 4), (1, 2)),
    "items": ([1.0], [2.0, 3.0], [4.0]),
    "table": ({"a": 1.0}, {"a": 2.0}, {"b": 2.0}),
    "tensor": (torch.ones(WIDTH), torch.zeros(WIDTH), 2 * torch.ones(WIDTH)),
    "tensors": ([torch.ones(WIDTH)], [torch.zeros(WIDTH)], [torch.ones(1), torch.ones(1)]),
}
INPUTS = ("number", "count", "tensor", "tensors")
"""What may become an input of the graph."""


def weight(value: Any) -> Any:
    """Return a number or tensor that depends on all of a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(value.values()) + len("".join(value))
    if isinstance(value, list | tuple):
        return sum((index + 1) * item for index, item in enumerate(value))
    return 0.0 if value is None else value * 1.0


class Holder:
    """An object that a module holds."""


def reader(reads: dict[str, str]) -> type[nn.Module]:
    """Return a module class that holds all values, and reads some: on the module, on its class, or on an object."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.held = nn.Linear(WIDTH, WIDTH), Holder()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x))
            for name, place in reads.items():
                h = h + 0.1 * weight(getattr(self.held if place == "object" else self, name))
            return h

    return Reads


def put(block: Any, place: str, name: str, value: Any) -> None:
    """Set a value where a block holds it."""
    setattr({"module": block, "class": type(block), "object": block.held}[place], name, value)


@st.composite
def programs(draw: st.DrawFn) -> tuple[dict[str, str], list[str], list[tuple[str, int]]]:
    """Draw where each value is held, which are read, and changes, every other one of a value that is read."""
    names = draw(st.permutations([*VALUES]))
    where = {name: draw(st.sampled_from(["class", "module", "object"])) for name in names}
    read = names[: draw(st.integers(2, 6))]
    changed = [draw(st.sampled_from(read if number % 2 == 0 else names)) for number in range(8)]
    return where, read, [(name, draw(st.sampled_from([1, 2, 0]))) for name in changed]


@settings(max_examples=12)
@given(programs(), st.booleans())
def test_a_change_of_what_was_read_is_followed_and_no_other_change_costs_anything(
    program: tuple[dict[str, str], list[str], list[tuple[str, int]]], scheduled: bool
) -> None:
    where, read, steps = program
    torch.manual_seed(0)
    kind = reader({name: where[name] for name in sorted(read)})
    model = Stateful([kind])
    block = model.blocks[0]
    for name, values in VALUES.items():
        put(block, where[name], name, copy.deepcopy(values[0]))
    x = torch.randn(3, WIDTH)
    net = dnifx.decouple(model, ["first"], args=(x,), gradient="oracle", loss=nn.MSELoss())
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0)) if scheduled else None
    run: Callable[[], Any] = lambda: trainer.step(x, target=torch.zeros(3, 2)).output if trainer else net(x)  # noqa: E731
    moved: set[str] = set()
    before, held = next(net.whole.matching((x,), {})), dict.fromkeys(VALUES, 0)
    for name, choice in steps:
        same = VALUES[name][choice] is VALUES[name][held[name]]
        held[name] = choice
        put(block, where[name], name, VALUES[name][choice] if same else copy.deepcopy(VALUES[name][choice]))
        captures = net.whole.captures
        assert torch.equal(run(), model(x))
        now = next(net.whole.matching((x,), {}))
        if name not in read or (same and name not in ("tensor", "tensors")):
            assert now is before
            assert net.whole.captures == captures
        elif name not in INPUTS and VALUES[name][choice] != VALUES[name][0]:
            assert now is not before or same
        elif name in ("number", "count", "tensor") and name in moved:
            assert net.whole.captures == captures
        if now is not before and name in INPUTS:
            moved.add(name)
        before = now


@pytest.mark.parametrize("scheduled", [False, True])
def test_what_is_filled_and_not_read_is_no_part_of_the_input_kind(scheduled: bool) -> None:
    model, x = Stateful([Logs]), torch.randn(3, WIDTH)
    net = dnifx.decouple(model, ["first"], args=(x,), loss=nn.MSELoss())
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for _ in range(5):
        trainer.step(x, target=torch.zeros(3, 2)) if scheduled else net(x)
    logs: Any = model.blocks[0]
    logs.seen.clear()
    logs.log.clear()
    trainer.step(x, target=torch.zeros(3, 2)) if scheduled else net(x)
    assert (len(logs.log), [*logs.seen], len(logs.terms)) == (3, ["h", "sizes"], 1)
    assert net.whole.captures <= 2  # the list that is cleared becomes an input


def test_what_is_filled_up_settles_and_what_grows_and_is_read_is_told_by_name() -> None:
    x = torch.randn(3, WIDTH)
    net = dnifx.decouple(Stateful([Remembers]), ["first"], args=(x,))
    for _ in range(6):
        net(x)
    assert net.whole.captures <= 4
    net = dnifx.decouple(Stateful([Fills]), ["first"], args=(x,), verify=False)
    for _ in range(16):
        net(x)
    with pytest.warns(InputKindWarning, match=r"What changes: self.blocks.0.past"):
        net(x)
