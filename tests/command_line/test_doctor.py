"""``dnifx doctor``, as a person types it."""

import json
from collections.abc import Iterator

import pytest
import torch

from dnifx import doctor
from tests.command_line.test_cli import run


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_model_it_tells_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Training runs in one process" in " ".join(run(["doctor"], capsys).split())
    found = json.loads(run(["doctor", "--threads", "1", "-f", "json"], capsys))
    assert found["threads"] == 1
    assert found["cores"] == doctor.this_machine().cores


def test_with_a_model_it_says_whether_decoupling_pays(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "doctor fcn --cuts 3 --places 2 --delay 50 --bandwidth 100 --context label --optimizer sgd --rounds 1 --cores 2"
    )
    text = " ".join(run(words.split(), capsys).split())
    for part in ("links of 50 ms one way and 100 Mbit/s, on 2 cores together", "Decoupling pays", "micro-batches"):
        assert part in text
    found = json.loads(run([*words.split(), "--format", "json", "--lag", "3"], capsys))
    assert [each["name"] for each in found["contestants"]] == ["backprop", "ddp", "gpipe", "1f1b", "dnifx"]
    assert found["contestants"][-1]["detail"] == "lag 3"
    assert found["link"] == {"latency": 0.05, "bandwidth": 12.5e6, "handling": 0.0}
    assert [each["optimizer"] for each in found["places"]] == [0, 0]
    assert found["cores"] == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("doctor --places 2", "--places needs a model: dnifx doctor MODEL --places ..."),
        ("doctor fcn --threads 0", "--threads 0: give 1 or more"),
        ("doctor fcn --bandwidth 0", "--bandwidth 0: give a number above zero, or leave it out"),
        ("doctor fcn --cuts 2 --places 3", "2 partitions give work for 2 ranks, not for 3"),
        ("doctor fcn --cuts 2 --places 0", "places=0: give a number above zero"),
        ("doctor fcn --cuts 2 --delay -1", "--delay -1: give milliseconds, zero or more"),
        ("doctor two-clocks --places 2", "has several rates"),
    ],
)
def test_what_cannot_be_is_refused(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in run(words.split(), capsys, 2)
