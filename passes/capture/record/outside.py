"""The variables outside of the model that its functions name: those of Python modules, classes, functions and closures."""

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor, nn

from dnifx.passes.capture.model_state import CONTAINERS, PLAIN, Missing, Outside, Read
from dnifx.passes.capture.record.anew import GENERATORS
from dnifx.passes.capture.record.attribute_watch import AttributeObserver, AttributeWatch, is_object
from dnifx.passes.capture.record.contents import ATOMS, is_open
from dnifx.passes.capture.record.hazards import is_installed, is_models
from dnifx.passes.capture.record.state import Snapshot, preserved

_OF_FUNCTION_AROUND = frozenset(
    {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "LOAD_CLOSURE", "LOAD_FAST", "STORE_DEREF"}
)
"""Instructions that name a variable of the function around; a function within may name it in its stead."""

_PASSED = frozenset({"PUSH_NULL", "PRECALL", "CACHE", "COPY", "EXTENDED_ARG"})
"""Instructions between the parts of a name, as in ``CONFIG.rate += 1``."""

_WRAPPERS = (FunctionType, MethodType, staticmethod, classmethod, property, partial, type(cache(len)))
"""What may hold a function: the outermost of a decorated one, a property, a bound method."""


class Variables(Outside):
    """The variables of a Python module, as attributes."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Variables":
        """Return the variables that a dictionary holds."""
        made = cls()
        made.__dict__ = content
        return made

    def __reduce__(self) -> Any:
        """Find them anew by the name of the Python module."""
        return _variables, (str(self.__dict__.get("__name__")),)


def _variables(name: str) -> Variables:
    return holder_of(vars(sys.modules[name]), Variables.of) if name in sys.modules else Variables()


_HOLDERS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def holder_of(content: Any, make: Callable[[Any], Outside]) -> Any:
    """Return what shows the variables of a Python module, a cell or a function as attributes: the same one each time."""
    holder = _HOLDERS.get(id(content))
    if holder is None:
        holder = _HOLDERS[id(content)] = make(content)
    return holder


class Enclosed(Outside):
    """A variable of the function around a function, as the attribute ``value``; in another process it is not there.

    Args:
        cell: The cell that holds it.
    """

    def __init__(self, cell: CellType) -> None:
        object.__setattr__(self, "cell", cell)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value

    def __delattr__(self, name: str) -> None:
        del self.cell.cell_contents

    def __reduce__(self) -> Any:
        """Leave the variable behind."""
        return Enclosed, (CellType(),)


class Defaults(Outside):
    """The values that a function's arguments have by default, as attributes.

    Args:
        function: The function.
    """

    def __init__(self, function: FunctionType) -> None:
        object.__setattr__(self, "function", function)

    def __getattr__(self, name: str) -> Any:
        values = defaults(self.function)
        if name not in values:
            raise AttributeError(name)
        return values[name]

    def __reduce__(self) -> Any:
        """Find the function by its name."""
        return Defaults, (self.function,)


def defaults(function: FunctionType) -> dict[str, Any]:
    """Return the values that a function's arguments have by default, by name."""
    given, code = function.__defaults__ or (), function.__code__
    names = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    return dict(zip(names, given, strict=True)) | (function.__kwdefaults__ or {})


class Reached(Outside):
    """An object that a variable holds, looked up in each use: a copy of a net reads the variable, no copy of the object.

    Args:
        holder: What holds the object.
        name: The attribute that holds it.
    """

    def __init__(self, holder: Any, name: str) -> None:
        object.__setattr__(self, "_place", (holder, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(*self._place), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(*self._place), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(getattr(*self._place), name)

    def __reduce__(self) -> Any:
        """Look it up in the other process."""
        return Reached, self._place


@dataclass(frozen=True)
class Naming:
    """How code names a variable outside of its function.

    Attributes:
        names: The variable, and the attributes that are read from it: ``CONFIG.rate`` are two.
        enclosed: Whether it is a variable of the function around, not of the Python module.
        stored: Whether it is assigned.
    """

    names: tuple[str, ...]
    enclosed: bool
    stored: bool


@cache
def namings(code: CodeType) -> tuple[Naming, ...]:
    """Return the variables that code names, each once."""
    found: dict[Naming, None] = {}
    names: tuple[str, ...] = ()
    enclosed = False
    for each in dis.get_instructions(code):
        name, operation = str(each.argval), each.opname
        outer = operation in _OF_FUNCTION_AROUND and name in code.co_freevars
        if names and operation in ("LOAD_ATTR", "LOAD_METHOD"):
            names = (*names, name)
        elif not names or operation not in _PASSED:
            if names:
                stored = operation == "STORE_ATTR"
                found.setdefault(Naming((*names, name) if stored else names, enclosed, stored))
            names, enclosed = (), outer
            if outer or operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                names = (name,)
            if operation == "STORE_GLOBAL" or (outer and operation.startswith("STORE")):
                names = ()
                found.setdefault(Naming((name,), outer, True))
    return tuple(found)


class VariableObserver(AttributeObserver, Protocol):
    """The recorder, as far as it matters here."""

    active: bool
    unwatched: Callable[[], AbstractContextManager[None]]

    def paused(self) -> AbstractContextManager[None]:
        """Take no note within the block."""

    def read_variable(self, at: Read, value: Any) -> None:
        """A function is about to run that names a variable, which may be ``Missing``."""


@contextmanager
def watching(model: nn.Module, observer: VariableObserver, snapshot: Snapshot) -> Iterator[None]:
    """Tell an observer what Python reads and writes within the block: attributes, and variables outside of the model."""
    attributes = AttributeWatch(observer)

    def tell(at: Read, value: Any) -> None:
        if observer.active:
            observer.read_variable(at, value)
            if is_object(value):
                attributes.look_at(value)

    def save(at: Read) -> None:
        with observer.paused():
            snapshot.add(at)

    variables = VariableWatch(model, save, tell, lambda: observer.active)
    observer.unwatched = variables.paused
    with attributes.watching(), variables.watching():
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[Snapshot]:
    """Put back the model, the generators, and what functions name outside of the model, when the block ends, even by an error."""
    with preserved(model) as snapshot, VariableWatch(model, snapshot.add).watching():
        yield snapshot


class Pause:
    """A block in which functions run unwatched; a class, since it is entered for each operation, also within another."""

    def __init__(self, within: Callable[..., Any] | None) -> None:
        self._within = within

    def __enter__(self) -> None:
        """Take the watch off."""
        self._after = sys.gettrace()
        sys.settrace(self._within)

    def __exit__(self, *error: object) -> None:
        """Go on as before."""
        sys.settrace(self._after)


class VariableWatch:
    """Saves the variables that the functions of the model's code name, before each of them first runs.

    Installed packages are left out: what they keep for themselves counts as fixed.

    Args:
        model: The model.
        save: Saves a variable.
        tell: Is told of each.
        tells: Whether ``tell`` takes note; a function that ran while it did not counts as new when it does.
    """

    def __init__(
        self,
        model: nn.Module,
        save: Callable[[Read], None],
        tell: Callable[[Read, Any], None] = lambda at, value: None,
        tells: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._save = save
        self._tell = tell
        self._tells = tells
        self._done: dict[bool, dict[int, CodeType]] = {True: {}, False: {}}  # hashing a code itself takes long
        self._others: dict[int, CodeType] = {}
        self._functions: dict[int, list[FunctionType]] = {}
        self._kinds: set[type] = set()
        self._before: Callable[..., Any] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of functions within the block."""
        for module in self._model.modules():
            self._know(module)
        before: Callable[..., Any] | None = sys.gettrace()
        others = self._others

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if id(frame.f_code) not in others:
                self._called(frame)
            if before is None:
                return None
            inner = before(frame, event, argument)
            sys.settrace(trace)  # the tracer of coverage takes its place when it is called
            return inner

        self._before = before
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def paused(self) -> "Pause":
        """Let functions run unwatched within the block."""
        return Pause(self._before)

    def _called(self, frame: FrameType) -> None:
        code = frame.f_code
        if is_installed(code.co_filename) or not is_models(code.co_filename, code.co_firstlineno):
            self._others[id(code)] = code
            return
        done = self._done[self._tells()]
        if id(code) in done:
            return
        done[id(code)] = code
        for naming in namings(code):
            for at in self._enclosed(code, naming) if naming.enclosed else self._global(frame.f_globals, naming):
                found = self._followed(at, naming.names[1:])
                self._know_function(found.value)
                if (naming.stored or found.value is not Missing) and _counts(found.value):
                    self._read(found)
        for function in self._functions.get(id(code), ()):
            for name, value in defaults(function).items():
                if not isinstance(value, PLAIN) and _counts(value):
                    self._read(
                        Read(holder_of(function, Defaults), name, f"{function.__module__}.{code.co_qualname}():{name}")
                    )

    def _read(self, at: Read) -> None:
        """Save a variable, and tell of it."""
        self._save(at)
        self._tell(at, at.value)

    def _enclosed(self, code: CodeType, naming: Naming) -> Iterator[Read]:
        """Yield the variable of the function around, for each function that this code is known to be of."""
        name = naming.names[0]
        for function in self._functions.get(id(code), ()):
            cell = (function.__closure__ or ())[code.co_freevars.index(name)]
            yield Read(holder_of(cell, Enclosed), "value", f"{function.__module__}.{code.co_qualname}.<closure>:{name}")

    def _global(self, content: dict[str, Any], naming: Naming) -> Iterator[Read]:
        """Yield the variable of the Python module; a name that it does not have is Python's own."""
        if naming.names[0] in content or (naming.stored and len(naming.names) == 1):
            yield self._of_module(content, naming.names[0])

    def _followed(self, at: Read, names: tuple[str, ...]) -> Read:
        """Return the attribute that further names lead to from a Python module, a class or a function of the user's."""
        for name in names:
            value = at.value
            if not isinstance(value, ModuleType | type | FunctionType) or not _is_users(value):
                break
            self._know_function(value)
            module = isinstance(value, ModuleType)
            at = self._of_module(vars(value), name) if module else Read(value, name, f"{at.path}.{name}")
        return at

    def _of_module(self, content: dict[str, Any], name: str) -> Read:
        return Read(holder_of(content, Variables.of), name, f"{content.get('__name__')}:{name}")

    def _know(self, module: nn.Module) -> None:
        """Note the functions of a module: its own, those of its classes, and its hooks."""
        held: list[Any] = []
        for each in vars(module).values():
            if type(each) not in ATOMS:
                held += each.values() if isinstance(each, dict) else (each,)
        for kind in type(module).__mro__:
            if kind not in self._kinds and is_open(kind):
                self._kinds.add(kind)
                held += vars(kind).values()
        for each in held:
            if isinstance(each, _WRAPPERS):
                self._know_function(each)

    def _know_function(self, value: Any) -> None:
        """Note a function with those that it encloses, as decorators do."""
        within = ("__func__", "fget", "__wrapped__", "func") if isinstance(value, _WRAPPERS) else ()
        for each in (value, *(getattr(value, name, None) for name in within)):
            known = self._functions.setdefault(id(each.__code__), []) if isinstance(each, FunctionType) else [each]
            if isinstance(each, FunctionType) and each not in known:
                known.append(each)
                for cell in each.__closure__ or ():
                    self._know_function(getattr(Enclosed(cell), "value", None))


def _counts(value: Any) -> bool:
    """Whether a variable's value may change what the model does."""
    if isinstance(value, PLAIN) or value is Missing:
        return True
    if isinstance(value, (type, nn.Module, ModuleType, FunctionType, MethodType)):
        return False
    return isinstance(value, (Tensor, np.ndarray, *GENERATORS, *CONTAINERS)) or (
        hasattr(value, "__dict__") and is_open(type(value))
    )


def _is_users(value: ModuleType | type | FunctionType) -> bool:
    """Whether a Python module, class or function is neither Python's, torch's nor an installed package's."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    path = getattr(sys.modules.get(str(name)), "__file__", None)
    if path is None:
        return name not in sys.builtin_module_names
    return is_models(path, 1) and not is_installed(path)
