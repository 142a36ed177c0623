"""Models that pass on lists, dictionaries and dataclasses, or gather along edges."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models.hard.pieces import BATCH, WIDTH, Factory, embedded, mlp, vectors


class DictBlock(nn.Module):
    """Takes and gives a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge = mlp(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        node = state["node"] + self.node(state["node"])
        return {"node": node, "edge": torch.tanh(self.edge(torch.cat([node, state["edge"]], -1)))}


@dataclass
class Pair:
    """What the dataclass blocks pass on."""

    main: Tensor
    side: Tensor | None = None
    count: int = 0


class PairBlock(nn.Module):
    """Takes and gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Pair) -> Pair:
        side = pair.main if pair.side is None else pair.side
        return Pair(pair.main + self.main(pair.main), torch.tanh(self.side(side)), pair.count + 1)


class DictModel(nn.Module):
    """Dictionaries all along; the output is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DictBlock() for _ in range(4))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(batch)
        for block in self.blocks:
            state = block(state)
        return state


class PairModel(nn.Module):
    """Dataclasses all along, with a field that is None at first and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Pair:
        pair = Pair(x)
        for block in self.blocks:
            pair = block(pair)
        return pair


class ListInput(nn.Module):
    """A list of unlike tensors and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(width, WIDTH) for width in (4, 8, 12))
        self.body = nn.Sequential(mlp(), nn.GELU(), mlp(), nn.GELU(), mlp())

    def forward(self, parts: list[Tensor], weight: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        encoded = [encoder(part) for encoder, part in zip(self.encoders, parts, strict=True)]
        mixed = (
            torch.stack(encoded).mean(0) if weight is None else torch.einsum("pbw,bp->bw", torch.stack(encoded), weight)
        )
        return self.body(mixed) * scale


class Passing(nn.Module):
    """Message passing by hand: gather, transform, add up."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for message in self.messages:
            sent = message(torch.cat([x[edges[0]], x[edges[1]]], -1)).relu()
            x = x + torch.zeros_like(x).index_add_(0, edges[1], sent)
        return x


class PerLevel(nn.Module):
    """A feature pyramid: several maps out, joined top down."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in ((3, 8), (8, 16), (16, 32))
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (8, 16, 32))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage, side in zip(self.stages, self.sides, strict=True):
            x = stage(x)
            maps.append(side(x))
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1] = maps[index - 1] + F.interpolate(maps[index], scale_factor=2)
        return maps


def container_family() -> Mapping[str, Factory]:
    """Return models that pass structures on."""
    return {
        "dictionaries": lambda: (DictModel(), ({"node": vectors(), "edge": vectors()},), {}),
        "dataclasses": lambda: embedded(PairModel()),
        "list input": lambda: (ListInput(), ([torch.randn(BATCH, width) for width in (4, 8, 12)],), {"scale": 2.0}),
        "list and weights": lambda: (
            ListInput(),
            ([torch.randn(BATCH, width) for width in (4, 8, 12)],),
            {"weight": torch.rand(BATCH, 3)},
        ),
        "pyramid": lambda: (PerLevel(), (torch.randn(2, 3, 32, 32),), {}),
        "messages": lambda: (Passing(), (torch.randn(10, WIDTH), torch.randint(0, 10, (2, 30))), {}),
    }
