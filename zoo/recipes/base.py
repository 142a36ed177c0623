"""What a recipe is: a name, typed options, and a function that runs an experiment."""

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
    """One option of a recipe, read off a field of its options: all that a command line needs to know.

    Attributes:
        name: The field's name: ``lr_drops``.
        flag: Its command-line spelling: ``--lr-drops``.
        kind: Type of one value: int, float, str, bool or Path.
        many: Whether it takes several values, repeated or with commas between.
        default: What holds where it is not given; None means that the recipe chooses.
        help: What it is, for the user.
        choices: The words that it takes, or nothing where any value goes.
    """

    name: str
    flag: str
    kind: Kind
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """Return ``value``, as a command line or a caller gives it, as the field's type.

        Args:
            value: Text, a value of the right type, or an iterable of either; None is the default. Where several values
                are taken, text with commas is a list, ``3..6`` all whole numbers from 3 to 6, and the word ``none`` an
                empty list.

        Raises:
            OptionError: Where a value has another type or is none of the choices.
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
            read = self._bool(value) if self.kind is bool else self.kind(value)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{self.flag}: got {value!r}, expected {self.kind.__name__.lower()}; {self.help}"
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
        """Return the command-line words that say ``value``, so that ``read`` gives it back."""
        if self.many:
            return [self.flag, ",".join(map(str, value)) or "none"]
        if self.kind is bool:
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        return [self.flag, str(value)]


@dataclass(frozen=True)
class Recipe(Generic[Options]):
    """An experiment that one command runs.

    Attributes:
        name: What the user writes after ``dnifx train``.
        summary: One line for lists.
        options: The frozen dataclass of its options, each field made by ``option``.
        run: Runs it, prints to the console and returns its results.
        fixed: Fields that the recipe sets itself, and their values; no command line shows them.
        defaults: Fields whose default is another in this recipe, and that default.
    """

    name: str
    summary: str
    options: type[Options]
    run: Callable[[Options, Console], object]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[Option, ...]:
        """The options that a user may give, in order."""
        return tuple(
            replace(one, default=self.defaults.get(one.name, one.default))
            for one in options_of(self.options)
            if one.name not in self.fixed
        )

    def read(self, values: Mapping[str, Any]) -> Options:
        """Return the options that ``values``, text or typed, by field name, say; what is not given keeps its default.

        Raises:
            OptionError: Where a name is unknown or a value cannot be taken.
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


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """Return the dataclass field of one option.

    Args:
        default: What holds where it is not given; None means that the recipe chooses.
        help: What it is, in a few words.
        choices: The words that it takes; none where any value goes.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def options_of(options: type[Any]) -> tuple[Option, ...]:
    """Return the options that the fields of the dataclass ``options`` describe, in their order.

    Raises:
        OptionError: Where a field has no default or a type that no command line can say.
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
    flag = "--" + name.replace("_", "-")
    return Option(name, flag, kind, many, default, metadata.get("help", ""), metadata.get("choices", ()))


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else hint
