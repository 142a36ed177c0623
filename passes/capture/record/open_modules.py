"""The opened modules that are running: what is marked on their nodes, and what is decided about each when it returns."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dnifx.passes.capture.record.generators import python_draws
from dnifx.passes.capture.record.hazards import Hazard, model_line
from dnifx.passes.capture.record.plan import Plan, is_made
from dnifx.passes.capture.record.writer import Stack, Writer
from dnifx.runtime.emitted.ops import Autocast

_DRAW = "a draw of Python's or NumPy's random numbers (random, numpy.random), which no function shows"


@dataclass
class ModuleCall:
    """One call of an opened module.

    Attributes:
        path: The module's path.
        module: The module.
        stack: The modules around it and itself.
        number: How many calls of it came before.
        hazards: What the graph alone would not repeat.
        regions: Autocast regions open around its code, innermost last.
        draws: The state of Python's random numbers when it was last looked at.
        buffers: Identities of its buffers when the call began.
    """

    path: str
    module: nn.Module
    stack: Stack = field(default_factory=OrderedDict)
    number: int = 0
    hazards: list[Hazard] = field(default_factory=list)
    regions: list[Autocast] = field(default_factory=list)
    draws: tuple[Any, ...] = field(default_factory=python_draws)
    buffers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buffers = {name: id(buffer) for name, buffer in self.module._buffers.items()}

    def drew(self) -> bool:
        """Whether Python drew random numbers since the last time this was asked, or since the call began."""
        before, self.draws = self.draws, python_draws()
        return before != self.draws

    def replaced_buffers(self) -> list[str]:
        """Return the buffers that the call replaced by other tensors."""
        now = self.module._buffers
        return [name for name, identity in self.buffers.items() if id(now.get(name)) != identity]


class OpenModules:
    """A stack of calls of opened modules.

    Args:
        model: The model.
        plan: Which modules are opened.
        writer: The graph. Its new nodes are marked with the innermost call.

    Attributes:
        paths: The path of each module of the model, by the module's identity.
        calls: The calls that run, innermost last.
        opened: The opened modules by path.
        written: The attributes that were assigned, by the identity of the module and the name.
        whole: Modules that another run has to keep whole, and why.
        failures: What no plan can record.
        steered: The lines at which a draw decides what a module that has to be opened does: each outcome is captured by itself.
    """

    def __init__(self, model: nn.Module, plan: Plan, writer: Writer) -> None:
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.calls: list[ModuleCall] = []
        self.opened: dict[str, nn.Module] = {}
        self.written: Container[tuple[int, str]] = ()
        self.whole: dict[str, str] = {}
        self.failures: list[tuple[str, Hazard]] = []
        self.steered: dict[str, None] = {}
        self._model = model
        self._plan = plan
        self._writer = writer
        self._counts: Counter[str] = Counter()

    def has_state(self, path: str) -> bool:
        """Whether a module of the model holds parameters or buffers."""
        module = self._model.get_submodule(path)
        return any(next(held, None) is not None for held in (module.parameters(), module.buffers()))

    @property
    def regions(self) -> list[Autocast]:
        """The autocast regions that are open, innermost last."""
        return [region for call in self.calls for region in call.regions]

    def enter(self, module: nn.Module, path: str) -> None:
        """Begin a call of a module."""
        self.note_draws(model_line)
        call = ModuleCall(path, module, self.calls[-1].stack if self.calls else OrderedDict())
        if path and not is_made(path):
            call.number = self.count(path)
            self.opened[path] = module
            key = f"{path}@{call.number}" if call.number else path
            call.stack = OrderedDict([*call.stack.items(), (key, (path, type(module)))])
        else:
            self.opened.setdefault(path, module)
        self.calls.append(call)
        self._mark_nodes()

    def leave(self) -> None:
        """End the innermost call and decide about its hazards."""
        call = self.calls[-1]
        place = f"forward of {type(call.module).__name__}"
        self.note_draws(lambda: place)
        replaced = [name for name in call.replaced_buffers() if (id(call.module), name) not in self.written]
        if replaced:
            call.hazards.append(
                Hazard(f"another tensor in the place of the buffer self.{replaced[0]}", place, hard=True)
            )
        self.calls.pop()
        self.forget_draws()
        self._mark_nodes()
        if call.hazards:
            self._decide(call)

    def count(self, path: str) -> int:
        """Count a call of a module and return how many came before."""
        self._counts[path] += 1
        return self._counts[path] - 1

    def hazard(self, construct: str, hard: bool = False, draws: bool = False, effect: bool = False) -> None:
        """Note something that the graph alone would not repeat; see ``Hazard``."""
        if self.calls:
            self.calls[-1].hazards.append(Hazard(construct, model_line(), hard, draws, effect))

    def location(self) -> str:
        """Return where the model is now, for the error of a guard."""
        path = self.calls[-1].path if self.calls else ""
        return f"{path}: {model_line()}" if path else model_line()

    def note_draws(self, line: Callable[[], str]) -> None:
        """Note a draw of random numbers by the innermost module's own code since the last look."""
        if self.calls and self.calls[-1].drew():
            self.calls[-1].hazards.append(Hazard(_DRAW, line(), hard=True, draws=True))

    def forget_draws(self) -> None:
        """Ignore the draws up to here: a module kept whole draws again in every run."""
        if self.calls:
            self.calls[-1].drew()

    def _mark_nodes(self) -> None:
        """Let new nodes be marked with the innermost call."""
        call = self.calls[-1] if self.calls else None
        self._writer.stack = call.stack if call else OrderedDict()
        self._writer.call = call.number if call else 0

    def _decide(self, call: ModuleCall) -> None:
        """Keep a module with hazards whole in the next run, if it may be; else pass its hazards on."""
        made = is_made(call.path)
        shares = made and any(id(part) in self.paths for part in call.module.modules())
        learns = made and next(call.module.parameters(), None) is not None
        draws = any(one.draws for one in call.hazards)
        if not (self._plan.must_open(call.path, draws) or shares or learns):
            self.whole.setdefault(call.path, str(next((one for one in call.hazards if one.hard), call.hazards[0])))
        elif made:
            self.calls[-1].hazards += call.hazards
        else:
            self.failures += [(call.path, one) for one in call.hazards if one.hard]
            self.steered.update((one.line, None) for one in call.hazards if one.draws)
