"""Random models over random graphs: what the property tests draw."""

from hypothesis import strategies as st

from tests.random_models.draft import Draft, Draw, is_dense
from tests.random_models.features import FEATURES
from tests.random_models.layers import convolution, linear
from tests.random_models.model import Model, Value, needed_for

GO_ON = [False] + [True] * 7
"""Whether another line follows: asked before each, so that shrinking can take any line out."""


def draw_inputs(draft: Draft) -> tuple[Value, ...]:
    shape = draft.draw(st.sampled_from([(3,), (2, 3), (2, 3, 3)]))
    inputs = [Value("x0", shape, writable=False, contiguous=True)]
    extra = draft.draw(st.sampled_from(["", "", "same", "integer"]))
    if extra == "same":
        inputs.append(Value("x1", shape, writable=False, contiguous=True))
    if extra == "integer":
        inputs.append(Value("x1", (), "i", limit=4))
    draft.values += inputs
    return tuple(inputs)


def draw_outputs(draft: Draft) -> tuple[Value, ...]:
    carrying = draft.some(lambda value: value.grad)
    needed = needed_for((op for line in draft.lines for op in line.ops), (carrying[0].name,))
    if not any(value.name in needed for value in carrying[1:]):
        head = Value(draft.fresh("v"), carrying[0].shape, grad=True)
        draft.add("head", f"torch.tanh({carrying[0].name})", carrying[:1], head)
    last = draft.some(lambda value: value.grad)[0]
    others = [
        value
        for value in draft.some(lambda value: value.kind in "fi")
        if not value.name.startswith("x") and value != last
    ]
    more = draft.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else []
    return (last, *more)


@st.composite
def models(draw: Draw, max_lines: int = 9, without: frozenset[str] = frozenset()) -> Model:
    """Draw a model.

    Args:
        draw: Given by hypothesis.
        max_lines: How many lines its forward may have.
        without: Names of features that it must not have.
    """
    draft = Draft(draw)
    inputs = draw_inputs(draft)
    while not draft.some(lambda value: value.grad):
        draft.turn(linear if draft.some(is_dense) else convolution)
    while len(draft.lines) < max_lines and draw(st.sampled_from(GO_ON)):
        ready = [feature for feature in FEATURES if feature.name not in without and feature.ready(draft)]
        draft.turn(draw(st.sampled_from([feature.step for feature in ready for _ in range(feature.weight)])))
    outputs = draw_outputs(draft)
    form = draw(st.sampled_from(["tuple", "tuple", "dict"]))
    return Model(inputs, tuple(draft.parts), tuple(draft.lines), outputs, form)
