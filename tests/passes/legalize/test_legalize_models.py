"""Faults that the sweep over real models found, each on a small model."""

import copy
import random
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import dnifx
from dnifx.passes.graph import captured
from tests.real_models.families import Example
from tests.real_models.hard.containers import Pair, container_family
from tests.real_models.hard.control_flow import control_family
from tests.real_models.hard.memory import memory_family
from tests.real_models.hard.sharing import shared_family
from tests.real_models.model_checks import check_eval, check_oracle, check_zero, decoupled


def test_a_tied_weight_has_one_owner_that_gets_the_sum_of_both_gradients() -> None:
    net = decoupled(shared_family()["tied"](), 4, "oracle")
    owners = [partition.index for partition in net.partitions if "embedding.weight" in partition.parameters]
    users = [partition.index for partition in net.partitions if "embedding.weight" in partition.uses]
    assert owners == [users[-1]] and len(users) == 2  # noqa: PT018
    check_oracle(shared_family()["tied"], 4, net)


def test_frozen_weights_beside_adapters_belong_to_no_partition() -> None:
    net = decoupled(shared_family()["lora"](), ["blocks.0", "blocks.2"], "zero")
    owned = [name for partition in net.partitions for name in partition.parameters]
    assert owned
    assert all(".up." in name or ".down." in name for name in owned)


def test_a_value_that_is_only_passed_on_needs_no_graph_in_the_scheduled_target() -> None:
    make = container_family()["messages"]
    cuts = ["messages.0", "messages.1", "messages.2"]
    check_zero(make, cuts, decoupled(make(), cuts, "zero"))


def test_evaluation_keeps_the_partitions_of_training_where_its_graph_has_fewer_nodes() -> None:
    make = control_family()["stochastic depth"]
    for cuts in (4, ["blocks.0", "blocks.1", "blocks.3"]):
        check_eval(make, cuts, decoupled(make(), cuts, "zero"))


def test_modules_of_torch_are_opened_inside_autocast() -> None:
    model, args, kwargs = memory_family()["autocast"]()
    net = dnifx.decouple(model, ["blocks.0", "blocks.2"], args=args, kwargs=kwargs, gradient="zero")
    assert net.program.capture is not None
    assert net.program.capture.method == "record"


class Counted(nn.Module):
    """Decides on values, and so is kept whole; gives a dataclass with a number that is a size."""

    def forward(self, x: Tensor) -> Pair:
        rows = x[x.sum(-1) > -1e9]
        if bool((rows > 1e9).any()):
            rows = rows * 2
        return Pair(rows, None, rows.size(0))


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.counted, self.last = nn.Linear(4, 4), Counted(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.counted(self.first(x))
        return self.last(pair.main) / pair.count


def test_a_number_in_a_dataclass_that_a_kept_module_gives_is_no_constant() -> None:
    model = Divides()
    net = dnifx.decouple(model, ["first"], args=(torch.randn(3, 4),), gradient="zero")
    more = torch.randn(5, 4)
    assert torch.equal(net(more), model(more))


class SameTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.last(self.first(x).relu()) - target) ** 2


def test_one_tensor_may_be_given_for_two_inputs() -> None:
    model, x = SameTwice(), torch.randn(3, 4)
    net = dnifx.decouple(model, ["first"], args=(x, x), gradient="zero")
    assert net.program.capture is not None
    assert net.program.capture.method == "record"
    other = torch.randn(3, 4)
    assert torch.equal(net(x, other), model(x, other))


class Caches(nn.Module):
    """Keeps what it computed in a dictionary, as some attentions keep their biases in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.cache = nn.Linear(4, 4), nn.Linear(4, 4), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = torch.ones(4) * 2
        return self.last(self.layer(x) + self.cache["bias"])


def test_measuring_leaves_no_fake_tensor_in_the_models_own_cache() -> None:
    model, x = Caches(), torch.randn(3, 4)
    net = dnifx.decouple(model, ["layer"], args=(x,), gradient="zero")
    assert type(net(x)) is Tensor
    assert all(type(kept) is Tensor for kept in model.cache.values())


class Cached(nn.Module):
    """Attention-like mixing whose bias is computed in training and kept in a dictionary in evaluation, as in EfficientFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias = nn.Linear(6, 6), nn.Parameter(torch.randn(6))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if not self.training and "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
        bias = self.bias * 2 if self.training else self.kept["bias"]
        return torch.relu(self.query(x).reshape(rows, -1) + bias)


def test_a_module_that_is_one_node_in_evaluation_stays_where_its_nodes_were_in_training() -> None:
    def make() -> Example:
        return nn.Sequential(nn.Linear(6, 6), Cached(), nn.Linear(6, 2)), (torch.randn(4, 6),), {}

    net = decoupled(make(), 2, "zero")
    rows = next(node.name for node in captured(net.program).nodes if node.target == "size")
    assert net.program.partition_of[rows] == 0, "what is looked into lies on one side alone"
    check_eval(make, 2, net)


def test_the_cost_of_a_module_that_drops_layers_by_chance_does_not_move_the_cuts() -> None:
    make = control_family()["layer drop"]
    found = set()
    for number in range(6):
        random.seed(number)
        found.add(decoupled(make(), 4, "zero").program.cuts)
    assert len(found) == 1


class Summed(nn.Module):
    """Adds up a list of inputs, and counts another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, items: list[Tensor], more: Any = ()) -> Tensor:
        total = sum((self.layer(item) for item in items), torch.zeros(4))
        return torch.relu(total) * (1 if isinstance(more, tuple) else 2) * (len(more) + 1)


def test_the_same_tensor_once_more_in_a_list_is_another_input_kind() -> None:
    model, one, two = Summed(), torch.randn(2, 4), torch.randn(2, 4)
    net = dnifx.decouple(model, ["layer"], args=([one, two],), gradient="zero")
    for items in ([one, two], [one, two, one], [one, one], [two, one]):
        assert torch.equal(net(items), model(items))
    assert len(net.input_kinds) == 3
    both = [one, two]
    for more in ((both, both), (both, [one, two])):
        assert torch.equal(net(both, more), model(both, more))
    assert len(net.input_kinds) == 4


def test_an_empty_container_is_told_from_another_and_from_none() -> None:
    model, one = Summed(), torch.randn(2, 4)
    net = dnifx.decouple(model, ["layer"], args=([one], ()), gradient="zero")
    given: tuple[Any, ...] = ((), [], [[]], ([], []))
    for more in given:
        assert torch.equal(net([one], more), model([one], more))
    assert len(net.input_kinds) == 4


class Draws(nn.Module):
    """Draws numbers that nothing uses after a dropout, which draws in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        unused = self.first(x)
        made = self.last(self.dropout(x))
        torch.rand(len(x))
        unused.add_(0.25)
        return made * 2


def test_numbers_are_drawn_in_the_models_order_in_the_other_mode_too() -> None:
    def make() -> Example:
        return Draws().eval(), (torch.randn(3, 4),), {}

    net = decoupled(make(), ["last"], "zero")
    model, (x,), _ = make()
    model.load_state_dict(net.original.state_dict())
    for training in (True, False):
        torch.manual_seed(1)
        wanted = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(net.train(training)(x), wanted)


class Undifferentiated(nn.Module):
    """Has nothing in its second part that a gradient could reach: its one layer there runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(2, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        value = self.first(x)
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(value))
        gated = value * gate
        states, last = self.last(gated.reshape(len(x), -1, 2))
        return torch.cat([gated, states.mean(1) + last[0]], 1)


def test_a_layer_under_no_grad_makes_no_gradient_for_its_partition() -> None:
    def make() -> Example:
        return Undifferentiated(), (torch.randn(3, 4),), {}

    cuts = ["first", "last"]
    check_zero(make, cuts, decoupled(make(), cuts, "zero"))


class Discards(nn.Module):
    """Writes in place to what it does not use; the output is made before that, of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        unused, twice = self.unused(x), y * 2
        unused += twice
        unused[:, 0] = 0.5
        return self.last(twice)


def test_nothing_is_computed_behind_the_output() -> None:
    def make() -> Example:
        return Discards(), (torch.randn(3, 4), torch.randn(3, 4)), {}

    net = decoupled(make(), ["*"], "oracle")
    assert "last" in net.partitions[-1].nodes
    check_oracle(make, ["*"], net)


class WritesInEvaluation(nn.Module):
    """Writes to what a dropout gives: in evaluation that is the input itself, which the second layer has read before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        unused = self.last(self.first(x))
        read = x + 1
        dropped = nn.functional.dropout(x, 0.3, self.training)
        dropped[:, 0] = 0.5
        return self.last(self.first(read)) + unused


def test_a_write_to_an_input_in_one_mode_alone_is_not_lost() -> None:
    model = WritesInEvaluation()
    net = decoupled((model, (torch.randn(3, 4),), {}), ["first@1"], "zero")
    given = torch.randn(3, 4)
    own = given.clone()
    wanted = copy.deepcopy(model).eval()(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = net.eval()(given)
    assert torch.equal(found, wanted)
    assert torch.equal(given, own)
