"""Names that try to run, and models that bear them."""

import builtins
import keyword
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.text import OWN_NAMES

RUN = "getattr(RAN,'append')(1)"
"""What a name would run. It has no dot, which torch allows in no name."""

BREAKOUTS = (
    '{}"',
    "{}'",
    '" if not {} else "',
    "' if not {} else '",
    "')({},'",
    '")({},"',
    'a", {}, "b',
    '"""\n{}\n"""',
    "'''\n{}\n'''",
    "x\n    {}\n    #",
    "x\n{}\n#",
    "x\r{}\r#",
    "x\u2028{}\u2028#",
    "x\x0c\n{}\x0c#",
    "x\x85{}",
    '\\"; {}; "',
    "\\'; {}; '",
    "\\",
    "\\N{{{}}}",
    "{{{}}}",
    "#{}",
    "x: {}",
    "x = {}",
    "x; {};",
    "*_, {}",
    "x={}",
    "[/]{}",
    "[red]{}[/red]",
    "<script>{}</script>]]>",
    "&{};",
    "%s{}",
    "\x1b[31m{}",
    "\u202e{}",
    "{}" + "x" * 3000,
)
PLAIN = (
    *(
        "self",
        "loss",
        "net",
        "original",
        "target",
        "context",
        "reset",
        "output",
        "scale",
        "examples",
        "features",
        "mean",
    ),
    *(
        "torch",
        "nn",
        "fx",
        "held",
        "fused",
        "estimate_a",
        "submod_0",
        "leaf_x",
        "value_x",
        "captured_constants",
        "interfaces",
    ),
    *(
        "unflatten",
        "pytree",
        "types",
        "pathlib",
        "PARTITIONS",
        "MODELS",
        "OUTPUT",
        "LEAVES",
        "ESTIMATORS",
        "Net",
        "Trainer",
    ),
    *(
        "__import__",
        "__class__",
        "__a",
        "_modules_",
        "_",
        "\ufb01",
        "\u00e9",
        "\u00b2",
        "\u65e5\u672c",
        "\u210c",
        "x\u00b2",
        "kind1_constant0",
        "a b",
        "1",
        "01",
        "-1",
    ),
)
"""Names that mean something to generated code, to Python or to torch."""

FORBIDDEN = frozenset({*dir(nn.Module()), *dir(nn.ModuleDict()), "__deepcopy__", "__copy__"})
"""Names that torch lets no child or tensor have, and those by which Python copies a model."""

RESERVED = sorted(
    {
        *keyword.kwlist,
        *dir(builtins),
        *OWN_NAMES,
        *dir(DecoupledModule),
        *PLAIN,
        "program",
        "parts",
        "losses",
        "emitters",
    }
    - FORBIDDEN
)

ANY = st.one_of(
    st.sampled_from(BREAKOUTS).map(lambda text: text.format(RUN)),
    st.sampled_from(RESERVED),
    st.text(min_size=1, max_size=12),
    st.tuples(st.sampled_from(BREAKOUTS), st.text(max_size=4)).map(lambda pair: pair[1] + pair[0].format(RUN)),
)
NAMES = ANY.map(lambda text: text.replace(".", "")).filter(lambda text: text != "" and text not in FORBIDDEN)
PAIR = st.tuples(ANY, ANY).filter(lambda pair: pair[0] != pair[1])


def is_class_name(text: str) -> bool:
    """Whether Python takes a text as the name of a class."""
    return "\x00" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Give names something to run, and say what ran."""
    builtins.RAN = []  # type: ignore[attr-defined]
    try:
        yield builtins.RAN  # type: ignore[attr-defined]
    finally:
        del builtins.RAN  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Names:
    """Different names for all that a model may name."""

    modules: tuple[str, str, str]
    parameter: str
    buffer: str
    inner: str
    keys: tuple[str, str]
    outputs: tuple[str, str]
    kind: str
    constant: str


@st.composite
def all_names(draw: st.DrawFn) -> Names:
    """Draw names; those beside each other differ."""
    first, second, third, parameter, buffer = draw(st.lists(NAMES, min_size=5, max_size=5, unique=True))
    keys, outputs = draw(st.tuples(PAIR, PAIR))
    modules = first, second, third
    return Names(modules, parameter, buffer, draw(NAMES), keys, outputs, draw(ANY.filter(is_class_name)), draw(ANY))


class Block(nn.Module):
    """A linear layer under a name, with a buffer under the same name one level deeper."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))
        self.register_buffer(name + "_", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer."""
        result: Tensor = self._modules[self.name](x) * self._buffers[self.name + "_"]  # type: ignore[misc, operator]
        return result


class Hostile(nn.Module):
    """A model whose modules, tensors, keys, class and constants are called by hostile names; two modules are one."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        first, second, third = names.modules
        self.names_ = names
        self.add_module(first, nn.Linear(4, 4))
        self.add_module(second, Block(names.inner))
        self.add_module(third, self._modules[first])
        self.register_parameter(names.parameter, nn.Parameter(torch.rand(4)))
        self.register_buffer(names.buffer, torch.rand(4))
        self.scales_ = nn.ParameterDict({"a": nn.Parameter(torch.rand(4))})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return two tensors by name."""
        names, (first, second, third) = self.names_, (self._modules[name] for name in self.names_.modules)
        x = torch.relu(first(batch[names.keys[0]])) * self._parameters[names.parameter]  # type: ignore[misc, operator]
        y = torch.tanh(second(x)) + self._buffers[names.buffer] * batch[names.keys[1]]  # type: ignore[misc, operator]
        z = third(y) * len(names.constant) + x  # type: ignore[misc]
        return {names.outputs[0]: z, names.outputs[1]: y}


def hostile(names: Names) -> tuple[Hostile, dict[str, Any]]:
    """Return a model and a batch for it."""
    torch.manual_seed(0)
    kind = type("Hostile", (Hostile,), {})
    kind.__name__ = names.kind
    return kind(names), {key: torch.randn(3, 4) for key in names.keys}
