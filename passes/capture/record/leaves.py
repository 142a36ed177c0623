"""Which modules are opened and which stay one node."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.utils import parametrize

_OPENED = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_MADE = "<made in forward>."


def made_path(module: nn.Module) -> str:
    """Return what stands for the path of a module that forward makes."""
    return f"{_MADE}{type(module).__qualname__}"


def is_made(path: str) -> bool:
    """Whether a path is that of a module that forward makes."""
    return path.startswith(_MADE)


@dataclass(frozen=True)
class Plan:
    """What to open in a run; each run may find that it has to be revised.

    Attributes:
        open_paths: The only modules to open, with their ancestors; None opens everything that can be.
        whole: Modules to keep whole, with the reason.
        leaking: Modules whose tensors leave by another door than their output: they are opened, and what open_paths left out below.
        large: Modules that hold so much of the model that keeping them whole would leave little to cut.
    """

    open_paths: frozenset[str] | None = None
    whole: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    leaking: frozenset[str] = frozenset()
    large: frozenset[str] = frozenset()

    @classmethod
    def start(cls, model: nn.Module, open_paths: Collection[str] | None, keep_whole: Collection[str]) -> "Plan":
        """Return the plan of the first run."""
        opened = None if open_paths is None else frozenset(part for path in open_paths for part in ancestry(path))
        asked = dict.fromkeys(keep_whole, "asked for by keep_whole")
        return cls(opened, MappingProxyType(asked), large=frozenset(large_modules(model)))

    def is_leaf(self, path: str, module: nn.Module) -> bool:
        """Whether a module stays one node."""
        if path == "" or path in self.leaking:
            return False
        if path in self.whole or isinstance(module, torch.jit.ScriptModule) or parametrize.is_parametrized(module):
            return True
        if is_made(path):
            return False
        if type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, _OPENED):
            return True
        return self.open_paths is not None and path not in self.open_paths and not self._is_below_leak(path)

    def may_open(self, path: str, module: nn.Module) -> bool:
        """Whether a module of torch that usually stays one node can be opened: inside autocast, its calls need the region around them."""
        made = isinstance(module, torch.jit.ScriptModule) or parametrize.is_parametrized(module) or is_made(path)
        return path not in self.whole and not made and type(module).__module__.startswith("torch.nn.")

    def is_fixed(self, path: str) -> bool:
        """Whether a module has to stay open, whatever its forward does."""
        if path == "" or path in self.leaking:
            return True
        wanted = self.large if self.open_paths is None else self.open_paths
        return path in wanted

    def _is_below_leak(self, path: str) -> bool:
        return any(path.startswith(f"{leak}.") for leak in self.leaking)

    def revised(self, whole: Mapping[str, str], leaking: Collection[str]) -> "Plan":
        """Return the plan with more modules kept whole and more opened."""
        kept = {**self.whole, **whole}
        leaks = self.leaking | frozenset(leaking)
        rest = {path: reason for path, reason in kept.items() if path not in leaks}
        return replace(self, whole=MappingProxyType(rest), leaking=leaks)


def ancestry(path: str) -> list[str]:
    """Return the path and the paths of all modules around it, the root among them."""
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
    return [
        path
        for path in counts
        if weights[path] > parameters * (weights[""] or 1) and counts[path] > modules * counts[""]
    ]
