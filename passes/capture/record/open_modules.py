"""The modules that are open while a model is recorded: the marks that their nodes bear, and what is judged of each."""

from collections import Counter, OrderedDict
from collections.abc import Callable

from torch import nn

from dnifx.passes.capture.record.frames import Autocast, Frame
from dnifx.passes.capture.record.hazards import Hazard, model_line
from dnifx.passes.capture.record.leaves import Plan, is_made
from dnifx.passes.capture.record.writer import Writer

_DRAW = "a draw of Python's or NumPy's random numbers"


class OpenModules:
    """A stack of calls of opened modules.

    Args:
        model: The model.
        plan: What to open.
        writer: The graph, whose new nodes bear the marks of the innermost call.

    Attributes:
        paths: The path of each module of the model, by its identity.
        frames: The calls that run, innermost last.
        opened: The opened modules by path.
        whole: Modules that have to be kept whole in another run, with the reason.
        failures: What cannot be recorded however the modules are opened.
        volatile: How Python's state or random numbers steer the run at a place that has to stay open, if they do.
    """

    def __init__(self, model: nn.Module, plan: Plan, writer: Writer) -> None:
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.frames: list[Frame] = []
        self.opened: dict[str, nn.Module] = {}
        self.whole: dict[str, str] = {}
        self.failures: list[tuple[str, Hazard]] = []
        self.volatile: Hazard | None = None
        self._plan = plan
        self._writer = writer
        self._calls: Counter[str] = Counter()

    @property
    def regions(self) -> list[Autocast]:
        """The autocast regions that are open, innermost last."""
        return [region for frame in self.frames for region in frame.regions]

    def enter(self, module: nn.Module, path: str) -> None:
        """Open a call of a module."""
        self.look_at_draws(model_line)
        frame = Frame(path, module)
        outer = self.frames[-1].stack if self.frames else OrderedDict()
        if path and not is_made(path):
            frame.call = self.count(path)
            self.opened[path] = module
            key = f"{path}@{frame.call}" if frame.call else path
            frame.stack = OrderedDict([*outer.items(), (key, (path, type(module)))])
        else:
            self.opened.setdefault(path, module)
            frame.stack = outer
        self.frames.append(frame)
        self._settle()

    def leave(self) -> None:
        """Close the innermost call, and judge what was found in it."""
        frame = self.frames[-1]
        self.look_at_draws(lambda: frame.path)
        self._look_at_state(frame)
        self.frames.pop()
        self.forget_draws()
        self._settle()
        if frame.hazards:
            self._judge(frame)

    def count(self, path: str) -> int:
        """Return how many calls of a module came before this one."""
        self._calls[path] += 1
        return self._calls[path] - 1

    def hazard(self, construct: str, hard: bool = False, draws: bool = False) -> None:
        """Note something that the graph alone does not repeat."""
        if self.frames:
            self.frames[-1].hazards.append(Hazard(construct, model_line(), hard, draws))

    def place(self) -> str:
        """Return where the model stands, for the error of a guard."""
        path = self.frames[-1].path if self.frames else ""
        return f"{path}: {model_line()}" if path else model_line()

    def look_at_draws(self, line: Callable[[], str]) -> None:
        """Note a draw of random numbers by the innermost module's own code, since it was last looked at."""
        if self.frames and self.frames[-1].drew():
            self.frames[-1].hazards.append(Hazard(_DRAW, line(), draws=True))

    def forget_draws(self) -> None:
        """Let what was drawn up to here count for nobody: a module kept whole draws again in every run."""
        if self.frames:
            self.frames[-1].drew()

    def _settle(self) -> None:
        """Let new nodes bear the marks of the innermost call."""
        frame = self.frames[-1] if self.frames else None
        self._writer.stack = frame.stack if frame else OrderedDict()
        self._writer.call = frame.call if frame else 0

    def _look_at_state(self, frame: Frame) -> None:
        changed = frame.changed(self._writer.constant_identities())
        if changed:
            frame.hazards.append(Hazard(f"forward changes self.{changed[0]}", frame.path, draws=True))
        rebound = frame.rebound()
        if rebound:
            frame.hazards.append(Hazard(f"forward replaces the buffer self.{rebound[0]}", frame.path, hard=True))

    def _judge(self, frame: Frame) -> None:
        """Decide whether a module whose forward holds hazards is kept whole."""
        made = is_made(frame.path)
        bound = made and any(id(part) in self.paths for part in frame.module.modules())
        fixed = self._plan.is_fixed(frame.path) or bound or (made and next(frame.module.parameters(), None) is not None)
        if not fixed:
            self.whole.setdefault(frame.path, str(next((one for one in frame.hazards if one.hard), frame.hazards[0])))
        elif made:
            self.frames[-1].hazards += frame.hazards
        else:
            self.failures += [(frame.path, one) for one in frame.hazards if one.hard]
            self.volatile = self.volatile or next((one for one in frame.hazards if one.draws), None)
