"""Masks and tables that forward makes when the length changes, and caches: on the model, in objects, by torch and by Python."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from tests.passes.capture.both_targets import trains_like_the_model

LENGTHS = (7, 5, 9, 7, 3)


def made(length: int) -> Tensor:
    return torch.triu(torch.full((length, length), -1e9, dtype=torch.double), 1)


class Attention(nn.Module):
    """Attention under a mask [length, length] that is made once for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.prepare()

    def prepare(self) -> None:
        """Make the cache."""

    def mask(self, length: int) -> Tensor:
        """Return the mask of a length."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        weights = (self.query(h) @ h.transpose(1, 2) + self.mask(tokens.shape[1])).softmax(-1)
        scores: Tensor = self.last(torch.tanh(weights @ h))
        return scores


class InAttribute(Attention):
    def prepare(self) -> None:
        self.table: Tensor | None = None

    def mask(self, length: int) -> Tensor:
        if self.table is None or self.table.size(0) != length:
            self.table = made(length)
        return self.table


class Grows(InAttribute):
    def mask(self, length: int) -> Tensor:
        if self.table is None or self.table.size(0) < length:
            self.table = made(length)
        return self.table[:length, :length]


class InDict(Attention):
    def prepare(self) -> None:
        self.tables: dict[int, Tensor] = {}

    def mask(self, length: int) -> Tensor:
        if length not in self.tables:
            self.tables[length] = made(length)
        return self.tables[length]


class InDictOfClass(InDict):
    tables: dict[int, Tensor] = {}  # noqa: RUF012 - shared on purpose

    def prepare(self) -> None:
        type(self).tables = {}


class PastTheModel(Attention):
    cache: dict[int, Tensor] = {}  # noqa: RUF012 - shared on purpose

    def prepare(self) -> None:
        PastTheModel.cache = {}

    def mask(self, length: int) -> Tensor:
        if length not in PastTheModel.cache:
            PastTheModel.cache[length] = made(length)
        return PastTheModel.cache[length]


class Tables:
    """An object that makes tables."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}

    def __call__(self, length: int) -> Tensor:
        if length not in self.held:
            self.held[length] = made(length)
        return self.held[length]


class InObject(Attention):
    def prepare(self) -> None:
        self.tables = Tables()

    def mask(self, length: int) -> Tensor:
        return self.tables(length)


class ByPython(Attention):
    @functools.lru_cache(maxsize=8)  # noqa: B019 - many models do
    def mask(self, length: int) -> Tensor:
        return made(length)


class AsProperty(Attention):
    @functools.cached_property
    def table(self) -> Tensor:
        return made(16)

    def mask(self, length: int) -> Tensor:
        return self.table[:length, :length]


class InBuffer(Attention):
    table: Tensor

    def prepare(self) -> None:
        self.register_buffer("table", made(2), persistent=False)

    def mask(self, length: int) -> Tensor:
        if self.table.shape[0] < length:
            self.table = made(length)
        return self.table[:length, :length]


class RegisteredInForward(InBuffer):
    def prepare(self) -> None:
        pass

    def mask(self, length: int) -> Tensor:
        if not hasattr(self, "table") or self.table.shape[0] < length:
            self.register_buffer("table", made(length), persistent=False)
        return self.table[:length, :length]


class Rotary(nn.Module):
    """Turns pairs of features by the position, with tables that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 1 / 100 ** (torch.arange(4, dtype=torch.double) / 4)
        self.longest, self.tables = 0, (torch.zeros(0), torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.longest:
            angles = torch.arange(length, dtype=torch.double)[:, None] * self.turns.repeat(2)
            self.tables, self.longest = (angles.cos(), angles.sin()), length
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * self.tables[0][:length] + turned * self.tables[1][:length]


class WithRotary(Attention):
    def prepare(self) -> None:
        self.rotary = Rotary()

    def mask(self, length: int) -> Tensor:
        return self.rotary(torch.ones(1, length, 8, dtype=torch.double)).mean()  # type: ignore[no-any-return]


CACHES = [
    *(
        InAttribute,
        Grows,
        InDict,
        InDictOfClass,
        PastTheModel,
        InObject,
        ByPython,
        AsProperty,
        InBuffer,
        RegisteredInForward,
    ),
    WithRotary,
]


def tokens(length: int) -> Tensor:
    return torch.randint(0, 20, (4, length))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("cuts", [["query"], 2])
def test_a_model_with_a_cache_trains_at_all_lengths(kind: type[Attention], cuts: Any) -> None:
    batches = [((tokens(length),), None) for length in LENGTHS]
    trains_like_the_model(kind, cuts, batches, lambda output, _: output.square().mean())


@pytest.mark.parametrize("kind", [InAttribute, Grows, InBuffer, RegisteredInForward, AsProperty])
def test_the_cache_is_left_as_the_model_leaves_it(kind: type[Any]) -> None:
    model, plain = kind().double(), kind().double()
    plain.load_state_dict(model.state_dict())
    net = dnifx.decouple(model, ["query"], args=(tokens(7),))
    assert ("table" in vars(model)) == ("table" in vars(kind().double())), "decouple leaves no trace"
    for length in LENGTHS:
        x = tokens(length)
        assert torch.equal(net(x), plain(x))
        assert torch.equal(model.table, plain.table)
        assert dict(model.named_buffers()).keys() == dict(plain.named_buffers()).keys()
        assert model.state_dict().keys() == plain.state_dict().keys()


class Averages(Attention):
    """Puts another tensor in the place of a buffer in each call, and reads it in the next one."""

    average: Tensor

    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(8))

    def mask(self, length: int) -> Tensor:
        self.average = 0.5 * self.average + self.embed.weight.detach().mean(0) * length
        return self.average.sum()


class BeginsAnew(Averages):
    """Looks for an attribute that the first call makes."""

    def prepare(self) -> None:
        pass

    def mask(self, length: int) -> Tensor:
        now = self.embed.weight.detach().mean(0) * length
        self.average = now if getattr(self, "average", None) is None else 0.5 * self.average + now
        return self.average.sum()


@pytest.mark.parametrize("kind", [Averages, BeginsAnew])
def test_a_state_in_a_buffer_that_is_replaced_is_carried(kind: type[Averages]) -> None:
    batches = [((tokens(length),), None) for length in LENGTHS]
    trains_like_the_model(kind, ["query"], batches, lambda output, _: output.square().mean())


def test_only_what_the_model_looks_for_is_part_of_the_input_kind() -> None:
    def read(kind: type[nn.Module], *args: Tensor) -> list[str]:
        net = dnifx.decouple(kind().double(), ["query"], args=args)
        signature: Any = net.program.signature
        return [each.path for each in signature.fixed]

    assert read(InBuffer, tokens(7)) == []
    assert read(RegisteredInForward, tokens(7)) == ["self.table"]
