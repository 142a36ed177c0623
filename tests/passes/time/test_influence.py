"""What an entry depends on: no dependence is missed, and those that keep entries apart are not made up."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dnifx.passes.time.influence import Influence, MixedError, Plane

Function = Callable[[Tensor], Tensor]
torch_seed = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 4, generator=torch_seed, dtype=torch.double)
NORM, CONV, CELL = nn.LayerNorm(4).double(), nn.Conv1d(1, 1, 3, padding=1).double(), nn.GRUCell(4, 4).double()


def stored(value: Tensor) -> Tensor:
    """Write parts of a value into new memory, and change that through a view."""
    held = torch.zeros(3, 4, dtype=value.dtype)
    held[:, :2] = value[:, 2:]
    held[:, 2:].copy_(value[:, :2])
    held.t().mul_(2.0)
    return held + 0.0


def doubled(value: Tensor) -> Tensor:
    value = value * 2
    part = value[:, 1:]
    part += value[:, :1]
    return value.clone()


APART: dict[str, Function] = {
    "pointwise": lambda h: torch.tanh(h) * 2 + torch.sigmoid(h),
    "with others": lambda h: torch.lerp(h, h.detach() * 3, 0.3),
    "chunks": lambda h: torch.cat([h.chunk(2, 1)[1], h.chunk(2, 1)[0]], 1),
    "turned": lambda h: h.t().contiguous().t().flip(0),
    "stacked": lambda h: torch.stack([h, torch.zeros_like(h)]).sum(0),
    "chosen": lambda h: torch.where(h > 0, h, -h),
    "rolled": lambda h: h.roll(1, 1),
    "padded": lambda h: functional.pad(h, (1, 2)),
    "complex": lambda h: (torch.complex(h, 2 * h) * 1j).real,
    "stored": stored,
    "repeated": lambda h: h.repeat(2, 2),
    "batched product": lambda h: torch.einsum("bn,n->bn", h, WEIGHT[0]),
    "activations": lambda h: functional.gelu(h) + functional.softplus(h) + functional.hardswish(h) + functional.logsigmoid(h),
    "zeros": lambda h: h * 0 + torch.ones_like(h),
    "new": lambda h: h.new_zeros(3, 4) + h.clone().zero_() + h,
}  # fmt: skip
MIXED: dict[str, Function] = {
    "product": lambda h: h @ WEIGHT,
    "linear": lambda h: functional.linear(h, WEIGHT, WEIGHT[0]),
    "product from the left": lambda h: WEIGHT[:, :3] @ h,
    "sum": lambda h: h.sum(1) + h.mean(0, keepdim=True).sum(),
    "softmax": lambda h: h.softmax(1),
    "norm": NORM,
    "convolution": lambda h: CONV(h[:, None]),
    "cell": lambda h: CELL(torch.ones(3, 4).double(), h),
    "cumulative": lambda h: h.cumsum(1),
    "sorted": lambda h: h.sort(1).values,
    "largest": lambda h: h.amax(1, keepdim=True) * h,
    "index": lambda h: h[:, [0, 0, 1]],
    "gathered": lambda h: h.gather(1, torch.zeros(3, 4).long()),
    "doubled in place": doubled,
    "scattered": lambda h: torch.zeros(3, 4).double().index_add(1, torch.tensor([0, 0, 1, 2]), h),
    "numbers": lambda h: torch.view_as_complex(h.view(3, 2, 2)).abs(),
}  # fmt: skip


def depends(function: Function, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each entry of a result and of a state, whether autograd finds a dependence, and whether it was followed."""
    plane = Plane([state])
    with torch.no_grad(), Influence({"": plane}):
        result = function(state)
    found = plane.ids(result)
    labels = torch.zeros(result.shape).long() if found is None else plane.labels[found]
    followed = labels.reshape(-1, 1) == plane.labels[1:]
    true = torch.autograd.functional.jacobian(function, state).reshape(result.numel(), state.numel())
    return true != 0, followed


@pytest.mark.parametrize("name", [*APART, *MIXED])
def test_no_dependence_is_missed(name: str) -> None:
    for seed in range(3):
        state = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        true, followed = depends({**APART, **MIXED}[name], state)
        assert bool((followed | ~true).all())
        if name in APART:
            assert int(followed.sum(1).max()) <= 1


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted({**APART, **MIXED})), min_size=2, max_size=4), st.integers(0, 100))
def test_no_dependence_is_missed_along_a_path(names: list[str], seed: int) -> None:
    state = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

    def path(value: Tensor) -> Tensor:
        for name in names:
            made = {**APART, **MIXED}[name](value)
            value = made if made.shape == (3, 4) else value + 0.1 * made.sum()
        return value

    true, followed = depends(path, state)
    assert bool((followed | ~true).all())


def test_a_number_that_python_reads_is_told() -> None:
    state = torch.ones(3, 4)
    with pytest.raises(MixedError, match="lets Python read a value"), Influence({"": Plane([state])}):
        float(state.sum())


def test_entries_of_different_places_must_not_meet() -> None:
    state, other = torch.ones(3, 4), torch.ones(3, 4)
    slots = torch.arange(1, 13).view(3, 4)
    with Influence({"": Plane([state, other], [slots, slots])}):
        assert (state * other).shape == (3, 4)
        with pytest.raises(MixedError, match="mixes entries of the state"):
            state.roll(1, 0) * other
