"""Systems of several rates as properties of random ones, against joint backpropagation through a whole period."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import CutError, DnifxError, EstimatorError, InputError, LossError, ScheduleError, StateError
from tests.passes.rates.system_models import (
    Both,
    Fast,
    Slow,
    SystemCase,
    joint,
    largest,
    message_interfaces,
    system_cases,
)


class Known(nn.Module):
    """Answers with what a table says of the values it is asked about, zero for any other.

    Values are found where they are equal but for rounding: some processors round a product of one window otherwise than the same
    rows of a product of several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.table: list[tuple[Tensor, Sequence[Tensor]]] = []
        self.targets: list[Tensor] = []

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        answer: Sequence[Tensor] = [torch.zeros_like(value) for value in values]
        for first, gradients in self.table:
            if first.shape == values[0].shape and torch.allclose(first, values[0], rtol=1e-9, atol=1e-12):
                answer = gradients
        made = tuple(each + 0 * self.anchor for each in answer)
        found = [torch.empty(0)] * len(made)
        for place, (each, said) in enumerate(zip(made, answer, strict=True) if torch.is_grad_enabled() else ()):
            each.register_hook(lambda fit, place=place, said=said: self.note(found, place, said - fit * len(said) / 2))
        return made

    def note(self, found: list[Tensor], place: int, target: Tensor) -> None:
        found[place] = target.detach()
        self.targets = found


class Watched:
    """A trainer whose weights stay, with the gradients of every update."""

    def __init__(self, net: dnifx.DecoupledModule) -> None:
        self.trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        self.model = net.original
        self.updates: dict[str, list[dict[str, Tensor]]] = {name: [] for name in self.trainer.optimizers}
        for name, optimizer in self.trainer.optimizers.items():
            optimizer.register_step_pre_hook(lambda *_, name=name: self.updates[name].append(self.gradients()))

    def gradients(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}

    def total(self) -> dict[str, Tensor]:
        """Return the sum over all updates of the gradients of the parameters that each partition owns."""
        found = {name: torch.zeros_like(parameter) for name, parameter in self.model.named_parameters()}
        owned = {part.name: part.parameters for part in self.trainer.net.partitions}
        for name, updates in self.updates.items():
            for update in updates:
                for parameter in owned[name]:
                    found[parameter] += update[parameter]
        return found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def per_example(gradient: Tensor, case: SystemCase) -> Tensor:
    return gradient * (case.batch if case.mean else 1)


def known_estimators(net: dnifx.DecoupledModule) -> dict[str, Known]:
    found = {name: each for name, each in net.named_modules() if isinstance(each, Known)}
    return {name.rpartition(".")[2]: each for name, each in found.items()}


@settings(max_examples=12)
@given(system_cases())
def test_the_true_gradients_of_messages_and_states_give_joint_backpropagation(case: SystemCase) -> None:
    """Summed over a period, with the fast weights held, the gradients are those of one backward pass through all of it."""
    inner = dict.fromkeys(("fast.lift", "slow.lift"), "oracle")
    choices = {"fast": lambda spec: Known(), "*_state": lambda spec: Known(), **inner}
    names = {"fast", *case.inner, *(["*_state"] if case.states else [])}
    net = case.decouple({name: choice for name, choice in choices.items() if name in names})
    watched, states = Watched(net), case.states
    for seed in range(2):
        true = joint(case, seed, states, cut_messages=False, cut_time=False)
        known = known_estimators(net)
        known["fast"].table = [
            (said[0].flatten(0, 1), [per_example(each.flatten(0, 1), case) for each in arrived])
            for said, arrived in zip(true.messages, true.arrived, strict=True)
        ]
        if "fast_state" in known:
            known["fast_state"].table = [
                (ended[0], [per_example(each, case) for each in later])
                for ended, later in zip(true.ended[:-1], true.later[:-1], strict=True)
            ]
        watched.updates = {name: [] for name in watched.updates}
        for number in range(case.every):
            case.step(watched.trainer, seed, number)
        found = watched.total()
        assert largest(list(found.values()), [true.gradients[name] for name in found]) < 1e-10
        states = true.states


@settings(max_examples=12)
@given(system_cases())
def test_without_gradients_the_message_is_detached(case: SystemCase) -> None:
    inner = dict.fromkeys(case.inner, "oracle")
    watched = Watched(case.decouple({**inner, "fast": "zero", **({"*_state": "zero"} if case.states else {})}))
    true = joint(case, 0, case.states, cut_messages=True, cut_time=True)
    for number in range(case.every):
        case.step(watched.trainer, 0, number)
    found = watched.total()
    assert largest(list(found.values()), [true.gradients[name] for name in found]) < 1e-10


@settings(max_examples=12)
@given(system_cases(inner=False))
def test_the_target_of_each_message_is_the_slow_gradient_of_each_example(case: SystemCase) -> None:
    net = case.decouple({"fast": lambda spec: Known(), **({"*_state": "zero"} if case.states else {})})
    trainer, states = Watched(net).trainer, case.states
    for seed in range(2):
        for number in range(case.every):
            known_estimators(net)["fast"].targets = []
            case.step(trainer, seed, number)
            assert bool(known_estimators(net)["fast"].targets) == (number == case.every - 1)
        true = joint(case, seed, states, cut_messages=True, cut_time=True)
        expected = [torch.cat([a.flatten(0, 1) for a in each]) for each in zip(*true.arrived, strict=True)]
        wanted = [per_example(each, case) for each in expected]
        assert largest(known_estimators(net)["fast"].targets, wanted) < 1e-10
        assert max(float(each.abs().max()) for each in wanted) > 0
        states = true.states


@settings(max_examples=6)
@given(system_cases(), st.integers(1, 7))
def test_each_part_updates_when_it_fires(case: SystemCase, windows: int) -> None:
    watched = Watched(case.decouple())
    for window in range(windows):
        result = case.step(watched.trainer, window // case.every, window % case.every)
        due = (window + 1) % case.every == 0
        assert ("slow" in result.losses) == due
        assert (result.output["verdict"] is not None) == due
        assert ("fast" in result.losses) == case.own_loss
    owners = {name: part.name for part in watched.trainer.net.partitions for name in part.parameters}
    assert len(watched.updates[owners["fast.speech.0.weight"]]) == windows
    slow = owners["slow.readout.weight"]
    assert len(watched.updates[slow]) == windows // case.every


@settings(max_examples=6)
@given(system_cases())
def test_the_scale_multiplies_what_the_fast_part_receives(case: SystemCase) -> None:
    totals = []
    for scale in (0.0, 1.0, 10.0):
        torch.manual_seed(0)
        net = copy.deepcopy(case).decouple(
            {"**": dnifx.estimators.Synthetic(), "*_state": "zero"} if case.states else "synthetic", scale
        )
        with torch.no_grad():
            for parameter in message_interfaces(net)[0].estimator.parameters():
                parameter.add_(0.3)
        watched = Watched(net)
        case.step(watched.trainer, 0, 0)
        totals.append(watched.total()["fast.speech.0.weight"])
    assert largest([totals[2] - totals[0]], [10 * (totals[1] - totals[0])]) < 1e-9
    assert float((totals[1] - totals[0]).abs().max()) > 0


@settings(max_examples=6)
@given(system_cases(), st.integers(1, 4), st.integers(0, 1000))
def test_a_run_resumes_bit_for_bit_in_the_middle_of_a_period(case: SystemCase, stop: int, seed: int) -> None:
    other = copy.deepcopy(case)
    torch.manual_seed(seed)
    trainer = case.decouple().trainer(sgd)
    for window in range(7):
        if window == stop:
            trainer.reset(torch.arange(case.batch) == 0)
            saved = copy.deepcopy(trainer.state_dict())
        case.step(trainer, window // case.every, window % case.every)
    resumed = other.decouple().trainer(sgd)
    resumed.load_state_dict(saved)
    for window in range(stop, 7):
        other.step(resumed, window // case.every, window % case.every)
    first, second = trainer.net.state_dict(), resumed.net.state_dict()
    assert first.keys() == second.keys() >= case.model.state_dict().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=8)
@given(system_cases(inner=False))
def test_messages_of_an_episode_that_ended_are_lost(case: SystemCase) -> None:
    """The slow part sees zeros in their place, their target is 0, and the states of the examples begin anew."""
    net = case.decouple({"fast": lambda spec: Known(), **({"*_state": "zero"} if case.states else {})})
    trainer = Watched(net).trainer
    for number in range(case.every):
        case.step(trainer, 0, number)
    begins = torch.arange(case.batch) == 0
    slow_seen: list[Tensor] = []
    case.model.slow.readout.register_forward_pre_hook(lambda _, given: slow_seen.append(given[0].detach().clone()))
    for number in range(case.every):
        if number == case.every - 1:
            trainer.reset(begins)
        case.step(trainer, 1, number)
    target = known_estimators(net)["fast"].targets[0].unflatten(0, (case.every, case.batch))
    assert not target[:-1, 0].any()
    assert target[-1, 0].any()
    assert target[:, 1:].any()
    trainer.step(case.window(case.period(2)[0], 0), target={"fast": case.period(2)[1][:1]})
    with pytest.raises(InputError, match=r"give one boolean for each of the \d examples"):
        trainer.reset(torch.ones(7, dtype=torch.bool))


def plain_case(**fixed: Any) -> SystemCase:
    torch.manual_seed(0)
    model = Both(Fast("gru", 2, 1), Slow("lstm", 1)).double()
    return SystemCase(
        model, 2, **{"every": 4, "batch": 3, "kinds": ("gru", "lstm"), "own_loss": True, "mean": True, **fixed}
    )


class Pairs(nn.Module):
    """Makes one message of every two; of one alone, too."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(4, 4)

    def forward(self, messages: Tensor) -> Tensor:
        heard = torch.tanh(self.lift(messages))
        return torch.stack([pair.mean(0) for pair in torch.split(heard, 2)])


class Chain(nn.Module):
    """Three networks, each of which hears the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.middle, self.slow = nn.Linear(3, 4), Pairs(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        told: Tensor = self.slow(self.middle(self.fast(x))).sum(0)
        return told


def chain(every: dict[str, Any], cuts: Sequence[str] = ("fast", "middle"), **options: Any) -> dnifx.DecoupledModule:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, dtype=torch.double)
    return dnifx.decouple(Chain().double(), list(cuts), every=every, args=(x,), loss=mean_square, **options)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()


def test_a_chain_of_three_rates_is_joint_backpropagation_of_its_longest_period() -> None:
    known = {"fast": Known(), "middle": Known()}
    net = chain(
        {"middle": 2, "slow": 6}, gradient={name: (lambda spec, each=each: each) for name, each in known.items()}
    )
    assert [plan.every for plan in net.program.parts] == [1, 2, 6]
    assert str(net).count("at once") == 2
    model, x = net.original, torch.randn(6, 2, 3, dtype=torch.double)
    target, said = torch.randn(2, 2, dtype=torch.double), {}
    for name in known:
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: said.update({name: out}))
    with torch.enable_grad():
        loss = mean_square(model(x), target)
    whole = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [*whole.values(), *said.values()])
    for (name, each), arrived in zip(known.items(), found[len(whole) :], strict=True):
        messages = zip(said[name].detach(), 2 * arrived, strict=True)
        each.table = [(message, [gradient]) for message, gradient in messages]
    watched = Watched(net)
    seen = watched.trainer.probe_period([(x[number : number + 1], target) for number in range(6)])
    assert list(seen.true) == ["fast", "middle"]
    assert all(float(each["relative_error"]) < 1e-12 for each in seen.true.values())
    assert torch.allclose(seen.losses["loss"], loss.detach(), rtol=1e-12)
    for number in range(6):
        result = watched.trainer.step(x[number : number + 1], target=target)
        assert set(result.losses) == ({"loss"} if number == 5 else set())
    total = watched.total()
    assert largest([total[name] for name in whole], found[: len(whole)]) < 1e-12
    assert [len(watched.updates[f"submod_{index}"]) for index in range(3)] == [6, 3, 1]


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (
            {"middle": 2, "slow": 3},
            r"submod_2 \('slow'\) fires every 3 windows, but takes from submod_1 \('middle'\), which fires every 2",
        ),
        ({"middle": 4, "slow": 2}, r"4 does not divide 2"),
    ],
)
def test_a_rate_that_does_not_divide_names_both_partitions(every: dict[str, int], text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        chain(every)


@pytest.mark.parametrize(
    ("every", "text"),
    [
        ({"slwo": 2}, "'slwo' is no module or partition of this model; nearest: 'slow'"),
        ({"slow": 0}, "give a number of windows, 1 or more"),
        ({"fast": 2}, "nothing fires at every window"),
        ({"slow": 2, "submod_2": 4}, "both lie in submod_2"),
    ],
)
def test_a_rate_that_is_none_says_why(every: dict[str, int], text: str) -> None:
    with pytest.raises(CutError, match=text):
        chain(every)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(CutError, match="inputs= does not go together with every="):
        chain({"slow": 2}, inputs="synthetic")  # type: ignore[call-overload]
    with pytest.raises(CutError, match="Name the modules after which to cut"):
        dnifx.decouple(Chain(), 2, every={"slow": 2}, args=(torch.randn(1, 2, 3),))
    with pytest.raises(EstimatorError, match="give an estimator that answers at once"):
        chain({"middle": 2}, gradient="oracle")
    with pytest.raises(EstimatorError, match="gradient= names a boundary 'nowhere'"):
        chain({"middle": 2}, gradient={"nowhere": "zero"})
    with pytest.raises(LossError, match="loss= is a mapping, which goes with every="):
        dnifx.decouple(Chain(), "fast", args=(torch.randn(1, 2, 3),), loss={"slow": mean_square})  # type: ignore[call-overload]
    net = chain({"middle": 2})
    with torch.no_grad():
        assert net(torch.randn(2, 2, 3).double()).shape == (2, 2)
    with pytest.raises(DnifxError, match="cannot be written to a folder"):
        net.to_folder("never")


def test_messages_have_to_lead_with_windows() -> None:
    class Folded(Chain):
        def forward(self, x: Tensor) -> Tensor:
            told: Tensor = self.slow(torch.tanh(self.middle(self.fast(x).mean(0, keepdim=True)))).sum(0)
            return told

    x = torch.randn(1, 2, 3)
    with pytest.raises(CutError, match=r"expected 2 times as many messages: let inputs and messages lead with time"):
        dnifx.decouple(Folded(), ["fast", "middle"], every={"slow": 2}, args=(x,), loss=mean_square)


def test_what_two_rates_share_is_refused() -> None:
    class Remembering(Chain):
        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            heard = self.middle(self.fast(x + state[:, :3]))
            return self.slow(heard).sum(0), heard[-1]

    x, zero = torch.randn(1, 2, 3), torch.zeros(2, 4)
    cuts: list[Any] = ["fast", "middle", dnifx.Recurrent("state", "1")]
    with pytest.raises(CutError, match="the state is taken or left by parts that fire at different rates"):
        dnifx.decouple(Remembering(), cuts, every={"middle": 2}, args=(x, zero), loss=mean_square)
    tied = Chain()
    tied.slow = nn.Linear(4, 4)
    tied.slow.weight = tied.middle.lift.weight
    with pytest.raises(CutError, match=r"'middle.lift.weight' is trained by two parts"):
        dnifx.decouple(tied, ["fast", "middle"], every={"middle": 2, "slow": 4}, args=(x,), loss=mean_square)
    frozen = Chain()
    frozen.middle.requires_grad_(False)
    with pytest.raises(CutError, match="reads no trainable parameter, so that no gradient of theirs would come back"):
        dnifx.decouple(frozen, ["fast", "middle"], every={"middle": 2}, args=(x,), loss=mean_square)


def test_a_part_holds_for_the_inputs_and_modes_of_its_capture() -> None:
    case = plain_case()
    net = case.decouple()
    trainer = net.trainer(sgd, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    x, answers, _ = case.period(0)
    with pytest.raises(InputError, match=r"captured for other inputs or another mode \(it now takes \(8, 3, 3\)\)"):
        trainer.step(x, target={"fast": answers})
    zero = torch.zeros(3, 4, dtype=torch.double)
    first = trainer.step(case.window(x, 0), zero, (zero, zero), target={"fast": answers[:1]})
    assert first.output["slow"] is None or first.output["verdict"] is None
    net.eval()
    with pytest.raises(InputError, match="another mode"):
        case.step(trainer, 0, 1)
    net.train()
    for number in range(1, 4):
        case.step(trainer, 0, number)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
    assert rates == {"submod_0": 0.05 / 16, "submod_1": 0.05 / 2}
    assert "# every 4: one firing" in net.code


def test_losses_are_named_by_parts() -> None:
    case = plain_case()
    trainer = case.decouple().trainer(sgd)
    with pytest.raises(LossError, match=r"the part of 'fast' fires in this window, and its target is missing"):
        trainer.step(case.window(case.period(0)[0], 0), target={})
    options: dict[str, Any] = {"every": {"slow": 4}, "args": (torch.randn(2, 3, 3).double(),), "kwargs": case.states}
    cuts: list[Any] = ["fast", dnifx.Recurrent("fast_state", "fast"), dnifx.Recurrent("slow_state", "slow")]
    with pytest.raises(LossError, match="2 parts of the model compute outputs"):
        dnifx.decouple(case.model, cuts, loss=case.loss, **options)
    with pytest.raises(LossError, match="which fire together"):
        dnifx.decouple(case.model, cuts, loss={"fast": case.loss, "fast.readout": case.loss}, **options)
    with pytest.raises(LossError, match="a trainer needs a loss"):
        dnifx.decouple(case.model, cuts, **options).trainer(sgd)


def test_a_state_of_another_system_is_refused() -> None:
    saved = plain_case().decouple().trainer(sgd).state_dict()
    with pytest.raises(StateError, match=r"has optimizers for .*, this trainer for"):
        chain({"middle": 2}).trainer(sgd).load_state_dict(saved)
    with pytest.raises(StateError, match="has 2 parts of 3"):
        chain({"middle": 2, "slow": 4}).trainer(sgd).load_state_dict(saved)


def test_a_period_is_printed_parsed_drawn_and_simulated() -> None:
    net = plain_case(every=2).decouple()
    period = schedules.sequential_period(net.program)
    assert str(period) == "F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 T0 M0 U1"
    assert schedules.parse_period(str(period), period.name) == period
    drawn = schedules.grid(period, net.program).plain(200).splitlines()
    assert drawn[0] == "sequential: 13 actions in 2 windows"
    assert drawn[2].split() == "submod_0 F0 S0 B0 U0 | F0 S0 B0 U0 T0 M0".split()
    assert drawn[3].split() == "submod_1 | F1 B1 U1".split()
    assert drawn[2].index("|") == drawn[3].index("|")
    costs = dict.fromkeys(("F0", "B0", "U0", "S0"), 1.0) | dict.fromkeys(("F1", "B1", "U1", "T0", "M0"), 10.0)
    simulation = schedules.simulate(period, net.program, costs)
    assert simulation.makespan == 2 * 4 + 50
    assert {span.step for span in simulation.spans} == {0, 1}
    assert schedules.simulate(period, net.program, steps=2).makespan == pytest.approx(
        2 * schedules.simulate(period, net.program).makespan
    )


def test_a_period_that_is_run_is_the_one_that_was_written() -> None:
    case = plain_case(every=2)
    net = case.decouple()
    trainer = net.trainer(sgd, "F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 U1")
    before = copy.deepcopy(message_interfaces(net)[0].estimator.state_dict())
    for window in range(4):
        case.step(trainer, window // 2, window % 2)
    after = message_interfaces(net)[0].estimator.state_dict()
    assert all(
        torch.equal(before[name], after[name]) for name in before if "running" not in name and "batches" not in name
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("F0 S0 B0 U0 F1 B1 T0 M0 U1", "is for a single step, but the partitions fire at different rates"),
        ("F0 S0 B0 U0 | F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 U1", "has 3 windows, but its partitions repeat after 2"),
        (
            "F0 S0 B0 U0 | F0 S0 B0 U0",
            "Window 1 .* submod_1 fires every 2, so it fires in this window, but F1 is missing",
        ),
        ("F0 S0 B0 U0 F1 B1 U1 | F0 S0 B0 U0 F1 B1 U1", "Window 0 .* so it does not fire in this window. Remove F1"),
        ("F0 B0 U0 | F0 S0 B0 U0 F1 B1 U1", r"B0 .*it needs S0"),
        ("F0 S0 B0 U0 | F0 F1 B1 U1 T0 B0 U0", "would wait for the target of 'fast', which arrives only once in 2"),
        ("F0 S0 B0 U0 | F0 F1 S0 B0 U0 B1 U1", "are mixed"),
        ("F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 M0 T0 U1", "it needs T0"),
    ],
)
def test_a_period_that_is_wrong_says_where(text: str, what: str) -> None:
    net = plain_case(every=2).decouple()
    with pytest.raises(ScheduleError, match=what):
        net.trainer(sgd, text)
