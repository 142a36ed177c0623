"""Whether decoupling pays: what is measured, what is said, and what is refused."""

import json
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import dnifx
from dnifx import doctor
from dnifx.doctor.diagnosis import Contestant, Diagnosis
from dnifx.doctor.memory import Holding
from dnifx.errors import DnifxError, OptionError, PlaceError
from dnifx.schedules import Link
from tests.doctor.nets import classifier, sgd, target


def diagnosed(net: dnifx.DecoupledModule, examples: int = 8, **options: Any) -> Diagnosis:
    return doctor.diagnose(net, target(examples), sgd, rounds=1, **options)


def test_all_ways_to_train_are_compared() -> None:
    found = diagnosed(classifier(examples=16), 16, places=2, link=Link(0.01, 1e8))
    assert [each.name for each in found.contestants] == ["backprop", "ddp", "gpipe", "1f1b", "dnifx"]
    assert all(each.rate > 0 and each.bytes > 0 for each in found.contestants)
    assert len(found.places) == 2
    assert found.notes == ()
    assert found.contestants[-1].bytes == max(each.total for each in found.places)
    shown = found.as_dict()
    assert json.loads(json.dumps(shown)) == shown | {
        key: list(shown[key]) for key in ("ranks", "places", "notes", "contestants")
    }
    assert shown["verdict"] == found.verdict
    assert shown["cores"] is None
    console = Console(width=100)
    with console.capture() as text:
        console.print(found)
    assert found.contestants[3].detail in text.get()
    assert "links of 10 ms one way and 800 Mbit/s" in text.get()


def test_what_places_hold_adds_up_to_the_net() -> None:
    net = classifier()
    found = diagnosed(net, places=3, lag=2)
    parameters = sum(each.nbytes for each in net.original.parameters())
    estimators = sum(b.nbytes for each in net.program.interfaces for b in each.estimator.parameters())
    assert sum(each.weights for each in found.places) == parameters
    assert sum(each.estimators for each in found.places) == estimators
    assert sum(each.gradients for each in found.places) == parameters + estimators
    assert sum(each.optimizer for each in found.places) == parameters + estimators
    assert [each.activations for each in found.places] == [each.activation_bytes for each in net.partitions]
    values = [sum(spec.bytes for spec in each.specs) for each in net.boundaries]
    assert [each.waiting for each in found.places] == [2 * values[0], 2 * values[1], 0]


def test_one_place_has_no_pipelines() -> None:
    found = diagnosed(classifier())
    assert [(each.name, each.places) for each in found.contestants] == [("backprop", 1), ("dnifx", 1)]
    assert found.between == "one place"
    assert found.contestants[1].detail == "3 partitions"
    sizes = [each.activation_bytes for each in classifier().partitions]
    assert found.places[0].activations == max(sizes)


HOLDING = Holding(1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("rate", "size", "words"),
    [
        (20.0, 50, "Decoupling pays in time and in memory: dnifx makes 2 times the steps of backprop, and"),
        (20.0, 100, "Decoupling pays in time: "),
        (
            5.0,
            50,
            "Decoupling pays in memory: dnifx makes 0.5 times the steps of backprop, and its largest place holds 0.62",
        ),
        (10.2, 79, "Decoupling pays neither in time nor in memory: "),
    ],
)
def test_the_verdict_is_one_sentence(rate: float, size: int, words: str) -> None:
    others = (Contestant("backprop", "", 1, 10.0, 100), Contestant("1f1b", "4 micro-batches", 2, 3.0, 80))
    own = Contestant("dnifx", "lag 3", 2, rate, size)
    found = Diagnosis(doctor.this_machine(), "Model", 8, Link(), inf, (0, 1), (HOLDING,) * 2, (*others, own))
    assert found.verdict.startswith(words)
    assert "of 1f1b (4 micro-batches) holds." in found.verdict


def test_a_long_link_makes_decoupling_pay_in_time_and_a_short_one_changes_nothing_else() -> None:
    far = diagnosed(classifier(), places=2, link=Link(0.5))
    rates = {each.name: each.rate for each in far.contestants}
    assert rates["dnifx"] > 10 * max(rates["ddp"], rates["gpipe"], rates["1f1b"])


def test_a_batch_that_cannot_be_divided_leaves_out_what_divides_it() -> None:
    found = diagnosed(classifier(examples=7), 7, places=2)
    assert [each.name for each in found.contestants] == ["backprop", "dnifx"]


class Fixed(nn.Module):
    """A model that takes eight examples and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of eight examples."""
        return self.second(self.first(x).reshape(8, 6))


def test_a_model_of_one_batch_size_is_told_so() -> None:
    net = dnifx.decouple(Fixed(), ["first"], args=(torch.randn(8, 6),), loss=nn.functional.cross_entropy)
    found = diagnosed(net, places=2)
    assert [each.name for each in found.contestants] == ["backprop", "dnifx"]
    assert [note.split(":")[0] for note in found.notes] == [
        f"Not measured with {size}" for size in ("4 examples", "4 examples", "2 examples", "1 example")
    ]


def test_an_estimator_that_cannot_be_fitted_late_has_no_lag() -> None:
    net = classifier(cuts=2, gradient="bplambda")
    found = diagnosed(net, places=2, link=Link(0.1), lag=5)
    assert found.contestants[-1].detail == "lag 0"
    assert found.notes[0].startswith("The lag is 0: ")
    assert found.notes[1].startswith("Not measured with 1 example: ValueError: Expected more than 1 value per channel")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"places": 0}, OptionError, "places=0: give a number above zero"),
        ({"link": Link(-1.0)}, OptionError, "above zero"),
        ({"lag": -1}, OptionError, "above zero"),
        ({"cores": 0}, OptionError, "above zero"),
        ({"places": 9}, PlaceError, "3 partitions give work for 3 ranks"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[DnifxError], words: str) -> None:
    with pytest.raises(error, match=words):
        diagnosed(classifier(), **options)


def test_late_true_gradients_are_refused() -> None:
    with pytest.raises(PlaceError, match=r"Late\(k\) keeps steps under way"):
        diagnosed(classifier(gradient=dnifx.estimators.Late(2)))


def test_a_machine_says_what_it_can_run() -> None:
    machine = doctor.this_machine()
    assert machine.devices[0].name == "cpu"
    assert machine.threads == torch.get_num_threads()
    assert machine.as_dict()["runs"] == machine.runs
    assert "no gloo" in replace(machine, backends=()).runs
    assert "one core" in replace(machine, backends=("gloo",), cores=1).runs
    assert "or on one of 2 GPUs" in replace(machine, devices=machine.devices * 3).runs
