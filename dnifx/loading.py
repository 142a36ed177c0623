"""Read the words of a command line: models, example inputs, settings, cuts, estimators."""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dnifx import estimators
from dnifx.errors import OptionError, nearest
from dnifx.ir import Edge, Recurrent
from dnifx.zoo import MODELS

Cut = str | Edge | Recurrent
Cuts = str | int | Sequence[Cut]


@dataclass(frozen=True)
class Loaded:
    """A model that a command line named, and how to call and cut it.

    Attributes:
        model: The module.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        cuts: The default cuts, or None.
        classes: Number of classes of its output, or None.
        every: For each slow module, the number of windows in which it fires once; empty for a model of one rate.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    cuts: Cuts | None = None
    classes: int | None = None
    every: Mapping[str, int] = field(default_factory=dict)


def load_model(name: str, settings: Sequence[str] = (), inputs: Sequence[str] = (), meta: bool = False) -> Loaded:
    """Build the model that a command line names.

    Args:
        name: A model of the zoo, ``package.module:factory`` or ``file.py:factory``. A factory is a callable that
            returns a module, (module, args) or (module, args, kwargs). A module itself will do too.
        settings: Keyword arguments of the factory, each ``name=value``.
        inputs: Example inputs, each as ``read_input`` takes it. They replace the factory's own.
        meta: Whether to build on the meta device. Tensors take no memory there, but the model cannot run.

    Raises:
        OptionError: Nothing has this name, the factory does not take the settings, or there are no inputs.
    """
    with torch.device("meta") if meta else nullcontext():
        loaded = _build(name, dict(map(read_setting, settings)))
        if not inputs:
            return _with_inputs(loaded, name)
        device = next(loaded.model.parameters(), torch.empty(0)).device
        read = [read_input(text, device) for text in inputs]
    args = tuple(value for key, value in read if key is None)
    kwargs = {key: value for key, value in read if key is not None}
    return replace(loaded, args=args, kwargs=kwargs)


def read_setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``. The value is a Python literal if it reads as one, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--set {text}: expected NAME=VALUE, as in --set layers=6")
    return name, _literal(value)


def read_input(text: str, device: torch.device | None = None) -> tuple[str | None, Any]:
    """Make an example input from ``32x784``, ``4x128:int64``, a tuple ``(1x4x8,1x4x8)`` or, by its keyword, ``mask=4x128:bool``.

    Floating-point inputs are normal random numbers with a fixed seed. Integers are 0, booleans are true.

    Returns:
        The argument's keyword, or None, and the tensor or tuple.
    """
    head, equals, tail = text.partition("=")
    value = _read_value(tail if equals else head, text, device)
    return (head if equals else None), value


def _read_value(text: str, whole: str, device: torch.device | None) -> Any:
    """Make a tensor from its sizes and dtype, or a tuple of what stands in brackets."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        return tuple(_read_value(each, whole, device) for each in _split(text[1:-1]))
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    shape = sizes.lower().split("x") if sizes else []
    if not isinstance(dtype, torch.dtype) or not all(size.isdecimal() for size in shape):
        raise OptionError(
            f"--input {whole}: expected sizes separated by x, then a colon and a torch dtype if it is not float32; write --input 32x784, "
            "--input 4x128:int64, a tuple --input '(1x4x8,1x4x8)' or, for a keyword argument, --input mask=4x128:bool"
        )
    return _example([int(size) for size in shape], dtype, device)


def _split(text: str) -> list[str]:
    """Split at the commas that stand in no brackets; a comma at the end adds nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if parts[-1].strip() else parts[:-1]


def read_cuts(texts: Iterable[str]) -> Cuts | None:
    """Read cuts: ``each``, a number of partitions, or names, globs, edges and cuts in time, separated by commas.

    An edge is ``a->b``. A cut in time is ``1~>state``: the path of the next state in the output, then the input that
    takes the state. The path is empty if the next state is the whole output.
    """
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if len(words) == 1 and words[0].isdecimal():
        return int(words[0])
    cuts = [_cut(word) for word in words]
    return cuts[0] if len(cuts) == 1 and isinstance(cuts[0], str) else cuts or None


def read_every(texts: Iterable[str]) -> dict[str, int]:
    """Read how often slow modules fire: ``slow=4``, once in 4 windows. Commas separate several.

    Raises:
        OptionError: The text has another form, or names a module twice.
    """
    found: dict[str, int] = {}
    for word in (word.strip() for text in texts for word in text.split(",")):
        name, _, windows = (side.strip() for side in word.partition("="))
        if not name or not windows.isdecimal() or int(windows) < 1:
            raise OptionError(
                f"--every {word}: expected NAME=WINDOWS, as in --every slow=4 for a module that fires once in 4 windows"
            )
        if name in found:
            raise OptionError(f"--every {word}: {name} was given {found[name]} windows already; name it once")
        found[name] = int(windows)
    return found


def read_gradient(text: str) -> Any:
    """Read an estimator: a name that ``decouple`` knows (``zero``), its class, or a class with settings (``Synthetic(hidden=1)``).

    Raises:
        OptionError: There is no such estimator, or it has no such settings.
    """
    word, bracket, _ = text.partition("(")
    named = estimators.BY_NAME | estimators.IN_TIME
    classes = {type(factory).__name__: type(factory) for factory in named.values() if is_dataclass(factory)}
    plain = {_letters(name): name for name in (*named, *classes)}
    if not bracket and word in named:
        return word
    if word not in classes:
        alike = nearest(_letters(word), plain, 1).strip("'")
        raise OptionError(
            f"--gradient {text}: no estimator {word!r}; did you mean {plain[alike]}? Give one of {', '.join(named)}, or a "
            "class with its settings, as in 'Synthetic(hidden=1)'"
        )
    return _call(
        classes[word], _arguments(text) if bracket else {}, f"--gradient {text}", f"as in '{word}(NAME=VALUE)'"
    )


def _letters(name: str) -> str:
    """Return a name in small letters alone, so that sigmoid_linear and SigmoidLinear are alike."""
    return name.replace("_", "").replace("-", "").lower()


def read_models(text: str | None) -> Literal["synthetic"] | None:
    """Read the synthetic input models: ``synthetic``, or none."""
    if text in (None, "synthetic"):
        return cast(Literal["synthetic"] | None, text)
    raise OptionError(
        f"--inputs {text}: expected synthetic; an example input is given by --input, as in --input 32x784"
    )


def read_context(text: str | None) -> Literal["label"] | None:
    """Read the context, what estimators see beside the activation: ``label``, or nothing."""
    if text is None:
        return None
    if text == "label":
        return "label"
    raise OptionError(f"--context {text}: expected label; for another context, give dnifx.decouple a callable")


def _build(name: str, settings: dict[str, Any]) -> Loaded:
    """Find the factory and call it."""
    if ":" in name:
        return _loaded(_call(find(name), settings, name), name)
    if name not in MODELS:
        raise OptionError(
            f"no model {name!r} in the zoo, which has {', '.join(MODELS)}; did you mean {nearest(name, MODELS, 1)}? "
            "For a model of your own, write package.module:factory or file.py:factory"
        )
    known = MODELS[name]
    loaded = _loaded(_call(known.factory, settings, name), name)
    return replace(loaded, cuts=known.cuts, classes=known.classes, every=known.every)


def find(name: str) -> Any:
    """Return what ``package.module:factory`` or ``file.py:factory`` names. Modules in the working directory are found too."""
    place, _, attribute = name.rpartition(":")
    module = _file_module(Path(place)) if place.endswith(".py") else _named_module(place)
    found: Any = module
    for part in attribute.split("."):
        if part not in dir(found):
            raise OptionError(f"{place} has no {attribute!r}; did you mean {nearest(part, _own(found))}?")
        found = getattr(found, part)
    return found


def _own(place: Any) -> list[str]:
    """List what a module or class makes models by: its own functions, classes and modules, or else all its public names."""
    public = [name for name in dir(place) if not name.startswith("_")]
    inside = f"{getattr(place, '__name__', '')}."

    def makes(value: Any) -> bool:
        made_in = str(getattr(value, "__module__", ""))
        return isinstance(value, nn.Module) or (callable(value) and f"{made_in}.".startswith(inside))

    return [name for name in public if makes(getattr(place, name, None))] or public


def _file_module(path: Path) -> ModuleType:
    """Run a file as a module. It can import the modules beside it."""
    if not path.is_file():
        raise OptionError(f"there is no file {path} (looked in {Path.cwd()}); give file.py:factory")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} is not a Python file; give file.py:factory")
    _look_in(path.resolve().parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> ModuleType:
    """Import a module. OptionError says that it is missing; an error of an import inside it stays as it is."""
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise OptionError(
            f"there is no module {name!r} to import; give package.module:factory or file.py:factory"
        ) from error


def _look_in(folder: Path) -> None:
    """Let imports find the modules in a folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _call(factory: Any, settings: Mapping[str, Any], name: str, how: str = "by --set NAME=VALUE") -> Any:
    """Call a factory with its settings, which are given as ``how`` says. A module needs no call."""
    if isinstance(factory, nn.Module) and not settings:
        return factory
    if isinstance(factory, nn.Module) or not callable(factory):
        raise OptionError(
            f"{name} is {type(factory).__name__}, which takes no settings; name a function or class that builds the model"
        )
    signature = _signature(factory, name)
    try:
        signature.bind(**settings)
    except TypeError as error:
        wrong = next((key for key in settings if key not in signature.parameters), "")
        near = f"; did you mean {nearest(wrong, signature.parameters, 1)}?" if wrong and signature.parameters else ";"
        raise OptionError(f"{name}: {error}{near} It takes {_shown(signature)}, given {how}") from error
    try:
        return factory(**settings)
    except (TypeError, ValueError) as error:
        if not settings:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise OptionError(
            f"{name}({given}) failed: {type(error).__name__}: {error}; it takes {_shown(signature)}, given {how}"
        ) from error


def _shown(signature: inspect.Signature) -> str:
    """Write the parameters of a factory with their defaults: ``layers=6, width=256``."""
    return (
        ", ".join(
            str(each.replace(annotation=each.empty)) for each in signature.parameters.values() if each.name != "self"
        )
        or "no settings"
    )


def _signature(factory: Callable[..., Any], name: str) -> inspect.Signature:
    """Return the signature of a factory."""
    try:
        return inspect.signature(factory)
    except ValueError as error:
        raise OptionError(
            f"{name} has no signature that Python can read; name a Python function that builds the model"
        ) from error


def _loaded(built: Any, name: str) -> Loaded:
    """Take apart what a factory returned."""
    parts = built if isinstance(built, tuple) else (built,)
    model, args, kwargs = (*parts, (), {})[:3] if len(parts) < 3 else parts[:3]
    if not isinstance(model, nn.Module) or len(parts) > 3:
        raise OptionError(
            f"{name} returned {type(built).__name__}, expected a torch.nn.Module, or a tuple (module, args) or "
            "(module, args, kwargs)"
        )
    return Loaded(model, tuple(args), dict(kwargs))


def _with_inputs(loaded: Loaded, name: str) -> Loaded:
    """Refuse a model without example inputs."""
    if not loaded.args and not loaded.kwargs:
        raise OptionError(
            f"{name}: no example inputs; give each by --input, as in --input 32x784, or let the factory return "
            "(module, args)"
        )
    return loaded


def _example(shape: list[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Make an example tensor."""
    if dtype.is_floating_point or dtype.is_complex:
        if device is not None and device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    return torch.full(shape, dtype is torch.bool, dtype=dtype, device=device)


def _cut(word: str) -> Cut:
    """Read one cut."""
    next_state, wave, state = word.partition("~>")
    if wave and not state.strip():
        raise OptionError(
            f"--cuts {word}: expected NEXT~>STATE; name the input that takes the state, as in --cuts '1~>state'"
        )
    if wave:
        return Recurrent(state.strip(), next_state.strip())
    source, arrow, target = word.partition("->")
    return Edge(source.strip(), target.strip()) if arrow else word


def _arguments(text: str) -> dict[str, Any]:
    """Read the keyword arguments in ``Name(a=1, b=2)``."""
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise OptionError(f"--gradient {text}: cannot be read; write Synthetic(hidden=1)") from error
    raise OptionError(f"--gradient {text}: name each setting, as in Synthetic(hidden=1)")


def _literal(text: str) -> Any:
    """Read a Python literal. Anything else is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
