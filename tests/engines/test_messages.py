"""Messages: what is packed is unpacked as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dnifx.engines.messages import packed, unpacked
from dnifx.errors import RankError

DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    made = (torch.arange(torch.Size(shape).numel()) % 7).to(draw(DTYPES)).reshape(shape)
    turned = made.permute(draw(st.permutations(range(len(shape)))))
    return turned[::2] if turned.dim() and draw(st.booleans()) else turned


@given(
    st.lists(
        tensors() | st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=4)
    ),
    st.integers(0, 9),
    st.integers(0, 2**40),
)
def test_values_arrive_as_they_were(values: list[Tensor | float | str | None], index: int, step: int) -> None:
    label, found = unpacked(packed((index, step, 1), values).clone())
    assert label == (index, step, 1)
    assert len(found) == len(values)
    for sent, arrived in zip(values, found, strict=True):
        if not isinstance(sent, Tensor):
            assert arrived == sent
            assert type(arrived) is type(sent)
            continue
        assert arrived.dtype == sent.dtype
        assert torch.equal(arrived, sent)


def test_memory_formats_arrive_too() -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    _, (found,) = unpacked(packed((0, 0, 0), [image]))
    assert found.stride() == image.stride()
    assert torch.equal(found, image)


@pytest.mark.parametrize("value", [object(), [torch.zeros(2)], slice(1, 2)])
def test_what_cannot_cross_is_refused(value: object) -> None:
    with pytest.raises(RankError, match=type(value).__name__):
        packed((0, 0, 0), [value])


@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients_arrive_too(coalesced: bool) -> None:
    rows, values = torch.tensor([[4, 1, 4]]), torch.randn(3, 2)
    sparse = torch.sparse_coo_tensor(rows, values, (6, 2), check_invariants=True)
    sent = sparse.coalesce() if coalesced else sparse
    _, (before, found, after) = unpacked(packed((0, 0, 0), [1.5, sent, torch.ones(2)]))
    assert (before, found.is_coalesced()) == (1.5, coalesced)
    assert torch.equal(found._indices(), sent._indices())
    assert torch.equal(found._values(), sent._values())
    assert torch.equal(after, torch.ones(2))
