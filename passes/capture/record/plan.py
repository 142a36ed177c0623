"""Decides which modules are opened, so that their inside is recorded, and which stay one node."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from dnifx.passes.capture.record.drawing import DrawingFunction
from dnifx.passes.compiled import why_closed

_OPENED = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
"""The modules of torch that are opened; all others stay one node."""

_GLOBAL_HOOKS: tuple[Mapping[int, object], ...] = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)
_MADE = "<made in forward>."


def made_path(module: nn.Module) -> str:
    """Return a path for a module that forward creates, since the model has none."""
    return f"{_MADE}{type(module).__qualname__}"


def is_made(path: str) -> bool:
    """Whether a path is that of a module that forward creates."""
    return path.startswith(_MADE)


def runs_torch_alone(module: nn.Module) -> bool:
    """Whether a call of a module runs torch's own code and no other: it has no parts, no hooks, and no function that it was given."""
    if not type(module).__module__.startswith("torch.nn.modules."):
        return False
    held = object.__getattribute__(module, "__dict__")
    hooks = (held["_forward_hooks"], held["_forward_pre_hooks"], *_GLOBAL_HOOKS)
    return not (held["_modules"] or any(hooks) or any(map(callable, held.values())))


def is_closed(module: nn.Module) -> bool:
    """Whether the inside of a module cannot be recorded: it is compiled, or its parameters are computed when they are read."""
    if why_closed(module) is not None:
        return True
    return "parametrizations" in module._modules and parametrize.is_parametrized(module)


@lru_cache(maxsize=1024)
def stays_closed(kind: type) -> bool:
    """Whether torch's modules of a class stay one node, since they compute one thing."""
    return kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not issubclass(kind, _OPENED)


@dataclass(frozen=True)
class Plan:
    """Which modules a run opens. Each run may find that the plan has to be revised.

    Attributes:
        open_paths: The only modules to open, with their ancestors; None opens everything that can be opened.
        whole: Modules to keep whole, and why.
        leaking: Modules whose tensors are read by others without being their output. They have to be opened, and so have the
            modules inside them.
        large: Modules that hold so much of the model that keeping them whole would leave little to cut.
        around: Modules around a cut that the user named; None where the cuts are not known.
        varying: The attributes, as ``self.gate.alpha``, whose numbers or tensors change from call to call, so that they are inputs.
        unfollowed: Those of them whose numbers cannot be inputs, since Python takes them in a way that nothing shows.
        functions: Functions of the model's code that draw, each of which is one call.
        seen_through: The codes of such functions that cannot be one call.
    """

    open_paths: frozenset[str] | None = None
    whole: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    leaking: frozenset[str] = frozenset()
    large: frozenset[str] = frozenset()
    around: frozenset[str] | None = None
    varying: frozenset[str] = frozenset()
    unfollowed: frozenset[str] = frozenset()
    functions: frozenset[DrawingFunction] = frozenset()
    seen_through: frozenset[CodeType] = frozenset()

    @classmethod
    def start(
        cls,
        model: nn.Module,
        open_paths: Collection[str] | None,
        keep_whole: Collection[str],
        varying: Collection[str] = (),
        around: Collection[str] | None = None,
        unfollowed: Collection[str] = (),
    ) -> "Plan":
        """Return the plan of the first run."""
        opened, cut = (
            None if paths is None else frozenset(part for path in paths for part in ancestry(path))
            for paths in (open_paths, around)
        )
        asked = dict.fromkeys(keep_whole, "asked for by keep_whole")
        large = frozenset(large_modules(model))
        changing, fixed = frozenset(varying), frozenset(unfollowed)
        return cls(opened, MappingProxyType(asked), large=large, around=cut, varying=changing, unfollowed=fixed)

    def follows(self, path: str) -> bool:
        """Whether an attribute's number is an input."""
        return path in self.varying and path not in self.unfollowed

    def is_leaf(self, path: str, module: nn.Module) -> bool:
        """Whether a module stays one node."""
        if path == "" or path in self.leaking:
            return False
        if path in self.whole or is_closed(module):
            return True
        if is_made(path):
            return False
        kind: Any = type(module)  # a class is hashable, which mypy doubts
        if stays_closed(kind):
            return True
        below_leak = any(path.startswith(f"{leak}.") for leak in self.leaking)
        return self.open_paths is not None and path not in self.open_paths and not below_leak

    def may_open(self, path: str, module: nn.Module) -> bool:
        """Whether a module of torch that is usually one node can be opened: autocast has to stand around each of its calls."""
        closed = is_closed(module) or is_made(path)
        return path not in self.whole and not closed and type(module).__module__.startswith("torch.nn.")

    def must_open(self, path: str, draws: bool = False) -> bool:
        """Whether a module has to be opened, whatever its forward does; one that ``draws`` only where a cut lies in it."""
        wanted = self.large if self.open_paths is None else self.open_paths
        around = wanted if self.around is None else self.around
        return path in ("", *self.leaking) or path in around or (path in wanted and not draws)

    def revised(self, whole: Mapping[str, str], leaking: Collection[str], varying: Collection[str] = ()) -> "Plan":
        """Return the plan with more modules kept whole, more opened, and more numbers as inputs."""
        leaks = self.leaking | frozenset(leaking)
        kept = {path: reason for path, reason in {**self.whole, **whole}.items() if path not in leaks}
        return replace(self, whole=MappingProxyType(kept), leaking=leaks, varying=self.varying | {*varying})

    def with_functions(self, found: Mapping[CodeType, DrawingFunction], failed: Collection[CodeType]) -> "Plan":
        """Return the plan with more functions recorded as one call, or looked into."""
        through = self.seen_through | {*failed}
        functions = {each for each in (*self.functions, *found.values()) if each.code not in through}
        return replace(self, functions=frozenset(functions), seen_through=through)


def ancestry(path: str) -> list[str]:
    """Return the path and the paths of all modules around it, the root first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def large_modules(model: nn.Module, parameters: float = 0.5, modules: float = 0.3) -> list[str]:
    """Return the paths of modules that hold more than these shares of the model's parameters and of its modules."""
    weights: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for path, module in model.named_modules():
        own = sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)
        for ancestor in ancestry(path):
            weights[ancestor] += own
            counts[ancestor] += 1
    least = parameters * (weights[""] or 1), modules * counts[""]
    return [path for path in counts if weights[path] > least[0] and counts[path] > least[1]]
