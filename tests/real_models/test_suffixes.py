"""Suffixes of real models: one is derived for each boundary and trained for two steps, or is refused with a reason."""

import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from dnifx.errors import DnifxError, EstimatorError
from tests.real_models.families import FAMILIES
from tests.real_models.model_checks import built, chosen_cuts, decoupled
from tests.real_models.test_models import available

SHARE = 0.9
"""At least so many of the models that can be cut have suffixes."""

FAST = (
    ("recurrent", "lstm"),
    ("sharing and freezing", "tied"),
    ("generative", "u-net"),
    ("transformers text", "gpt2"),
    ("torch-geometric", "gcn"),
)
"""Family and model of what the default suite runs."""

Outcomes = Counter[str]


def trained(family: str, name: str) -> str:
    """Cut a model at named blocks, train it for two steps with a suffix on each boundary, and say what became of it.

    Returns:
        ``"trained"``; ``"uncut"`` where the model or its cuts are refused with any estimator; else why there is no suffix.
    """
    factory = FAMILIES[family]()[name]
    try:
        cuts = chosen_cuts(built(factory))
    except DnifxError:
        return "uncut"
    example = built(factory)
    try:
        net = decoupled(example, cuts, "suffix")
    except EstimatorError as error:
        return str(error)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
    for _ in range(2):
        trainer.step(*example[1], kwargs=example[2], target=torch.zeros(2))
    assert all(bool(each.isfinite().all()) for each in net.interface_parameters())
    return "trained"


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    """Count what became of the models of a session."""
    found: Outcomes = Counter()
    yield found
    cut = found.total() - found["uncut"]
    if cut > len(FAST):
        warnings.warn(f"suffixes: {found['trained']} of {cut} models", stacklevel=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), FAST)
def test_models_of_the_default_suite_train_on_their_suffixes(family: str, name: str) -> None:
    assert trained(family, name) == "trained"


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, make in FAMILIES.items() for name in make()])
def test_a_suffix_is_trained_or_refused(family: str, name: str, outcomes: Outcomes) -> None:
    if not available(family):
        pytest.skip(f"{family} is not installed; pip install 'dnifx[models]'")
    found = trained(family, name)
    outcomes[found if found in ("trained", "uncut") else "refused"] += 1
    assert found in ("trained", "uncut") or (found.startswith("boundary ") and len(found) < 600), found


@pytest.mark.models
@pytest.mark.filterwarnings("default:suffixes")
def test_most_models_have_suffixes(outcomes: Outcomes) -> None:
    cut = outcomes.total() - outcomes["uncut"]
    if cut <= len(FAST):
        pytest.skip("only some of the models were run")
    assert outcomes["trained"] >= SHARE * cut
