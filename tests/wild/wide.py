"""More random programs: other containers, guards, outputs of any kind, keyword-only inputs, every kind of cuts.

They are numbered apart from those of ``drawing.py``, so that a number there stands for the same program as before.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torch import Tensor, fx

from dnifx import Edge
from tests.wild.drawing import drafted, source
from tests.wild.programs import BATCHES, Cuts, Wild
from tests.wild.steps import FEATURES, Draft, Step, update


@dataclass(frozen=True)
class Named:
    """A callable cut: after every node whose name begins so."""

    start: str

    def __call__(self, node: fx.Node) -> bool:
        return node.name.startswith(self.start)


def module_dict(draft: Draft) -> None:
    held, given = draft.fresh("d"), draft.pick()
    width = draft.widths[given]
    draft.parts.append(
        f"self.{held} = nn.ModuleDict({{key: nn.Linear({width}, {width}) for key in ('left', 'right')}})"
    )
    codes = [
        f"sum(layer({given}) for layer in self.{held}.values())",
        f"self.{held}['right' if self.training else 'left']({given})",
        f"torch.stack([self.{held}[key]({given}) for key in self.{held}]).mean(0)",
    ]
    draft.bind(width, draft.rng.choice(codes))


def parameter_list(draft: Draft) -> None:
    held, given = draft.fresh("p"), draft.pick()
    width = draft.widths[given]
    draft.parts.append(
        f"self.{held} = nn.ParameterList([torch.randn({width}) * 0.3, torch.randn({width}, {width}) * 0.3])"
    )
    codes = [
        f"{given} @ self.{held}[1] + self.{held}[0]",
        f"{given} * self.{held}[0].softmax(0) @ self.{held}[1].t()",
        f"sum({given} * weight.reshape(-1)[:{width}] for weight in self.{held})",
    ]
    draft.bind(width, draft.rng.choice(codes))


def einsum(draft: Draft) -> None:
    given = draft.pick()
    width, after = draft.widths[given], draft.rng.choice([2, 4])
    layer = draft.linear(width, after)
    draft.bind(after, f"torch.einsum('bi,ji->bj', {given}, self.{layer}.weight)")


def where(draft: Draft) -> None:
    given = draft.pick()
    other = draft.pick(draft.widths[given])
    codes = [f"torch.where({given} > 0, {given}, {other} * 0.1)", f"{given}.where({other} > {given}, {other}.exp())"]
    draft.bind(draft.widths[given], draft.rng.choice(codes))


def scatter(draft: Draft) -> None:
    given = draft.pick()
    other = draft.pick(draft.widths[given])
    codes = [
        f"torch.zeros_like({given}).scatter_add(1, {given}.argsort(1), {other})",
        f"{given}.gather(1, {other}.argsort(1))",
        f"{given}.scatter(1, {other}.argmax(1, keepdim=True), 0.5)",
        f"{given}.index_add(0, torch.arange({given}.shape[0]), {other})",
    ]
    draft.bind(draft.widths[given], draft.rng.choice(codes))


def keyword_only(draft: Draft) -> None:
    given = draft.pick()
    draft.keywords = ", *, scale=0.5, bias=None"
    made = draft.bind(draft.widths[given], f"{given} * scale")
    draft.write("if bias is not None:", f"    {made} = {made} + bias")


def early_return(draft: Draft) -> None:
    given, name = draft.pick(), draft.fresh("early")
    width = draft.widths[given]
    test = draft.rng.choice(["value.shape[0] > 3", "not self.training", "k == 2 and value.shape[0] == 2"])
    body = [f"def {name}(self, value, k):", f"    if {test}:", "        return value * 0.5"]
    body += [f"    value = self.{draft.linear(width, width)}(value)", "    return value.tanh()"]
    draft.methods += [f"    {line}" for line in body]
    draft.bind(width, f"self.{name}({given}, k)")


def zipped_modules(draft: Draft) -> None:
    given, layers, norms = draft.pick(), draft.fresh("blocks"), draft.fresh("n")
    width = draft.widths[given]
    draft.parts.append(f"self.{layers} = nn.ModuleList([nn.Linear({width}, {width}) for _ in range(3)])")
    draft.parts.append(f"self.{norms} = nn.ModuleList([nn.LayerNorm({width}), nn.Identity(), nn.Tanh()])")
    made = draft.bind(width, given)
    loop = [
        (f"for layer, after in zip(self.{layers}, self.{norms}):", f"    {made} = after(layer({made}))"),
        (
            f"for place, (layer, after) in enumerate(zip(self.{layers}, reversed(self.{norms}))):",
            f"    {made} = {made} + after(layer({made})) * (place > 0)",
        ),
    ]
    draft.write(*draft.rng.choice(loop))


def comprehension(draft: Draft) -> None:
    given, held, layers = draft.pick(), draft.fresh("held"), draft.fresh("blocks")
    width = draft.widths[given]
    draft.parts.append(f"self.{layers} = nn.ModuleList([nn.Linear({width}, {width}) for _ in range(2)])")
    draft.write(f"{held} = {{f'h{{place}}': layer({given}) for place, layer in enumerate(self.{layers})}}")
    codes = [
        f"torch.stack([value.sigmoid() for value in {held}.values()]).sum(0)",
        f"sum(value * len(name) for name, value in sorted({held}.items()) if name != 'h0')",
        f"max([(len({held}), {held}['h1'])])[1]",
    ]
    draft.bind(width, draft.rng.choice(codes))


def guards(draft: Draft) -> None:
    given = draft.pick()
    width = draft.widths[given]
    tests = [
        f"assert {given}.shape[1] == {width}, 'width'",
        f"if {given}.dim() != 2 or {given}.shape[0] < 1:",
        f"if not torch.is_tensor({given}) or {given}.dtype == torch.int64:",
    ]
    test = draft.rng.choice(tests)
    draft.write(test, *(["    raise ValueError('no such input')"] if test.endswith(":") else []))
    update(draft, given)


def checkpointed(draft: Draft) -> None:
    given, name = draft.pick(), draft.fresh("region")
    width = draft.widths[given]
    body = [f"def {name}(self, value, other, k):", f"    value = self.{draft.linear(width, width)}(value)"]
    lines = [
        ["value = F.dropout(value.tanh(), 0.5, self.training)"],
        ["value = value.sigmoid()", "value = value.clone().mul_(k).add_(other)"],
        [f"value = torch.tanh(self.{draft.linear(width, width)}(value)) / value.shape[0]"],
        ["self.calls.add_(1)", "value = value.exp()"],
    ]
    for chosen in draft.rng.sample(lines, 2):
        if "self.calls.add_(1)" in chosen and "calls" not in draft.features:
            draft.features.add("calls")
            draft.parts.append("self.register_buffer('calls', torch.zeros(()))")
        body += [f"    {line}" for line in chosen]
    draft.methods += [f"    {line}" for line in [*body, "    return value * 0.5"]]
    call = "torch.utils.checkpoint.checkpoint"
    entered = f"self.{draft.linear(width, width)}({given})"
    draft.bind(
        width, f"{call}(self.{name}, {entered}, {draft.pick(width)}, k, use_reentrant={draft.rng.random() < 0.5})"
    )


def pieces(draft: Draft) -> None:
    given = draft.pick()
    width = draft.widths[given]
    held = draft.fresh("pieces")
    split = draft.rng.choice(["chunk(2, 1)", "split(1, 1)", "unbind(1)", "tensor_split(2, 1)", "split(1)"])
    draft.write(f"{held} = {given}.{split}")
    join = "stack" if split == "unbind(1)" else "cat"
    dim = 0 if split == "split(1)" else 1
    codes = [
        f"torch.{join}({held}, {dim})",
        f"torch.{join}([piece.tanh() for piece in {held}], {dim})",
        f"torch.{join}([*reversed({held})], {dim}) * len({held})",
    ]
    draft.bind(width, draft.rng.choice(codes))


MORE: dict[Step, int] = {
    module_dict: 5,
    parameter_list: 5,
    einsum: 4,
    where: 4,
    scatter: 4,
    keyword_only: 4,
    early_return: 4,
    zipped_modules: 4,
    comprehension: 4,
    guards: 3,
    checkpointed: 4,
    pieces: 4,
}
"""Every further kind of step and how often it is drawn, beside those of ``FEATURES``."""

ANSWER = (
    "@dataclass",
    "class Answer:",
    "    last: torch.Tensor",
    "    more: dict",
    "    none: None = None",
)


def wide(number: int, seed: int = 0) -> Wild:
    """Return the program of that number: the first one of its draws that runs by itself."""
    for attempt in count():
        drawn = draw_wide(f"wide:{seed}:{number}:{attempt}")
        if drawn.runs():
            return drawn
    raise AssertionError("count() ends")


def draw_wide(name: str) -> Wild:
    """Draw a program, whether it runs or not."""
    rng = random.Random(name)
    draft = drafted(rng, {**FEATURES, **MORE})
    form = rng.choice(["plain", "keyword", "dict"])
    text = source(draft, form, returned(draft))
    masked, batch, training = rng.random() < 0.5, rng.choice(BATCHES), rng.random() < 0.7
    given = bool(draft.keywords) and rng.random() < 0.5
    drawn = Wild(name, text, "each", form, masked, batch, training, frozenset(draft.features), given)
    kind, cuts = draw_cuts(rng, calls(drawn))
    return replace(drawn, cuts=cuts, features=drawn.features | {f"cut by {kind}"})


def returned(draft: Draft) -> str:
    """Draw what the forward returns: tensors in structures, a dataclass among them."""
    last, other = list(draft.widths)[-1], draft.pick()
    forms = {
        "tensor": last,
        "deep dict": f"{{'last': {last}, 'more': {{'other': {other}, 'deep': {{'mean': {other}.mean(1)}}, 'k': k}}}}",
        "dataclass": f"Answer({last}, {{'other': {other}, 'rows': x.shape[0]}})",
        "list": f"[{last}, ({other}, None)]",
    }
    form = draft.rng.choice(["tensor", *forms])
    if form == "dataclass":
        draft.before += ANSWER
    draft.features.add(f"returns {form}")
    return forms[form]


def calls(drawn: Wild) -> list[tuple[str, Tensor, Tensor]]:
    """Return path, input and output of each call of a module in the call that a program is captured with."""
    module = drawn.build()
    found: list[tuple[str, Tensor, Tensor]] = []

    def note(path: str, inputs: Any, output: Any) -> None:
        if path and isinstance(output, Tensor) and inputs:
            found.append((path, inputs[0], output))

    for path, each in module.named_modules():
        each.register_forward_hook(lambda _, inputs, output, path=path: note(path, inputs, output))
    args, kwargs = drawn.call()
    try:
        module(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError):
        return []
    reached = drawn.reached()
    return [call for call in found if call[0] in reached]


def draw_cuts(rng: random.Random, made: list[tuple[str, Tensor, Tensor]]) -> tuple[str, Cuts]:
    """Draw a kind of cuts that the program admits, and the cuts, most often before its last module."""
    made = made[:-1] or made
    often = Counter(path for path, _, _ in made)
    again = [f"{path}@{number}" for path, times in often.items() for number in range(1, times)]
    pairs = [Edge(one, other) for one, _, left in made for other, right, _ in made if left is right]
    kinds: dict[str, list[Cuts]] = {
        "number": [2, 3, 4],
        "each": ["each"],
        "glob": ["m*", "**", "blocks*.*", "[md]*"],
        "path": [[path] for path in often] or ["each"],
        "call": [[path] for path in again],
        "edge": [[pair] for pair in pairs],
        "callable": [Named(start) for start in ("m", "m", "tanh", "add", "chunk", "split")],
    }
    kind = rng.choice([kind for kind, choices in kinds.items() if choices])
    return kind, rng.choice(kinds[kind])
