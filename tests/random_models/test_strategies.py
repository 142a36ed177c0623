"""Random models: every feature is drawn, the models run, and failures shrink to something a person can read."""

from collections import Counter

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import fx

from dnifx.ir import Edge
from tests.random_models.cuts import Cuts, NodeNamed, cut_sets, module_paths
from tests.random_models.features import FEATURES
from tests.random_models.model import Model, node_names
from tests.random_models.strategies import models

WANTED = """
fan-out; join; residual; inputs; outputs; shared module; tied modules; shared parameter; used parameter; batch norm;
dropout; convolution; attention; in-place; view; integer; tuple; tuple with integers; size; reshape by size; mask;
embedding; buffer; parameter; frozen; no_grad; detach; layer norm; sequential
"""


def count_features(examples: int) -> Counter[str]:
    reached: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, database=None)
    @given(models())
    def draw(model: Model) -> None:
        reached.update(model.features)

    draw()
    return reached


def test_a_sample_reaches_every_feature_often_enough() -> None:
    reached = count_features(600)
    wanted = [feature.strip() for feature in WANTED.replace("\n", " ").split(";")]
    assert not {feature: reached[feature] for feature in wanted if reached[feature] < 6}


def test_without_leaves_features_out() -> None:
    @settings(max_examples=100)
    @given(models(without=frozenset({"in-place", "dropout"})))
    def draw(model: Model) -> None:
        assert not model.features & {"in-place", "dropout"}

    draw()


@given(models(), st.integers(2, 4), st.booleans())
def test_models_run_differentiate_and_can_be_traced(model: Model, batch: int, training: bool) -> None:
    module = model.build().train(training)
    output = module(*model.example(batch))
    tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    assert any(tensor.requires_grad for tensor in tensors)
    assert len(list(tensors)) == len(model.outputs)
    torch.autograd.backward([tensor.sum() for tensor in tensors if tensor.requires_grad])
    traced = {node.name for node in fx.symbolic_trace(module).graph.nodes}
    assert traced >= set(node_names(module).values()) - {"output"}


@given(models())
def test_weights_and_examples_come_from_their_seeds(model: Model) -> None:
    one, two = model.build(seed=3).state_dict(), model.build(seed=3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(left, right) for left, right in zip(model.example(3, 5), model.example(3, 5), strict=True))


@given(models(), st.data())
def test_cuts_name_what_is_there(model: Model, data: st.DataObject) -> None:
    cuts = data.draw(cut_sets(model))
    module = model.build()
    paths = {path for path, _ in module.named_modules()}
    assert {path.partition("@")[0] for path in module_paths(model)} <= paths
    known = {*module_paths(model), *(node.name for node in fx.symbolic_trace(module).graph.nodes)}
    if isinstance(cuts, list):
        assert {end for cut in cuts for end in ((cut.source, cut.target) if isinstance(cut, Edge) else (cut,))} <= known
    if isinstance(cuts, NodeNamed):
        assert cuts.names <= known


def is_edges(cuts: Cuts) -> bool:
    return isinstance(cuts, list) and isinstance(cuts[0], Edge)


def is_each(cuts: Cuts) -> bool:
    return cuts == "each"


@pytest.mark.parametrize(
    ("form", "kind"),
    [("paths", list), ("glob", str), ("nodes", NodeNamed), ("parts", int), ("edges", list), ("each", str)],
)
def test_every_form_of_cut_is_drawn(form: str, kind: type) -> None:
    pairs = models().flatmap(lambda model: cut_sets(model).map(lambda cuts: (model, cuts)))
    wanted = {"edges": is_edges, "each": is_each}
    accepts = wanted.get(form, lambda cut: isinstance(cut, kind) and cut != "each")
    found = find(pairs, lambda pair: accepts(pair[1]), settings=settings(max_examples=2000))
    assert isinstance(found[1], kind)


def test_a_failure_shrinks_to_plain_lines_around_the_one_that_matters() -> None:
    smallest = find(models(), lambda model: "attention" in model.features, settings=settings(max_examples=3000))
    assert [line.feature for line in smallest.lines] == ["linear", "attention"]


def test_a_failure_is_shown_as_the_source_that_runs() -> None:
    smallest = find(models(), lambda model: "in-place" in model.features, settings=settings(max_examples=3000))
    assert repr(smallest).strip() == "\n".join(
        [
            "class Drawn(nn.Module):  # x0: float [n, 3]",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.m1 = nn.Linear(3, 3)",
            "    def forward(self, x0):",
            "        v2 = self.m1(x0)",
            "        v3 = v2.mul_(0.5)",
            "        return v3",
        ]
    )


def test_features_have_names_of_their_own() -> None:
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)
