"""Draw a program from its number: steps, what it returns, and cuts."""

import random
from collections.abc import Container, Mapping
from dataclasses import replace
from itertools import count

from tests.wild.programs import BATCHES, Cuts, Wild
from tests.wild.steps import FEATURES, Draft, Step, apply_linear, finish


def wild(number: int, seed: int = 0) -> Wild:
    """Return the program of that number: the first one of its draws that runs by itself."""
    for attempt in count():
        drawn = draw(f"{seed}:{number}:{attempt}")
        if drawn.runs():
            return drawn
    raise AssertionError("count() ends")


def drafted(rng: random.Random, features: Mapping[Step, int]) -> Draft:
    """Draw the body of a forward."""
    draft = Draft(rng)
    apply_linear(draft)
    for step in rng.choices(list(features), list(features.values()), k=rng.randint(3, 9)):
        draft.features.add(step.__name__)
        step(draft)
    finish(draft)
    return draft


def draw(name: str) -> Wild:
    """Draw a program, whether it runs or not."""
    rng = random.Random(name)
    draft = drafted(rng, FEATURES)
    form = rng.choice(["plain", "keyword", "dict"])
    text = source(draft, form, returned(draft))
    masked, batch, training = rng.random() < 0.5, rng.choice(BATCHES), rng.random() < 0.7
    drawn = Wild(name, text, "each", form, masked, batch, training, frozenset(draft.features))
    return replace(drawn, cuts=draw_cuts(draft, drawn.reached()))


def source(draft: Draft, form: str, result: str) -> str:
    """Return the class."""
    taken = ["batch"] if form == "dict" else ["x", "y"]
    head = ["        x, y = batch['x'], batch['y']"] if form == "dict" else []
    return "\n".join(
        [
            *draft.before,
            "class Drawn(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {part}" for part in draft.parts),
            *draft.methods,
            f"    def forward(self, {', '.join(taken)}, mask=None, k=2{draft.keywords}):",
            *head,
            *draft.lines,
            f"        return {result}",
        ]
    )


def returned(draft: Draft) -> str:
    """Draw what the forward returns: the last value, and perhaps others, None or a number."""
    last, other = list(draft.widths)[-1], draft.pick()
    forms = {
        "tensor": last,
        "tuple": f"{last}, {other}",
        "dict": f"{{'last': {last}, 'other': {other}}}",
        "nested": f"{{'last': {last}, 'more': ({other}, None), 'rows': {last}.shape[0], 'top': {last}.argmax(1)}}",
    }
    form = draft.rng.choice(["tensor", "tensor", "tuple", "dict", "nested"])
    draft.features.add(f"returns {form}")
    return forms[form]


def draw_cuts(draft: Draft, reached: Container[str]) -> Cuts:
    """Draw cuts: a number of parts, every block, a glob, or modules by name, most often such as the loss reaches."""
    kind = draft.rng.choice(["parts", "each", "glob", "named", "named", "named"])
    if kind == "parts":
        return draft.rng.randint(2, 4)
    if kind == "each":
        return "each"
    if kind == "glob":
        return "m*"
    names = [part.split(" = ")[0].removeprefix("self.") for part in draft.parts if ".weight" not in part]
    names = [f"{name}.{draft.rng.randint(0, 1)}" if name.startswith("blocks") else name for name in names]
    useful = [name for name in names[:-1] if name in reached]
    names = useful if useful and draft.rng.random() < 0.97 else names
    return sorted(draft.rng.sample(names, draft.rng.randint(1, min(3, len(names)))))
