"""How estimates compare with targets, where the values of a boundary have unlike leading sizes too."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.runtime.emitted.fitting import compare

SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def rows(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1) if value.dim() else value.reshape(1, 1)


@given(st.integers(1, 4), st.lists(SHAPES, min_size=1, max_size=3), st.integers(0, 99))
def test_values_of_one_leading_size_are_rows_together(size: int, shapes: list[tuple[int, ...]], seed: int) -> None:
    torch.manual_seed(seed)
    made, true = ([torch.randn(size, *shape) for shape in shapes] for _ in range(2))
    left, right = (torch.cat([rows(value) for value in side], 1) for side in (made, true))
    found = compare(made, true)
    wanted = {
        "cosine": torch.nn.functional.cosine_similarity(left, right, dim=1).mean(),
        "relative_error": (left - right).norm() / right.norm(),
        "wrong_signs": (left.sign() != right.sign()).float().mean(),
        "estimate_norm": left.norm(dim=1).square().mean().sqrt(),
        "target_norm": right.norm(dim=1).square().mean().sqrt(),
        "estimator_loss": (left - right).square().sum(1).mean(),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(0, 99))
def test_values_of_any_sizes_compare(shapes: list[tuple[int, ...]], seed: int) -> None:
    torch.manual_seed(seed)
    true = [torch.randn(shape) for shape in shapes]
    equal, opposite = compare(true, true), compare([-each for each in true], true)
    for found, cosine, wrong, error in ((equal, 1.0, 0.0, 0.0), (opposite, -1.0, 1.0, 2.0)):
        wanted = {"cosine": cosine, "wrong_signs": wrong, "relative_error": error}
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], torch.tensor(value), msg=name)
        torch.testing.assert_close(found["estimate_norm"], found["target_norm"])


class Language(nn.Module):
    """An LSTM whose states and outputs have unlike leading sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(20, 8), nn.LSTM(8, 8, 2), nn.Linear(8, 20)

    def forward(self, ids: Tensor, state: Any) -> Any:
        y, state = self.rnn(self.embed(ids), state)
        return self.out(y).reshape(-1, 20), state


class Scaled(nn.Module):
    """What crosses is a batch of vectors, one number, and a table of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(4, 6), nn.Linear(6, 20), nn.Parameter(torch.randn(3, 6))

    def forward(self, ids: Tensor, state: Any) -> Any:
        h = torch.tanh(self.first(state[0][0, :, :4]))
        size, table = h.square().mean(), torch.tanh(self.table * h.mean())
        h = self.second(h * size + table.sum(0))
        return h.repeat(7, 1), state


@pytest.mark.parametrize(("kind", "cut"), [(Language, ["rnn"]), (Scaled, ["mean", "tanh_1"])])
def test_diagnosing_and_probing_work_at_such_boundaries(kind: type[nn.Module], cut: list[str]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (7, 4))
    inputs = ids, (torch.randn(2, 4, 8), torch.randn(2, 4, 8))

    def loss(out: Any, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out[0], target)

    net = dnifx.decouple(kind(), cut, args=inputs, loss=loss, verify=False)
    assert len({value.shape[:1] for each in net.boundaries for value in each.specs}) > 1
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    for _ in range(3):
        trainer.step(*inputs, target=ids.flatten())
    found = trainer.step(*inputs, target=ids.flatten(), diagnose=True).diagnostics
    probed = trainer.probe(*inputs, target=ids.flatten())
    for each in (found, probed.true, probed.bootstrapped):
        assert set(each) == {boundary.name for boundary in net.boundaries}
        assert all(value.isfinite() for numbers in each.values() for value in numbers.values())
