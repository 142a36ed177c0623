"""Recipes: a name, typed options, and a function that runs an experiment."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from rich.console import Console

from dnifx.errors import OptionError, nearest

Options = TypeVar("Options")
Kind = type[int] | type[float] | type[str] | type[bool] | type[Path]

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Option:
    """One option of a recipe. It describes a field of the recipe's options to the command line.

    Attributes:
        name: The field's name, such as ``lr_drops``.
        flag: Its command-line spelling, such as ``--lr-drops``.
        kind: Type of one value: int, float, str, bool or Path.
        many: Whether it takes several values, repeated or separated by commas.
        default: The value when none is given; None means that the recipe chooses.
        help: One or two short sentences for the user.
        choices: The allowed words; empty if any value is allowed.
    """

    name: str
    flag: str
    kind: Kind
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """Convert ``value`` to the field's type.

        Args:
            value: Text, a value of the right type, or an iterable of either; None gives the
                default. An option of several values splits text at commas. It reads ``3..6`` as
                the integers from 3 to 6, and the word ``none`` as an empty list.

        Raises:
            OptionError: A value has another type or is not one of the choices.
        """
        if value is None:
            return self.default
        if not self.many:
            return self._one(value)
        parts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        words = [word.strip() for part in parts for word in (part.split(",") if isinstance(part, str) else [str(part)])]
        if words == ["none"] and "none" not in self.choices:
            return ()
        return tuple(self._one(each) for word in words if word for each in self._range(word))

    def _range(self, word: str) -> Iterable[Any]:
        ends = _RANGE.fullmatch(word) if self.kind is int else None
        return [word] if ends is None else range(int(ends[1]), int(ends[2]) + 1)

    def _one(self, value: Any) -> Any:
        try:
            if self.kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError(value)
            read = self._bool(value) if self.kind is bool else self.kind(value)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{self.flag}: got {value!r}, expected {self.kind.__name__.lower()}. {self.help}"
            ) from error
        if self.choices and read not in self.choices:
            known = ", ".join(self.choices)
            near = nearest(str(read), self.choices, count=1)
            raise OptionError(f"{self.flag}: got {read!r}, expected one of {known}; did you mean {near}?")
        return read

    def _bool(self, value: Any) -> bool:
        word = str(value).lower()
        if word not in {"true", "false"}:
            raise ValueError(word)
        return word == "true"

    def write(self, value: Any) -> list[str]:
        """Return the command-line words for ``value``; ``read`` turns them back into it."""
        if self.many:
            return [self.flag, ",".join(map(str, value)) or "none"]
        if self.kind is bool:
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        return [self.flag, str(value)]


@dataclass(frozen=True)
class Recipe(Generic[Options]):
    """An experiment that one command runs.

    Attributes:
        name: The word after ``dnifx train``.
        summary: One line for lists.
        options: The frozen dataclass of its options. Each field is made by ``option``.
        run: Runs the experiment, prints to the console and returns the results.
        fixed: Values of the fields that the recipe sets itself, hidden from the command line.
        defaults: Defaults that this recipe changes, by field.
    """

    name: str
    summary: str
    options: type[Options]
    run: Callable[[Options, Console], object]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[Option, ...]:
        """The options that a user can give, in order."""
        return tuple(
            replace(one, default=self.defaults.get(one.name, one.default))
            for one in options_of(self.options)
            if one.name not in self.fixed
        )

    def read(self, values: Mapping[str, Any]) -> Options:
        """Return the options with ``values``, text or typed, by field name, and defaults elsewhere.

        Raises:
            OptionError: A name is unknown or a value is not allowed.
        """
        known = {one.name: one for one in self.parameters}
        for name in values:
            if name not in known:
                raise OptionError(f"recipe {self.name}: no option {name!r}; did you mean {nearest(name, known)}?")
        given = {name: known[name].read(value) for name, value in values.items()}
        return self.options(**self.fixed, **{**self.defaults, **given})

    def command(self, options: Options) -> str:
        """Return the command line that runs this recipe with these options."""
        words = ["dnifx", "train", self.name]
        for one in self.parameters:
            value = getattr(options, one.name)
            if value != one.default:
                words += one.write(value)
        return shlex.join(words)


BOARD = "Folder for TensorBoard, with the losses, the errors and how good the synthetic gradients are. It needs that package."
"""What ``--log-dir`` is, in every recipe."""


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """Return the dataclass field of one option.

    Args:
        default: The value when none is given; None means that the recipe chooses.
        help: One or two short sentences.
        choices: The allowed words; empty if any value is allowed.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def flag(name: str) -> str:
    """Return the command-line spelling of a field: ``--lr-drops`` for ``lr_drops``."""
    return "--" + name.replace("_", "-")


def options_of(options: type[Any]) -> tuple[Option, ...]:
    """Return one option for each field of the dataclass ``options``, in order.

    Raises:
        OptionError: A field has no default, or a type that the command line does not support.
    """
    hints = get_type_hints(options)
    return tuple(_option(one.name, hints[one.name], one.default, one.metadata) for one in fields(options))


def _option(name: str, hint: Any, default: Any, metadata: Mapping[str, Any]) -> Option:
    hint = _without_none(hint)
    many = get_origin(hint) is tuple
    kind = get_args(hint)[0] if many else hint
    if kind not in (int, float, str, bool, Path) or default is MISSING:
        raise OptionError(
            f"option {name!r} of type {hint}: give it a default, and the type int, float, str, bool or Path"
        )
    return Option(name, flag(name), kind, many, default, metadata.get("help", ""), metadata.get("choices", ()))


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else hint
