"""What a forward pass keeps for its backward pass: all of it up to a number of bytes, each storage counted once."""

import pytest
import torch

from dnifx.passes.capture.saved_tensors import Kept, NotKept

X = torch.randn(5, 3, requires_grad=True)


@pytest.mark.parametrize("room", [0, 1, 1000])
def test_a_storage_that_is_kept_several_times_counts_once(room: int) -> None:
    kept = Kept(X.nbytes + room)
    with kept.watching():
        (found,) = torch.autograd.grad((X * X).t().sum(), X)
    assert kept.is_whole
    assert torch.equal(found, 2 * X)


@pytest.mark.parametrize("most", [0, 1, X.nbytes - 1])
def test_where_that_is_too_much_nothing_is_kept(most: int) -> None:
    kept = Kept(most)
    with kept.watching():
        product = X * X
        assert not kept.is_whole
        with pytest.raises(NotKept, match="what was not kept"):
            product.sum().backward()


def test_two_storages_count_both() -> None:
    kept = Kept(2 * X.nbytes - 1)
    with kept.watching():
        torch.sin(torch.exp(X))  # keeps the result of the first, which is the input of the second: one storage
        assert kept.is_whole
        torch.sin(X)
        assert not kept.is_whole
