"""Legalize: containers, ownership, frozen parts, values without gradient; boundaries and partitions in full."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.errors import PassError
from dnifx.passes.graph import captured
from dnifx.passes.legalize.legalize import Legalize
from dnifx.runtime.emitted.ops import rebuild
from tests.passes.programs import Residual, Tied, compiled, mlp

X = torch.randn(4, 6)


class Recurrent(nn.Module):
    """An LSTM, whose output and states are a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, c) = self.lstm(x)
        result: Tensor = self.head(torch.cat((out[:, -1], h[0], c[0]), 1))
        return result


class Masked(nn.Module):
    """Sends an integer, a mask and a size across the cut, beside the value with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens > 3
        count = mask.sum(1)
        h = self.embed(tokens)
        length = tokens.size(1)
        h = torch.tanh(self.mix(h)) * mask.unsqueeze(-1)
        result: Tensor = self.head(h.sum(1) / length + count.unsqueeze(-1))
        return result


TOKENS = torch.randint(0, 10, (4, 7))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def test_a_tuple_does_not_cross_but_its_items_do() -> None:
    model = Recurrent()
    x = torch.randn(4, 7, 6)
    program = compiled(model, ["lstm"], x, until="legalize")
    assert len(program.partitions) == 2
    assert all(program.measures[value].is_tensor for boundary in program.boundaries for value in boundary.values)
    assert [str(spec) for spec in program.boundaries[0].specs] == ["f32[4, 7, 5]", "f32[1, 4, 5]", "f32[1, 4, 5]"]
    net = dnifx.decouple(model, ["lstm"], args=(x,), gradient="oracle")
    assert torch.equal(net(x), model(x))


@dataclass
class Pictures:
    """What a module takes as one object."""

    values: Tensor
    sizes: tuple[int, ...]


class TakesPictures(nn.Module):
    """Reads an object's tensor, and lets Python look at its numbers, so that it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, pictures: Pictures) -> Tensor:
        largest = max(pictures.values.detach()[:, 0].tolist())
        result: Tensor = self.linear(pictures.values / largest)
        return result


def test_an_object_is_made_where_it_is_read() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 2), TakesPictures()

        def forward(self, x: Tensor) -> Tensor:
            seen = self.first(x)
            pictures = Pictures(seen.tanh(), (6,))
            middle = self.middle(seen)
            result: Tensor = self.last(pictures) * middle
            return result

    model = Detector()
    net = dnifx.decouple(model, ["middle"], args=(X,), gradient="oracle")
    assert torch.equal(net(X), model(X))
    made = next(node.name for node in captured(net.program).nodes if node.target is rebuild)
    early = Legalize().run(replace(net.program, partition_of={**net.program.partition_of, made: 0, "tanh": 0}))
    assert early.partition_of[made] == early.partition_of["last"] == 1
    assert "tanh" in early.partitions[1].inputs


def test_values_without_a_gradient_cross_without_an_interface() -> None:
    model = Masked()
    program = compiled(model, ["mix"], TOKENS, until="legalize")
    assert [boundary.values for boundary in program.boundaries] == [("mix",)]
    crossing = {name for partition in program.partitions[1:] for name in partition.inputs}
    assert {"mix"} < crossing
    assert all(not program.measures[name].requires_grad for name in crossing - {"mix"})
    net = dnifx.decouple(model, ["mix"], args=(TOKENS,), gradient="oracle", loss=F.cross_entropy)
    assert torch.equal(net(TOKENS), model(TOKENS))
    result = net.trainer(lambda p: torch.optim.SGD(p, lr=0.0)).step(TOKENS, target=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(result.output, model(TOKENS))


def test_a_cut_that_no_gradient_crosses_is_noted() -> None:
    model = Masked()
    model.embed.requires_grad_(False)
    program = compiled(model, ["embed", "mix"], TOKENS, until="legalize")
    assert [boundary.name for boundary in program.boundaries] == ["mix"]
    assert any(note.startswith("no gradient crosses the cut embed") for note in program.notes)


def test_a_tied_parameter_has_one_owner() -> None:
    program = compiled(Tied(), ["first"], X, until="legalize")
    first, second = program.partitions
    assert first.parameters == ("first.bias",)
    assert first.uses == ("first.weight", "first.bias")
    assert second.parameters == ("first.weight", "second.bias")
    assert (
        "first.weight is used in submod_0, submod_1; submod_1 owns it and updates it once, with the gradients of all"
        in program.notes
    )
    assert first.parameter_bytes == second.parameter_bytes == 4 * (36 + 6)


def test_a_tied_parameter_gets_both_gradients_and_one_update() -> None:
    model, expected = Tied(), Tied()
    target = torch.randn(4, 6)
    net = dnifx.decouple(model, ["first"], args=(X,), gradient="oracle", loss=F.mse_loss)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        trainer.step(X, target=target)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(expected(X), target))
        optimizer.step()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_a_module_called_on_both_sides_is_owned_once() -> None:
    shared = nn.Linear(6, 6)
    program = compiled(nn.Sequential(shared, nn.Tanh(), shared), ["0"], X, until="legalize")
    assert [partition.parameters for partition in program.partitions] == [(), ("0.weight", "0.bias")]
    assert [partition.uses for partition in program.partitions] == [("0.weight", "0.bias")] * 2


def test_frozen_parameters_belong_to_no_update() -> None:
    model = mlp(6, 6, 6, 2)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    program = compiled(model, ["2"], X, until="legalize")
    assert [partition.parameters for partition in program.partitions] == [("2.weight",), ("4.weight", "4.bias")]
    assert "3 frozen parameters are never updated" in program.notes
    net = dnifx.decouple(model, ["2"], args=(X,), gradient="oracle", loss=F.cross_entropy)
    frozen = copy.deepcopy(model[0].state_dict())
    net.trainer(lambda p: torch.optim.SGD(p, lr=0.5)).step(X, target=torch.tensor([0, 1, 0, 1]))
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())


def test_a_parameter_that_nothing_uses_is_noted() -> None:
    model = Residual()
    model.spare = nn.Linear(2, 2)
    program = compiled(model, ["blocks.0"], X, until="legalize")
    assert "no gradient reaches spare.weight, spare.bias: never updated" in program.notes


def test_a_batch_norm_on_either_side_updates_its_statistics_once_a_step() -> None:
    model = mlp(6, 6, 6, 2, batch_norm=True)
    expected = copy.deepcopy(model)
    net = dnifx.decouple(model, ["2"], args=(X,), loss=F.cross_entropy)
    net.trainer(lambda p: torch.optim.SGD(p, lr=0.0)).step(X, target=torch.tensor([0, 1, 0, 1]))
    net(X)
    for _ in range(2):
        expected(X)
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), expected.buffers(), strict=True))


def test_a_boundary_holds_every_value_that_crosses_at_its_cut() -> None:
    program = compiled(Residual(), ["blocks.0"], X, until="legalize")
    (boundary,) = program.boundaries
    assert (boundary.name, boundary.producer, boundary.consumers) == ("blocks.0", 0, (1,))
    assert set(boundary.values) == {"stem", "relu"}
    assert [str(spec) for spec in boundary.specs] == ["f32[4, 6]", "f32[4, 6]"]


def test_one_value_may_have_several_consumers() -> None:
    class Fans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            result: Tensor = self.head(self.left(h) * self.right(h))
            return result

    program = compiled(Fans(), ["stem", "left", "right"], X, until="legalize")
    stem = next(boundary for boundary in program.boundaries if boundary.name == "stem")
    assert stem.consumers == (1, 2)


def test_a_partition_is_described_in_full() -> None:
    program = compiled(mlp(6, 8, 2), ["0"], X, until="legalize")
    first, second = program.partitions
    assert (first.name, first.nodes, first.inputs, first.outputs) == ("submod_0", ("_0",), ("input_1",), ("_0",))
    assert (second.nodes, second.inputs, second.outputs) == (("_1", "_2", "output"), ("_0",), ())
    assert (first.flops, second.flops) == (2 * 4 * 6 * 8, 2 * 4 * 8 * 2)
    assert (first.parameter_bytes, second.parameter_bytes) == (4 * (48 + 8), 4 * (16 + 2))
    assert (first.activation_bytes, second.activation_bytes) == (4 * 4 * 8, 4 * 4 * (8 + 2))
    assert first.device == torch.device("cpu")


def test_partitions_are_numbered_without_holes_where_items_of_a_tuple_move_home() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention, self.head = (
                nn.Linear(6, 6),
                nn.MultiheadAttention(6, 2, batch_first=True),
                nn.Linear(6, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            mixed, _ = self.attention(h, h, h)
            result: Tensor = self.head(mixed)
            return result

    program = compiled(Attends(), "each", torch.randn(4, 5, 6), until="legalize")
    assert [partition.index for partition in program.partitions] == list(range(len(program.partitions)))
    assert set(program.partition_of.values()) == set(range(len(program.partitions)))


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("a.b", "a_b"), ("a_b", "a_b_1")),
        (("keys", "values"), ("cut_keys", "cut_values")),
        (("0", "1"), ("cut_0", "cut_1")),
    ],
)
def test_every_boundary_has_a_key_of_its_own(names: tuple[str, str], keys: tuple[str, str]) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(x)
            return result

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                self.add_module(name.partition(".")[0], Holds() if "." in name else nn.Linear(6, 6))
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for module in self.children():
                x = module(x)
            return x

    program = compiled(Model(), list(names), X)
    assert tuple(boundary.key for boundary in program.boundaries) == keys
    net = dnifx.decouple(Model(), list(names), args=(X,), loss=F.cross_entropy)
    held: Any = net.interfaces
    assert tuple(held) == keys
    assert len({id(held[key]) for key in keys}) == 2
    net.trainer(lambda p: torch.optim.SGD(p, lr=0.1)).step(X, target=torch.tensor([0, 1, 0, 1]))


def test_a_node_with_two_partitions_or_none_is_found_out() -> None:
    program = compiled(mlp(6, 8, 2), ["0"], X, until="legalize")
    first, second = program.partitions
    for partitions in ((first,), (first, first, second)):
        with pytest.raises(PassError, match="a node has no partition, or two"):
            Legalize().check(dnifx.ir.Program(program.model, graph=program.graph, partitions=partitions))
