"""Names and values as the text of Python source: what a user called something is written down, and never runs."""

import keyword
import re
from collections.abc import Iterable

from torch import fx, nn

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_NAMES = frozenset(
    {*dir(fx.GraphModule(nn.Module(), fx.Graph())), "fused", "loss_scale", "suffix_loss", "thin_loss"}
)
"""Attributes that a module with emitted functions has for itself. What a model holds under such a name is reached by ``held``."""
OWN_PREFIXES = ("__", "submod_", "estimate_", "imagine_", "thin_")
"""How other such attributes begin, and names that Python changes inside a class."""


def is_identifier(name: str) -> bool:
    """Whether a name can stand in source: ASCII alone, since Python reads some other letters as one another."""
    return IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def identifier(name: str) -> str:
    """Return a name that stands in source.

    Raises:
        ValueError: It is no identifier. Whoever names values has to see to it.
    """
    if not is_identifier(name):
        raise ValueError(f"{name!a} is no identifier")
    return name


def literal(text: str) -> str:
    """Return a string as a literal of printable ASCII."""
    return ascii(str.__str__(text))


def comment(text: str) -> str:
    """Return a text as part of a comment: one line of printable ASCII."""
    return "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text)


def docstring(text: str) -> str:
    """Return a text as part of a docstring, which it cannot end."""
    return "\n".join(comment(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n"))


def attribute(path: str) -> str:
    """Return the expression of what ``self`` holds at a path: ``self.encoder.layers``, ``held(self, 'encoder', 'a b')``."""
    parts = path.split(".")
    found = "self"
    for part in parts:
        if part.isascii() and part.isdigit():
            found = f"getattr({found}, {literal(part)})"
        elif is_identifier(part) and part not in OWN_NAMES and not part.startswith(OWN_PREFIXES):
            found = f"{found}.{part}"
        else:
            return f"held({', '.join(['self', *map(literal, parts)])})"
    return found


def attribute_of(value: str, name: str) -> str:
    """Return the expression of an attribute of a value, such as ``x.shape``."""
    plain = is_identifier(name) and not name.startswith("__")
    return f"{value}.{name}" if plain else f"getattr({value}, {literal(name)})"


def keywords(given: Iterable[tuple[str, str]]) -> list[str]:
    """Return keyword arguments: ``name = value``, or ``**{'a name': value}``."""
    return [f"{name} = {value}" if is_identifier(name) else f"**{{{literal(name)}: {value}}}" for name, value in given]
