"""Random programs: modules whose forward is Python as people write it.

Where ``strategies.py`` draws graphs that an oracle can follow, these have branches, loops, helper methods, dicts, None, integers,
tied weights, writes in place and views; they are held to plain autograd. One number gives one program, on any machine.
"""

import linecache
import random
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dnifx import Edge
from tests.real_models.model_checks import spread_loss

Cuts = int | str | list[str] | list[Edge] | Callable[[fx.Node], bool]
Call = tuple[tuple[Any, ...], dict[str, Any]]
WIDTHS = (2, 4, 6)
BATCHES = (2, 3, 5)


@dataclass(frozen=True)
class Wild:
    """A drawn program; its ``repr`` is the source, ready to be pasted below the usual imports of torch.

    Attributes:
        number: What it was drawn from.
        source: The class ``Drawn``.
        cuts: Where it is cut.
        form: How inputs come: ``plain``, ``keyword`` or ``dict``.
        masked: Whether the optional mask is given.
        batch: Examples in the call that it is captured with.
        training: Whether it is captured in training.
        features: What it reaches.
        optional: Whether the keyword-only inputs are given, where it has any.
    """

    number: str
    source: str
    cuts: Cuts
    form: str
    masked: bool
    batch: int
    training: bool
    features: frozenset[str]
    optional: bool = False

    def __repr__(self) -> str:
        mode = "training" if self.training else "evaluation"
        given = (
            f"mask {self.masked}, bias {self.optional}" if "keyword_only" in self.features else f"mask {self.masked}"
        )
        told = f"# {self.number}: cuts={self.cuts!r}, {self.form} inputs, {given}, batch {self.batch}, {mode}"
        return f"\n{told}\n{self.source}\n"

    def build(self) -> nn.Module:
        """Return the module in double precision, with the same weights each time."""
        name = f"<wild {self.number}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        space = namespace(name, self.source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = space["Drawn"]().double().train(self.training)
        assert isinstance(module, nn.Module)
        return module

    def call(self, batch: int | None = None, masked: bool | None = None) -> Call:
        """Return positional and keyword inputs for a batch, by default those that it is captured with."""
        size, given = self.batch if batch is None else batch, self.masked if masked is None else masked
        generator = torch.Generator().manual_seed(size)
        x, y = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = {"mask": torch.rand(size, 4, generator=generator) > 0.4} if given else {}
        if self.optional:
            mask["bias"] = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        if self.form == "dict":
            return ({"x": x, "y": y},), mask
        return ((), {"x": x, "y": y, **mask}) if self.form == "keyword" else ((x, y), mask)

    def reached(self) -> set[str]:
        """Return the modules whose outputs the loss depends on in the call that it is captured with."""
        module = self.build()
        made: list[tuple[str, Any]] = []
        for path, each in module.named_modules():
            each.register_forward_hook(lambda _, inputs, output, path=path: made.append((path, output)))
        args, kwargs = self.call()
        try:
            loss = spread_loss(module(*args, **kwargs), None)
            leaves = [(path, value) for path, output in made for value in tree_leaves(output)]
            values = [(path, value) for path, value in leaves if isinstance(value, Tensor) and value.requires_grad]
            found = torch.autograd.grad(loss, [value for _, value in values], allow_unused=True)
        except (RuntimeError, ValueError, IndexError):
            return set()
        return {path for (path, _), gradient in zip(values, found, strict=True) if gradient is not None}

    def runs(self) -> bool:
        """Whether the module itself runs and learns in every input kind that the checks ask for."""
        module = self.build()
        try:
            for batch, masked in input_kinds(self):
                for training in (True, False):
                    module.train(training)
                    torch.default_generator.manual_seed(1)
                    args, kwargs = self.call(batch, masked)
                    torch.autograd.backward(spread_loss(module(*args, **kwargs), None))
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


@lru_cache(maxsize=8)
def namespace(name: str, source: str) -> dict[str, Any]:
    """Return what a program's source defines; its classes are the same ones each time."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "dataclass": dataclass, "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return space


def input_kinds(wild: Wild) -> list[tuple[int, bool]]:
    """Return the batch size and whether a mask is given, of every call that a program is tried with."""
    other = BATCHES[(BATCHES.index(wild.batch) + 1) % len(BATCHES)]
    return [(wild.batch, wild.masked), (other, wild.masked), (wild.batch, not wild.masked)]


@dataclass
class Draft:
    """A program while it is drawn: values are names with the width of their [batch, width]."""

    rng: random.Random
    widths: dict[str, int] = field(default_factory=lambda: {"x": 4, "y": 4})
    parts: list[str] = field(default_factory=list)
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    methods: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    keywords: str = ""
    lines: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    serial: "count[int]" = field(default_factory=lambda: count(1))
    depth: int = 2

    def fresh(self, letter: str) -> str:
        return f"{letter}{next(self.serial)}"

    def write(self, *lines: str) -> None:
        self.lines += [f"{'    ' * self.depth}{line}" for line in lines]

    def pick(self, width: int | None = None) -> str:
        """Return a value, more often a late one."""
        found = [name for name, size in self.widths.items() if width in (None, size)]
        return self.rng.choice(found[-2:] * 3 + found)

    def bind(self, width: int, code: str) -> str:
        name = self.fresh("h")
        self.write(f"{name} = {code}")
        self.widths[name] = width
        return name

    def linear(self, before: int, after: int) -> str:
        """Return a linear layer of that size: a new one, one that shares its weight, or an old one."""
        same = [name for name, sizes in self.modules.items() if sizes == (before, after)]
        kind = self.rng.choice(["new", "new", "tied", "again"]) if same else "new"
        if kind == "again":
            self.features.add("called twice")
            return self.rng.choice(same)
        name = self.fresh("m")
        self.parts.append(f"self.{name} = nn.Linear({before}, {after})")
        if kind == "tied":
            self.features.add("tied weights")
            self.parts.append(f"self.{name}.weight = self.{self.rng.choice(same)}.weight")
        self.modules[name] = (before, after)
        return name

    def nested(self, head: str, *values: str) -> None:
        """Write a block that rebinds the values."""
        self.write(head)
        self.depth += 1
        for value in values:
            update(self, value)
        self.depth -= 1


Step = Callable[[Draft], None]


def update(draft: Draft, name: str) -> None:
    """Rebind a value to another of the same width, or write to it."""
    width = draft.widths[name]
    other = draft.pick(width)
    draft.write(
        draft.rng.choice(
            [
                f"{name} = torch.tanh(self.{draft.linear(width, width)}({name}))",
                f"{name} = {name} * 0.5 + {other}",
                f"{name} = {name} - {name}.mean(0)",
                f"{name} = {name}.clone().mul_(0.9)",
                f"{name} = F.gelu({name})",
            ]
        )
    )


def apply_linear(draft: Draft) -> None:
    source, width = draft.pick(), draft.rng.choice(WIDTHS)
    draft.bind(width, f"self.{draft.linear(draft.widths[source], width)}({source})")


def activation(draft: Draft) -> None:
    source = draft.pick()
    code = draft.rng.choice(
        ["torch.tanh({0})", "F.gelu({0})", "{0}.softmax(1)", "F.relu({0})", "{0} * {0}", "-{0} / 2"]
    )
    draft.bind(draft.widths[source], code.format(source))


def combination(draft: Draft) -> None:
    source = draft.pick()
    other = draft.pick(draft.widths[source])
    draft.bind(draft.widths[source], draft.rng.choice([f"{source} + {other}", f"{source} * torch.sigmoid({other})"]))


def write_in_place(draft: Draft) -> None:
    source = draft.pick()
    width = draft.widths[source]
    name = draft.bind(width, draft.rng.choice([f"{source}.clone()", f"self.{draft.linear(width, width)}({source})"]))
    other = draft.pick(width)
    draft.write(
        draft.rng.choice([f"{name}.relu_()", f"{name}.add_(0.5)", f"{name} += {other}", f"torch.tanh_({name})"])
    )


def write_late(draft: Draft) -> None:
    """Write to a value that others may have read."""
    made = [name for name in draft.widths if name.startswith("h")]
    if made:
        draft.write(f"{draft.rng.choice(made)}{draft.rng.choice(['.add_(0.25)', '.mul_(0.5)', '[:, 0] = 0.5'])}")


def write_items(draft: Draft) -> None:
    source = draft.pick()
    width = draft.widths[source]
    name = draft.bind(width, draft.rng.choice([f"torch.zeros_like({source})", f"{source}.clone()"]))
    draft.write(
        draft.rng.choice([f"{name}[:, 1:] = {source}[:, 1:] * 2", f"{name}[:, ::2] = {draft.pick(width)}[:, ::2]"])
    )


def write_view(draft: Draft) -> None:
    source = draft.pick()
    name, view = draft.bind(draft.widths[source], f"{source}.clone()"), draft.fresh("view")
    code = draft.rng.choice([f"{name}.view({name}.shape[0], -1, 2)", f"{name}[:, :2]", f"{name}.t()"])
    draft.write(f"{view} = {code}", draft.rng.choice([f"{view}.mul_(0.5)", f"{view}.sin_()", f"{view} += 1"]))
    if draft.rng.random() < 0.5:
        draft.bind(draft.widths[source], f"{name} + {view}.sum()")


def sizes(draft: Draft) -> None:
    source = draft.pick()
    width = draft.widths[source]
    draft.write(f"rows, columns = {source}.shape", "half = columns // 2")
    codes = [
        f"self.{draft.linear(2, 2)}({source}.reshape(rows * half, 2)).reshape(rows, -1)",
        f"torch.cat(({source}[:, half:], {source}[:, :half]), 1)",
        f"{source} / rows + torch.arange(columns) * 0.1",
        f"{source}.reshape(-1)[: rows * columns].view(rows, columns) * half",
        f"{source} + {source}.new_ones(rows, 1) * float(columns)",
    ]
    draft.bind(width, draft.rng.choice(codes))


def branch_on_shape(draft: Draft) -> None:
    name = draft.pick()
    draft.nested(f"if x.shape[0] > {draft.rng.choice([2, 3, 4])}:", name)
    if draft.rng.random() < 0.5:
        draft.nested("else:", name)


def branch_on_mode(draft: Draft) -> None:
    name = draft.pick()
    draft.nested("if self.training:", name)
    if draft.rng.random() < 0.5:
        draft.nested("else:", name)


def branch_on_mask(draft: Draft) -> None:
    source = draft.pick(4)
    name = draft.bind(4, f"{source} * 1.0")
    draft.nested("if mask is not None:", name)
    draft.write(f"    {name} = {name}.masked_fill(mask, 0.1)")
    if draft.rng.random() < 0.5:
        draft.nested("else:", name)


def branch_on_integer(draft: Draft) -> None:
    name = draft.pick()
    draft.nested("if k % 2 == 0 and k > 0:", name)
    draft.write(f"{name} = {name} * k")


def branch_on_data(draft: Draft) -> None:
    draft.nested("if float(x.sum()) > 0:", draft.pick())


def loop_over_blocks(draft: Draft) -> None:
    source, blocks = draft.pick(), draft.fresh("blocks")
    width, number = draft.widths[source], draft.rng.choice([2, 3])
    block = draft.rng.choice(["nn.Linear({0}, {0})", "nn.Sequential(nn.Linear({0}, {0}), nn.Tanh())"]).format(width)
    draft.parts.append(f"self.{blocks} = nn.ModuleList([{block} for _ in range({number})])")
    name = draft.bind(width, source)
    draft.write(f"for place, block in enumerate(self.{blocks}):")
    draft.write(draft.rng.choice([f"    {name} = block({name})", f"    {name} = {name} + block({name}) / (place + 1)"]))


def loop_with_none(draft: Draft) -> None:
    source, held = draft.pick(), draft.fresh("h")
    width = draft.widths[source]
    module = draft.linear(width, width)
    draft.features.add("called twice")
    draft.write(f"{held} = None", "for step in range(k + 1):")
    draft.write(f"    {held} = self.{module}({source}) if {held} is None else torch.tanh(self.{module}({held}) + step)")
    draft.widths[held] = width


def loop_and_append(draft: Draft) -> None:
    source, kept = draft.pick(), draft.fresh("kept")
    module = draft.linear(draft.widths[source], draft.widths[source])
    draft.write(f"{kept} = [{source}]", "for _ in range(2):", f"    {kept}.append(self.{module}({kept}[-1]).tanh())")
    draft.bind(draft.widths[source], draft.rng.choice([f"torch.stack({kept}).sum(0)", f"sum({kept}) / len({kept})"]))


def call_helper(draft: Draft) -> None:
    source, name = draft.pick(), draft.fresh("helper")
    width = draft.widths[source]
    module = draft.linear(width, width)
    body = [f"def {name}(self, value, *, scale=1.0, extra=None):", f"    value = self.{module}(value) * scale"]
    body += ["    if extra is not None:", "        value = value + extra", "    return value, value.shape[0]"]
    draft.methods += [f"    {line}" for line in body]
    extra = draft.rng.choice(["", f", extra={draft.pick(width)}", ", scale=0.5"])
    draft.widths[made := draft.fresh("h")] = width
    draft.write(f"{made}, examples = self.{name}({source}{extra})", f"{made} = {made} / examples")


def through_dict(draft: Draft) -> None:
    source, held = draft.pick(), draft.fresh("held")
    width = draft.widths[source]
    module = draft.linear(width, width)
    draft.write(f"{held} = {{'one': {source}, 'none': None, 'two': self.{module}({source})}}")
    draft.write(f"{held}.update(three={held}['two'].tanh())")
    draft.bind(width, f"sum(value for value in {held}.values() if value is not None)")


def integers(draft: Draft) -> None:
    source, index, width = draft.pick(), draft.fresh("i"), draft.rng.choice(WIDTHS)
    embedding = draft.fresh("m")
    draft.parts.append(f"self.{embedding} = nn.Embedding(3, {width})")
    draft.write(f"{index} = {source}.argmax(1) % 3")
    codes = [f"self.{embedding}({index})", f"self.{embedding}(({source}[:, 0] > 0).long())"]
    draft.bind(width, draft.rng.choice(codes))
    if draft.rng.random() < 0.5:
        first = f"torch.arange({source}.shape[0])"
        draft.bind(draft.widths[source], f"{source} + {source}[{first}, {index} % 2].unsqueeze(1)")


def without_gradient(draft: Draft) -> None:
    source = draft.pick()
    width = draft.widths[source]
    if draft.rng.random() < 0.5:
        draft.bind(width, f"{draft.pick(width)} + {source}.detach()")
        return
    name = draft.fresh("h")
    draft.write("with torch.no_grad():", f"    {name} = self.{draft.linear(width, width)}({source})")
    draft.widths[name] = width


def chance(draft: Draft) -> None:
    source = draft.pick()
    codes = [
        f"F.dropout({source}, 0.3, self.training)",
        f"{source} + torch.randn_like({source}) * 0.1",
        f"{source} * torch.rand({source}.shape[0], 1, dtype={source}.dtype)",
    ]
    draft.bind(draft.widths[source], draft.rng.choice(codes))


def stateful(draft: Draft) -> None:
    source, name = draft.pick(), draft.fresh("m")
    width = draft.widths[source]
    maker = draft.rng.choice([f"nn.BatchNorm1d({width})", f"nn.LayerNorm({width})", "nn.Dropout(0.3)"])
    draft.parts.append(f"self.{name} = {maker}")
    draft.bind(width, f"self.{name}({source})")


def sequences(draft: Draft) -> None:
    source, name, made = draft.pick(), draft.fresh("m"), draft.fresh("h")
    draft.parts.append(f"self.{name} = nn.GRU(2, 4, batch_first=True)")
    draft.write(f"states, last = self.{name}({source}.reshape({source}.shape[0], -1, 2))")
    draft.write(f"{made} = " + draft.rng.choice(["states[:, -1]", "last.squeeze(0)", "states.mean(1) + last[0]"]))
    draft.widths[made] = 4


def pieces(draft: Draft) -> None:
    source = draft.pick()
    width = draft.widths[source]
    first, second = draft.fresh("h"), draft.fresh("h")
    draft.write(f"{first}, {second} = {source}.{draft.rng.choice(['chunk(2, 1)', f'split({width // 2}, dim=1)'])}")
    draft.bind(width, f"torch.cat(({second}.tanh(), {first}), dim=-1)")


def finish(draft: Draft) -> None:
    """Let the last layer read several late values, so that little of the program is dead."""
    late = list(draft.widths)[-draft.rng.randint(1, 4) :]
    width = sum(draft.widths[name] for name in late)
    read = late[0] if len(late) == 1 else f"torch.cat(({', '.join(late)}), 1)"
    draft.bind(4, f"self.{draft.linear(width, 4)}({read})")


FEATURES: dict[Step, int] = {
    apply_linear: 10,
    activation: 4,
    combination: 4,
    write_in_place: 4,
    write_late: 2,
    write_items: 2,
    write_view: 2,
    sizes: 4,
    branch_on_shape: 2,
    branch_on_mode: 2,
    branch_on_mask: 4,
    branch_on_integer: 2,
    branch_on_data: 1,
    loop_over_blocks: 4,
    loop_with_none: 2,
    loop_and_append: 2,
    call_helper: 4,
    through_dict: 2,
    integers: 2,
    without_gradient: 2,
    chance: 2,
    stateful: 2,
    sequences: 2,
    pieces: 2,
}
"""Every kind of step and how often it is drawn."""


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
