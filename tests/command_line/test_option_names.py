"""Errors at the command line speak of what can be typed there."""

import pytest

from dnifx import estimators
from dnifx.errors import OptionError, ScheduleError
from dnifx.loading import find, read_gradient, read_models
from dnifx.option_names import OPTIONS, in_options
from dnifx.schedules.registry import NAMED, _named


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("give another path, or overwrite=True", "give another path, or --overwrite"),
        ("gradient='suffix', which learns", "--gradient suffix, which learns"),
        ("with every=: a period. Leave lag= out", "with --every: a period. Leave --lag out"),
        ("every={'slow': 4, 'b': 2} fires", "--every slow=4,b=2 fires"),
        ("cuts=['a', 'b.*'] asks for no cut", "--cuts a,b.* asks for no cut"),
        ("cuts=99 asks for 99 partitions", "--cuts 99 asks for 99 partitions"),
        ('Decouple with inputs="synthetic", or', "Decouple with --inputs synthetic, or"),
        ("decouple(..., context='label', num_classes=...)", "--context label, --num-classes N"),
        ("Give args= and kwargs= with which", "Give --input with which"),
        ("an example (args=, kwargs=, and in this mode)", "an example (--input, and in this mode)"),
        ("the lines f(x, context=y, gradient=self.g) failed", "the lines f(x, context=y, gradient=self.g) failed"),
        ("model.every=3 and sargs=4", "model.every=3 and sargs=4"),
    ],
)
def test_arguments_stand_as_options(text: str, typed: str) -> None:
    assert in_options(text) == typed


@pytest.mark.parametrize("argument", OPTIONS)
def test_every_argument_has_an_option(argument: str) -> None:
    assert in_options(f"leave {argument}= out") == f"leave {OPTIONS[argument]} out"


@pytest.mark.parametrize("name", estimators.BY_NAME)
def test_a_letter_left_out_of_an_estimator_finds_it(name: str) -> None:
    assert read_gradient(name) == name
    for wrong in (name[:1] + name[2:], name.replace("_", "-") + "x", name.title().replace("_", "") + "s"):
        with pytest.raises(OptionError, match="did you mean") as told:
            read_gradient(wrong)
        meant = str(told.value).split("did you mean ")[1].split("?")[0]
        assert meant.replace("_", "").lower() == name.replace("_", ""), wrong
        assert all(other in str(told.value) for other in estimators.BY_NAME)


def test_an_estimators_class_will_do() -> None:
    assert read_gradient("Synthetic") == estimators.Synthetic()
    assert read_gradient("SigmoidLinear()") == estimators.SigmoidLinear()


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("sequential", "backprop")])
def test_a_schedule_without_its_options_is_shown_with_them(name: str) -> None:
    try:
        _named(f"{name}{{nosuch=1}}")
    except ScheduleError as error:
        written = str(error).split("Write ")[1].removesuffix(".")
        assert _named(written).name
    else:
        raise AssertionError("it took an option that it does not have")


def test_synthetic_inputs_are_no_examples() -> None:
    assert read_models("synthetic") == "synthetic"
    with pytest.raises(OptionError, match="an example input is given by --input"):
        read_models("32x784")


def test_only_what_a_file_makes_is_offered() -> None:
    with pytest.raises(OptionError, match="did you mean 'chain'"):
        find("tests.report.report_programs:chian")
    with pytest.raises(OptionError) as told:
        find("tests.report.report_programs:nosuch")
    for imported in ("'torch'", "'nn'", "'Any'", "'Mapping'", "'fx'"):
        assert imported not in str(told.value)
