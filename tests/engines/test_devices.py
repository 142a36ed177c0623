"""Runs over several places of one process: the numbers of one place, and nothing that is used where it is not."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.engines import devices
from dnifx.engines.devices import Devices, relocated
from dnifx.engines.places import Place
from dnifx.errors import DnifxError, OptimizerError, PlaceError, ScheduleError, StateError
from dnifx.estimators import Late, Suffix
from dnifx.ir import Program
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.net.attach import on_device
from tests.contracts.cases import Case, cases, decoupled
from tests.contracts.running import descend
from tests.contracts.test_contracts_places import SCHEDULES
from tests.engines.jobs import GRADIENTS, batches, chain, changing, differences, sgd, train
from tests.engines.pretending import Pretended
from tests.passes.programs import mlp


@settings(max_examples=20)
@given(
    cases(training=True, without=("shared module", "tied modules", "used parameter")),
    st.sampled_from([*sorted(GRADIENTS), "late"]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(SCHEDULES),
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
)
def test_a_run_over_places_has_the_numbers_of_one(
    case: Case, gradient: str, lag: int, schedule: str, draws: list[int]
) -> None:
    torch.manual_seed(3)
    try:
        net, one = (decoupled(case, GRADIENTS.get(gradient, Late(2))) for _ in range(2))
    except DnifxError:
        reject()
    one.load_state_dict(net.state_dict())
    draws[len(net.partitions) - 1] = (draws[0] + 1) % 3  # two places or more
    places = [f"cpu:{draws[index]}" for index in range(len(net.partitions))]
    lag, schedule = (0, "sequential") if gradient == "late" else (lag, schedule)
    try:
        alone = one.trainer(descend, schedule, lag=lag)
        trainer = net.trainer(descend, schedule, lag=lag, places=places)
    except DnifxError:
        reject()
    pretended = Pretended(trainer)
    for step in range(5):
        inputs, target = changing(case, step)
        torch.manual_seed(step)
        expected = alone.step(*inputs, target=target).loss
        torch.manual_seed(step)
        with pretended.step((inputs, target)):
            loss = trainer.step(*inputs, target=target).loss
        assert repr(loss) == repr(expected)
    assert differences(net, one) == []


@pytest.mark.parametrize("places", [(0, 1, 0, 1), (1, 0, 1, 1), (0, 0, 0, 1)])
def test_a_shared_parameter_is_read_late_in_its_place(places: tuple[int, ...], tmp_path: Path) -> None:
    net, one, rest = (chain(tied=True) for _ in range(3))
    alone = one.trainer(sgd, lag=2)
    trainer, other = (each.trainer(sgd, lag=2, places=[f"cpu:{place}" for place in places]) for each in (net, rest))
    pretended, data = Pretended(trainer), batches(9)
    for x, y in data[:6]:
        with pretended.step((x, y)):
            trainer.step(x, target=y)
    train(alone, data[:6])
    trainer.collect()
    assert differences(net, one) == []
    trainer.save(tmp_path)
    other.load(tmp_path)
    for each in (alone, trainer, other):
        train(each, data[6:])
    for each in (trainer, other):
        each.collect()
        assert differences(each.net, one) == []


def over(lag: Any = 0, places: Any = ("cpu:0", "cpu:1"), layers: int = 3, **options: Any) -> Any:
    return chain(layers).trainer(sgd, lag=lag, places=places if isinstance(places, dict) else list(places), **options)


@pytest.mark.parametrize("fault", ["taken", "send_values", "send_target"])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_transfer_that_is_missing_is_seen(fault: str, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended devices bite: without one kind of transfer a step uses a tensor where it is not."""
    trainer = over(lag)
    pretended = Pretended(trainer)
    whole = getattr(Devices, fault)

    def lost(self: Any, *given: Any) -> Any:
        if fault == "taken":
            return given
        moved, self.moved = self.moved, lambda start, end, values: (values, None)
        whole(self, *given)
        self.moved = moved
        return None

    monkeypatch.setattr(Devices, fault, lost)

    def run() -> None:
        for x, y in batches(4):
            with pretended.step((x, y)):
                trainer.step(x, target=y)

    with pytest.raises(Exception, match="is given tensors of the places"):
        run()


def test_each_value_crosses_once() -> None:
    """Two partitions on one place take the same value, and a third place takes it too."""
    trainer = over(places=["cpu:0", "cpu:1", "cpu:2", "cpu:1"])
    pretended = Pretended(trainer)
    x, y = batches(1)[0]
    for _ in range(2):
        with pretended.step((x, y)):
            trainer.step(x, target=y)
    numbers = [place for _, place in pretended.moves]
    # place 0 takes x, the label and two gradients; place 1 the label, the target, two values and a gradient; place 2 the rest
    assert [numbers.count(place) for place in range(3)] == [4, 5, 3]


def test_a_schedule_names_the_places() -> None:
    text = "F0@cpu:0 S0 B0 U0@cpu:0 F1@cpu:1 B1 T0 M0 U1"
    net, one = chain(1), chain(1)
    trainer, alone = net.trainer(sgd, text), one.trainer(sgd)
    assert isinstance(trainer.engine, Devices)
    assert [str(each) for each in trainer.engine.named] == ["cpu:0", "cpu:1"]
    train(trainer, batches(4))
    train(alone, batches(4))
    assert differences(net, one) == []
    with pytest.raises(ScheduleError, match=r"F1@cpu:1 names cpu:1, but submod_1 is on cpu:2"):
        chain(1).trainer(sgd, text, places=["cpu:0", "cpu:2"])
    with pytest.raises(ScheduleError, match="both belong to submod_0"):
        chain(1).trainer(sgd, text.replace("U0@cpu:0", "U0@cpu:1"))


def test_partitions_are_balanced_over_places() -> None:
    trainer = over(layers=5)
    assert trainer.engine.places == tuple(sorted(trainer.engine.places))
    assert set(trainer.engine.places) == {0, 1}
    assert over(places={f"submod_{index}": f"cpu:{index % 2}" for index in range(4)}).engine.places == (0, 1, 0, 1)


class Tied(nn.Module):
    """Layers that share what they are asked to: a weight, a buffer, or a frozen weight."""

    mask: Tensor

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4))
        self.shared = shared
        if shared == "weight":
            self.last.weight = self.first.weight
        if shared == "frozen":
            self.last.bias = self.first.bias
            self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.tanh(x * self.mask if self.shared == "buffer" else x)
        out: Tensor = self.last(x)
        return out * self.mask if self.shared == "buffer" else out


class Weighted(nn.Module):
    """A loss that holds a tensor on a device that is none of a run's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(1, device="meta"))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()


def tied(shared: str, loss: Any = nn.functional.mse_loss) -> DecoupledModule:
    return dnifx.decouple(Tied(shared), ["tanh"], args=(torch.randn(3, 4),), loss=loss)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "no such device": (chain, ["cpu", "cuda:99"], "cuda:99 cannot be had: this machine has"),
    "a device that holds nothing": (chain, ["cpu", "meta"], "meta cannot be had: tensors there hold no values"),
    "no device": (chain, ["cpu", "gpu0"], "'gpu0' is no place"),
    "a stream that is none": (chain, ["cpu/0", "cpu/1"], "cpu has none"),
    "too many places": (chain, [f"cpu:{n}" for n in range(9)], "4 partitions give work for 4 places, not for 9"),
    "neither one each nor one for several": (
        chain,
        ["cpu:0", "cpu:1", "cpu:0"],
        "3 places were given for 4 partitions",
    ),
    "a name that is none": (chain, {"submod_7": "cpu:0"}, "places= names 'submod_0', 'submod_1'"),
    "a tied weight": (lambda: tied("weight"), ["cpu:0", "cpu:1"], "they share the parameter"),
    "a shared buffer": (lambda: tied("buffer"), ["cpu:0", "cpu:1"], "they read 'mask'"),
    "a frozen weight": (lambda: tied("frozen"), ["cpu:0", "cpu:1"], "they read 'first.bias'"),
    "a suffix of copies": (
        lambda: dnifx.decouple(
            mlp(4, 5, 3),
            ["1"],
            args=(torch.randn(3, 4),),
            gradient=Suffix(readout="shared"),
            loss=nn.functional.mse_loss,
        ),
        ["cpu:0", "cpu:1"],
        "the suffix on '1' copies '2.",
    ),
    "a loss elsewhere": (lambda: tied("", loss=Weighted()), ["cpu:0", "cpu:1"], "the loss holds tensors on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused(case: str) -> None:
    make, places, text = REFUSED[case]
    with pytest.raises(PlaceError) as caught:
        make().trainer(sgd, places=places)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_scaler_and_an_automatic_lag_are_refused() -> None:
    with pytest.raises(OptimizerError, match="does not go with places="):
        over(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ScheduleError, match="lag='auto' measures"):
        over("auto")


@pytest.mark.parametrize(("before", "after"), [(("cpu:0", "cpu:1"), None), (None, ("cpu:0", "cpu:1"))])
@pytest.mark.parametrize("folder", [False, True])
def test_a_saved_run_goes_on_in_other_places(before: Any, after: Any, folder: bool, tmp_path: Path) -> None:
    """Targets that are under way are saved, too."""
    data = batches(8)
    whole = chain().trainer(sgd, lag=3)
    train(whole, data)
    first, second = (chain().trainer(sgd, lag=3, places=each) for each in (before, after))
    train(first, data[:5])
    if folder:
        first.save(tmp_path)
        assert second.load(tmp_path)
    else:
        second.load_state_dict(first.state_dict())
    train(second, data[5:])
    train(first, data[5:])
    for trainer in (first, second):
        trainer.collect()
        assert differences(trainer.net, whole.net) == []


def test_a_run_is_copied_with_what_is_under_way() -> None:
    trainer = over(2)
    train(trainer, batches(3))
    copies = copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))
    for each in (trainer, *copies):
        train(each, batches(6)[3:])
        assert differences(each.net, trainer.net) == []
        held = {id(one) for one in each.net.parameters()} | {id(one) for one in each.net.buffers()}
        assert each.engine._tensors.keys() <= held, "each tensor is known once, by its own number"


def test_weights_go_to_their_places_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are together while the model is captured for another kind of inputs, and where it is asked for."""
    where: dict[int, str] = {}
    monkeypatch.setattr(devices, "put", lambda tensor, device: where.update({id(tensor): str(device)}))
    trainer, x = over(), batches(1)[0][0]
    net, engine = trainer.net, trainer.engine

    def spread() -> bool:
        homes = {name: f"cpu:{engine.places[part.index]}" for part in net.partitions for name in part.parameters}
        return all(where[id(each)] == homes[name] for name, each in net.original.named_parameters())

    assert spread()
    with pytest.raises(StateError, match=r"are on cpu:0, cpu:1. Evaluate with trainer.evaluate"):
        net(x)
    with pytest.raises(StateError, match="are on cpu:0, cpu:1"):
        net.trainer(sgd)
    seen: list[bool] = []
    captured = net.parts[0]
    again = captured.recompile

    def noted(*given: Any) -> Program:
        seen.append({*where.values()} == {"cpu"})
        return again(*given)

    captured.recompile = noted
    net.eval()
    output = trainer.evaluate(x)
    assert seen == [True]
    assert spread()
    trainer.collect()
    assert {*where.values()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(net(x), output)
    assert set(net.state_dict()) == set(chain().state_dict())
    net.train()
    train(trainer, batches(2))
    assert spread()


def test_a_device_that_forward_names_is_that_of_the_place() -> None:
    """The example's device is a constant of the graph."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            out: Tensor = self.last(x) + torch.arange(4, device=torch.device("cpu"))
            return out

    net = dnifx.decouple(Named(), ["tanh"], args=(torch.randn(3, 4),), loss=nn.functional.mse_loss)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    first, last = net.submodules
    assert on_device(first, cpu, meta) is first
    moved = on_device(last, cpu, meta)
    assert [node.kwargs["device"] for node in moved.graph.nodes if "device" in node.kwargs] == [meta]
    assert torch.equal(on_device(last, cpu, torch.device("cpu:0"))(torch.ones(3, 4))[0], last(torch.ones(3, 4))[0])


def test_a_tensor_that_is_on_the_host_stays_there() -> None:
    """A size or a random number that a partition on a GPU keeps on the host is handed on as it is."""
    host, gpu, empty = torch.ones(1), Place(torch.device("cuda:0")), Place(torch.device("meta"))
    (stays, moves) = relocated((host, gpu.device), gpu, empty)
    assert stays is host
    assert moves == empty.device
    assert relocated(({"a": host},), Place(torch.device("cpu")), empty)[0]["a"].is_meta
