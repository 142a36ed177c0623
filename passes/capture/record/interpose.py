"""Shows the recorder what no function mode sees: module calls, autograd functions, vmap, checkpoints, autocast, len, range."""

import builtins
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dnifx.passes.capture.record.anew import Patch
from dnifx.passes.capture.record.sizes import Number, SymbolicFloat, SymbolicInt, plain_number
from dnifx.passes.compiled import as_written


class Observer(Protocol):
    """The recorder, as far as it matters here."""

    active: bool
    imports: set[str]

    def imported(self, name: str) -> None:
        """The model imports a module for the first time; the stand-ins for builtins are gone from here on."""

    def called_module(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module is called."""

    def called_function(
        self, call: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The ``apply`` of a custom autograd function, or a function of TorchScript, is called."""

    def called_vmap(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function under ``torch.vmap`` is called."""

    def checkpoint(self, preserve: bool, early_stop: bool, chooses: bool) -> AbstractContextManager[None]:
        """A function runs under a checkpoint, within the context; ``chooses`` where a ``context_fn`` says what is kept."""

    def entered_autocast(self, region: torch.autocast) -> None:
        """The model opens an autocast region."""

    def left_autocast(self) -> None:
        """The model closes its innermost autocast region."""

    def consumed(self, number: Number) -> None:
        """Python takes the plain value of a symbolic number."""


@contextmanager
def interposed(observer: Observer, others: Iterable[Patch] = ()) -> Iterator[None]:
    """Call ``observer`` for what the model does within the block; ``others`` are stand-ins for functions that it may import."""
    with ExitStack() as stack:
        stack.enter_context(as_written())
        for holder, name, value in (*_calls(observer), *_regions(observer), *_caches()):
            stack.callback(setattr, holder, name, holder.__dict__[name])
            setattr(holder, name, value)
        standins = stack.enter_context(ExitStack())
        for holder, name, value in (*_builtins(observer), *others):
            standins.callback(setattr, holder, name, holder.__dict__[name])
            setattr(holder, name, value)
        watch = _ImportWatch(observer, standins)
        sys.meta_path.insert(0, watch)
        stack.callback(sys.meta_path.remove, watch)
        yield


class _ImportWatch(MetaPathFinder):
    """Removes the stand-ins for builtins before a module is imported, since the module might keep them for good."""

    def __init__(self, observer: Observer, standins: ExitStack) -> None:
        self._observer = observer
        self._standins = standins

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """See an import, and leave it to the other finders."""
        if fullname not in self._observer.imports:
            self._standins.close()
            self._observer.imported(fullname)


def _calls(observer: Observer) -> list[Patch]:
    apis: Any = import_module("torch._functorch.apis")
    call, apply, vmap = nn.Module.__call__, Function.__dict__["apply"].__func__, apis.vmap_impl

    def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return observer.called_module(call, module, args, kwargs)

    def function_apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not observer.active:
            return apply(kind, *args, **kwargs)
        return observer.called_function(apply, kind, args, kwargs)

    scripted: Any = torch.jit.ScriptFunction
    script = scripted.__call__

    def script_call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            observer.called_function(script, function, args, kwargs)
            if observer.active
            else script(function, *args, **kwargs)
        )

    def vmap_call(*args: Any, **kwargs: Any) -> Any:
        return observer.called_vmap(vmap, args, kwargs) if observer.active else vmap(*args, **kwargs)

    checkpoints: Any = import_module("torch.utils.checkpoint")
    region = checkpoints._checkpoint_without_reentrant_generator
    call_of_region = inspect.signature(region)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        given = call_of_region.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        if not observer.active:
            yield from region(*args, **kwargs)
        else:
            chooses = options["context_fn"] is not checkpoints.noop_context_fn
            with observer.checkpoint(options["preserve_rng_state"], options["early_stop"], chooses):
                yield from region(*args, **kwargs)

    return [
        (nn.Module, "__call__", module_call),
        (Function, "apply", classmethod(function_apply)),
        (scripted, "__call__", script_call),
        (apis, "vmap_impl", vmap_call),
        (checkpoints, "_checkpoint_without_reentrant_generator", checkpointed),
    ]


def _regions(observer: Observer) -> list[Patch]:
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def entered(region: torch.autocast) -> Any:
        observer.entered_autocast(region)
        return enter(region)

    def left(region: torch.autocast, *error: Any) -> Any:
        observer.left_autocast()
        return leave(region, *error)

    return [(torch.autocast, "__enter__", entered), (torch.autocast, "__exit__", left)]


def _builtins(observer: Observer) -> list[Patch]:
    true_len, true_range = builtins.len, builtins.range

    def symbolic_len(item: Any) -> int:
        if observer.active and isinstance(item, Tensor):
            size: int = item.__len__()  # type: ignore[no-untyped-call]
            return size
        return true_len(item)

    class RangeType(type):
        """Lets the stand-in behave as ``range`` in comparisons and ``isinstance``."""

        def __instancecheck__(cls, item: object) -> bool:
            return isinstance(item, true_range)

        def __eq__(cls, other: object) -> bool:
            return other is true_range or other is cls

        def __hash__(cls) -> int:
            return hash(true_range)

    class GuardedRange(metaclass=RangeType):
        """A range whose symbolic bounds are guarded, since the loop over it is unrolled."""

        def __new__(cls, *bounds: Any) -> Any:
            for bound in bounds:
                if observer.active and isinstance(bound, SymbolicInt | SymbolicFloat):
                    observer.consumed(bound)
            return true_range(*map(plain_number, bounds))

    return [(builtins, "len", symbolic_len), (builtins, "range", GuardedRange)]


def _caches() -> list[Patch]:
    """Bypass einops' cache of shape arithmetic, which would return the numbers of an earlier call."""
    einops: Any = sys.modules.get("einops.einops")
    if einops is None:
        return []
    return [(einops, "_reconstruct_from_shape", einops._reconstruct_from_shape_uncached)]
