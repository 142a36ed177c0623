"""A program while it is drawn, and every kind of step that its forward can have."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

WIDTHS = (2, 4, 6)


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
