"""True gradients that come late: each partition is updated by the gradient of an earlier step, at the weights of that step."""

import copy
import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dnifx
from dnifx import estimators
from dnifx.errors import DnifxError, EstimatorError, InputError, ScheduleError
from dnifx.estimators.late import LateGradient
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.flight import corrected, corrections_of

STEPS, RATE, WIDTH = 11, 0.05, 5


class Skipping(nn.Module):
    """Four layers; the values of the first are read by the second, the third and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.a(x))
        second = torch.tanh(self.norm(self.b(first)))
        third = torch.tanh(self.c(second) + first)
        out: Tensor = self.d(third) + first.square()
        return out


class Noisy(nn.Module):
    """A chain with dropout before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(nn.functional.dropout(torch.tanh(self.a(x)), 0.4))
        return out


def chain(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)))


MODELS = {
    "chain": (lambda: chain(3), ["0", "1"], {"0": 2, "1": 1, "2": 0}),
    "one cut": (lambda: chain(2), ["0"], {"0": 1, "1": 0}),
    "skips": (Skipping, ["tanh", "tanh_1", "tanh_2"], {"a": 3, "b": 2, "norm": 2, "c": 1, "d": 0}),
}


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    sizes = [6 + (step % 3 == 2) for step in range(count)]
    return [(torch.randn(n, WIDTH, generator=made), torch.randn(n, WIDTH, generator=made)) for n in sizes]


def decoupled(model: nn.Module, cuts: list[str], k: int, correction: float = 0.0) -> DecoupledModule:
    gradient = estimators.Late(k, correction)
    return dnifx.decouple(model, cuts, args=(batches(1)[0][0],), gradient=gradient, loss=mse_loss)


def made(name: str, k: int, correction: float = 0.0) -> tuple[nn.Module, DecoupledModule, dict[str, int]]:
    torch.manual_seed(0)
    make, cuts, depths = MODELS[name]
    model = make()  # type: ignore[operator]
    return copy.deepcopy(model), decoupled(model, cuts, k, correction), depths


def by_hand(model: nn.Module, depths: dict[str, int], k: int, accumulate: int = 1, correction: float = 0.0) -> None:
    """Backpropagate through the whole model in each step; give each parameter the gradient of the step that is its own."""
    past: list[dict[str, Tensor]] = []
    then: list[dict[str, Tensor]] = []
    waiting: dict[str, list[Tensor]] = {}
    for x, y in batches():
        model.zero_grad()
        mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        past.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
        then.append({name: each.detach().clone() for name, each in model.named_parameters()})
        for name, each in model.named_parameters():
            step = len(past) - 1 - k * depths[name.split(".")[0]]
            if step >= 0:
                late = past[step][name]
                moved = each.detach() - then[step][name]
                waiting.setdefault(name, []).append(late + correction * late * late * moved)
            if len(waiting.get(name, ())) == accumulate:
                with torch.no_grad():
                    each.sub_(RATE * torch.stack(waiting.pop(name)).sum(0) / accumulate)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_each_partition_learns_from_the_gradient_of_its_own_step(name: str, k: int, accumulate: int) -> None:
    alone, net, depths = made(name, k)
    trainer = net.trainer(sgd, accumulate=accumulate)
    for x, y in batches():
        trainer.step(x, target=y)
    by_hand(alone, depths, k, accumulate)
    expected = alone.state_dict()
    for path, found in net.original.state_dict().items():
        assert torch.allclose(found, expected[path], atol=1e-6), path


@settings(max_examples=12)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 3), st.sampled_from([1, 2]), st.floats(0.01, 2e3), st.booleans())
def test_late_gradients_are_corrected_for_what_the_weights_have_moved(
    name: str, k: int, accumulate: int, correction: float, resumed: bool
) -> None:
    alone, net, depths = made(name, k, correction)
    trainer = net.trainer(sgd, accumulate=accumulate)
    for step, (x, y) in enumerate(batches()):
        if resumed and step == 5:
            state, net = trainer.state_dict(), made(name, k, correction)[1]
            trainer = net.trainer(sgd, accumulate=accumulate)
            trainer.load_state_dict(state)
        trainer.step(x, target=y)
    by_hand(alone, depths, k, accumulate, correction)
    expected = alone.state_dict()
    for path, found in net.original.state_dict().items():
        assert torch.allclose(found, expected[path], rtol=1e-4, atol=1e-5), path


def test_a_correction_is_of_sparse_gradients_too() -> None:
    gradient, moved = torch.randn(4, 3), torch.randn(4, 3)
    gradient[[0, 2]] = 0
    sparse = corrected(gradient.to_sparse(1), moved, 0.5)
    assert sparse.is_sparse
    assert torch.allclose(sparse.to_dense(), gradient + 0.5 * gradient * gradient * moved)
    assert corrected(gradient, moved, 0.0) is gradient


@pytest.mark.parametrize("correction", [-1, float("inf"), float("nan"), True, "much"])
def test_a_correction_is_a_number(correction: object) -> None:
    with pytest.raises(EstimatorError, match="give a number, 0 or more"):
        estimators.Late(1, correction)  # type: ignore[arg-type]


def test_a_partition_has_one_correction() -> None:
    program = made("chain", 1, 0.1)[1].program
    first, second = program.boundaries
    program = replace(program, boundaries=(first, replace(second, producer=first.producer)))
    assert corrections_of(program) == {"submod_0": 0.1}
    one, other = program.interfaces
    program = replace(program, interfaces=(one, replace(other, estimator=LateGradient(1))))
    with pytest.raises(ScheduleError, match=r"correction=0.1 and 0.0, but its weights have one gradient"):
        corrections_of(program)


def weight_versions(trainer: dnifx.Trainer) -> int:
    kept = trainer.state_dict()["parts"][0]["flight"]["passages"]["submod_0"]
    return len({each["weights"]["0.0.weight"].data_ptr() for each in kept.values()})


@pytest.mark.parametrize(("accumulate", "versions"), [(1, 4), (4, 2)])
def test_steps_between_two_updates_share_their_weights(accumulate: int, versions: int) -> None:
    net = made("one cut", 4)[1]
    trainer = net.trainer(sgd, accumulate=accumulate)
    most = 0
    for x, y in batches(20):
        trainer.step(x, target=y)
        most = max(most, weight_versions(trainer))
    assert most == versions


@pytest.mark.parametrize("stop", [2, 5, 8])
@pytest.mark.parametrize("name", [*MODELS, "noisy"])
def test_a_resumed_run_goes_on_bit_for_bit(name: str, stop: int) -> None:
    def fresh() -> dnifx.Trainer:
        torch.manual_seed(0)
        net = decoupled(Noisy(), ["dropout"], 3) if name == "noisy" else made(name, 2)[1]
        return net.trainer(sgd)

    whole, first, second = fresh(), fresh(), fresh()
    torch.manual_seed(5)
    for x, y in batches():
        whole.step(x, target=y)
    torch.manual_seed(5)
    for x, y in batches()[:stop]:
        first.step(x, target=y)
    file, random = io.BytesIO(), torch.get_rng_state()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(random)
    for x, y in batches()[stop:]:
        second.step(x, target=y)
    for path, expected in whole.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[path], expected), path


def test_the_schedule_and_the_code_say_how_late_a_backward_pass_is() -> None:
    net = made("chain", 4)[1]
    assert net.program.schedule is not None
    assert str(net.program.schedule) == "F0 F1 F2 B2 T1-4 U2 B1-4 T0-4 U1 B0-8 U0"
    assert "backward of submod_0, for the batch of 8 steps ago" in net.code
    assert dnifx.schedules.parse(str(net.program.schedule)) is not None
    dnifx.schedules.validate(net.program.schedule, net.program)


@pytest.mark.parametrize("name", MODELS)
def test_a_late_gradient_leaves_the_forward_lock_alone(name: str) -> None:
    program = made(name, 2)[1].program
    waiting = dnifx.schedules.locks(dnifx.schedules.sequential(program), program)
    assert {dnifx.schedules.Lock.UPDATE, dnifx.schedules.Lock.BACKWARD} <= waiting[0]
    assert program.schedule is not None
    assert frozenset().union(*dnifx.schedules.locks(program.schedule, program)) == {dnifx.schedules.Lock.FORWARD}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model[2].weight = model[0].weight
    return model


def test_what_does_not_go_with_late_gradients_is_refused() -> None:
    x, y = batches(1)[0]
    with pytest.raises(EstimatorError, match="1 or more"):
        estimators.Late(0)
    with pytest.raises(ScheduleError, match="share a parameter"):
        decoupled(tied(), ["1"], 2)
    with pytest.raises(ScheduleError, match="same Late"):
        dnifx.decouple(chain(3), ["0", "1"], args=(x,), gradient={"0": estimators.Late(2), "1": "zero"}, loss=mse_loss)
    net = made("chain", 2)[1]
    with pytest.raises(ScheduleError, match="Leave lag= out"):
        net.trainer(sgd, lag=2)
    partial = dnifx.schedules.fixed(dnifx.schedules.parse("F0 F1 F2 B2 U2"), partial=True)
    for schedule in ("random_order{p=0.9}", partial):
        with pytest.raises(ScheduleError, match="every partition runs"):
            net.trainer(sgd, schedule)
    with pytest.raises(ScheduleError, match="lag"):
        net.trainer(sgd, "F0 F1 F2 B2 T1-3 B1-3 T0-3 B0-6 U0 U1 U2")
    with pytest.raises(InputError, match="no estimates"):
        net.trainer(sgd).probe(x, target=y)
    with pytest.raises(EstimatorError, match="earlier steps"):
        net(x)
    with pytest.raises(DnifxError, match="folder"):
        net.to_folder("never")
    with torch.no_grad():
        assert torch.equal(net(x), net.original(x))
