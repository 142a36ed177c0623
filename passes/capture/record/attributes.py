"""What Python reads from a model's attributes while the model runs, and what it writes there."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from dnifx.passes.capture.model_state import (
    PLAIN,
    Missing,
    Read,
    Write,
    can_be_input,
    comparable,
    frozen,
    held_at,
)
from dnifx.passes.capture.record.attribute_watch import is_object
from dnifx.passes.capture.record.node_values import NodeValue
from dnifx.passes.capture.record.outside import Reached, watching
from dnifx.passes.capture.record.plan import Plan
from dnifx.passes.capture.record.sizes import Owner, symbolic
from dnifx.passes.capture.record.state import Snapshot, preserved
from dnifx.passes.capture.record.structure import copied_arguments, path_name, walk
from dnifx.passes.capture.record.unseen import UnseenTensors
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops

MOST_LEAVES = 256
"""How many leaves a container may have for its contents to be part of the input kind."""

REFILLED = (dict, list, set, deque)
"""Containers whose content is left on the model in place."""

Key = tuple[int, str]
"""An attribute: the identity of its holder, and its name."""


class RunningRecorder(Owner, Protocol):
    """The recorder, as far as it matters here."""

    writer: Writer
    unseen: UnseenTensors
    leaking: set[str]

    def paused(self) -> AbstractContextManager[None]:
        """Record nothing within the block."""


class KnownObjects:
    """The modules of a model and the objects that their attributes hold, with the paths that people write.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[int, str] = {}
        self._holders: dict[int, Reached] = {}
        self._alive: list[Any] = []
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), f"self.{path}" if path else "self")

    def knows(self, holder: Any) -> bool:
        """Whether an object is one of the model's."""
        return id(holder) in self._paths

    def holds(self, holder: Any, name: str, value: Any) -> None:
        """Note an object that an attribute of a known object holds."""
        if self.knows(holder) and not self.knows(value):
            self._note(value, f"{self._paths[id(holder)]}.{name}")
            if id(holder) in self._holders:
                self._holders[id(value)] = Reached(self._holders[id(holder)], name)

    def holds_outside(self, at: Read, value: Any) -> None:
        """Note an object that a variable outside of the model holds."""
        if not self.knows(value):
            self._note(value, at.path)
            self._holders[id(value)] = Reached(at.holder, at.name)

    def _note(self, value: Any, path: str) -> None:
        self._paths[id(value)] = path
        self._alive.append(value)

    def at(self, holder: Any, name: str) -> Read:
        """Return an attribute of a known object."""
        return Read(self._holders.get(id(holder), holder), name, f"{self._paths[id(holder)]}.{name}")


class ModelAttributes:
    """The attributes of a model that a recorded run read and wrote.

    Args:
        model: The model.
        plan: Says which numbers are inputs, since they change from call to call.
        recorder: The recorder.

    Attributes:
        fixed: What was read and is part of the input kind.
        held: What was read and holds tensors, as it was, with the names of the inputs.
        numbers: The numbers that are inputs, with the names of their inputs.
        written: What was assigned.
        asked: What Python asked of tensors that their dtypes and sizes do not say: ``requires_grad``, ``is_contiguous``.
        known: The objects whose attributes count.
        objects: The objects that were read, which are part of the input kind by their identity.
        contents: The containers that the run filled in place.
        added: Those that forward does not read, with the positions or keys of what it adds.
        variables: The variables outside of the model that functions name, with what they were when the function began.
        unshown: Objects whose attributes are assigned without anything that shows it, with what they held.
    """

    def __init__(self, model: nn.Module, plan: Plan, recorder: RunningRecorder) -> None:
        self.fixed: dict[Key, Read] = {}
        self.held: dict[Key, tuple[Read, Any, list[str]]] = {}
        self.numbers: dict[Key, tuple[Read, str]] = {}
        self.written: dict[Key, Read] = {}
        self._plan, self._recorder = plan, recorder
        self.known = KnownObjects(model)
        self.asked: dict[str, None] = {}
        self.objects: dict[Key, Read] = {}
        self.contents: dict[Key, Read] = {}
        self.variables: dict[Key, tuple[Read, Any]] = {}
        self.unshown: list[tuple[Any, dict[str, Any]]] = []
        self.added: dict[Key, list[Any]] = {}
        self._replaced: dict[Key, Any] = {}

    def wrote(self, holder: Any, name: str) -> None:
        """Note an assignment."""
        if self.known.knows(holder):
            self.written[id(holder), name] = self.known.at(holder, name)

    def read(self, holder: Any, name: str, value: Any) -> Any:
        """Note a read; return what Python sees: the value, or a symbolic number that stands for it."""
        key = id(holder), name
        if not self.known.knows(holder) or key in self.written or key in self.fixed or key in self.held:
            return value
        if key in self.numbers:
            return self._replaced[key]
        return self._read(key, self.known.at(holder, name), value)

    def read_variable(self, at: Read, value: Any, seen: Any) -> None:
        """Note a variable outside of the model, and let it hold what functions shall see: a symbolic number, if it is an input."""
        key = id(at.holder), at.name
        if key in self.variables:
            return
        if is_object(value):
            self.known.holds_outside(at, value)
            self.objects.setdefault(key, replace(at, seen=value))
        elif value is not Missing and seen is value:
            seen = self._read(key, at, value)
        if seen is not value:
            setattr(at.holder, at.name, seen)
        self.variables[key] = at, seen

    def _read(self, key: Key, at: Read, value: Any) -> Any:
        if self._plan.follows(at.path) and type(value) in (int, float):
            node = self._recorder.writer.placeholder(path_name((("item", at.path),)))
            self.numbers[key] = at, node.name
            self._replaced[key] = symbolic(value, self._recorder, None, (NodeValue(node), None, ""), False)
            return self._replaced[key]
        with self._recorder.paused():
            self._note(key, at, value)
        return value

    def _note(self, key: Key, at: Read, value: Any) -> None:
        writer = self._recorder.writer
        leaves = [] if isinstance(value, PLAIN) else list(walk(value, whole=True))
        tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        made = [maker for _, leaf in tensors if (maker := self._recorder.unseen.maker(leaf)) is not None]
        self._recorder.leaking.update(made)  # a module that is kept whole left it there in this very run
        if made:
            return
        if not tensors:
            if len(leaves) <= MOST_LEAVES:
                self.fixed[key] = replace(at, seen=frozen(value))
        elif at.path not in self._plan.varying:
            self.fixed[key] = replace(at, seen=frozen(value))
        elif all(not writer.knows(leaf) for _, leaf in tensors):
            steps = (("item", at.path),)
            self.held[key] = at, value, [writer.input(path_name((*steps, *path)), leaf) for path, leaf in tensors]

    def holds(self, holder: Any, name: str, value: Any) -> None:
        """Note an object that an attribute holds; another object in its place is another input kind."""
        self.known.holds(holder, name, value)
        if self.known.knows(holder) and (id(holder), name) not in self.written:
            self.objects.setdefault((id(holder), name), replace(self.known.at(holder, name), seen=value))

    def all_fixed(self) -> tuple[Read, ...]:
        """Return all that is part of the input kind."""
        objects = (at for key, at in self.objects.items() if key not in self.written)
        return (*self.fixed.values(), *objects)

    def refilled(
        self,
        snapshot: Snapshot,
        changes: Iterable[tuple[Any, str]],
        opened: Collection[int],
        added: Callable[[Read], list[Any] | None],
    ) -> None:
        """Note what the run changed past ``setattr``: containers that it filled in place, and what it put into ``__dict__``.

        Args:
            snapshot: The model as it was.
            changes: The attributes that are or hold something else now.
            opened: Identities of the modules whose forward was recorded.
            added: Returns what forward adds to a container that it does not read: then its content is no part of the input kind.
        """
        for key, (variable, seen) in self.variables.items():
            if variable.value is not seen:
                self.written[key] = variable
        for holder, before in self.unshown:
            for name in [name for name, value in vars(holder).items() if value is not before.get(name, Missing)]:
                self.written[id(holder), name] = self.known.at(holder, name)
        for holder, name in changes:
            key, value = (id(holder), name), held_at(holder, name)
            at = self.held[key][0] if key in self.held else self.fixed.get(key)
            made = isinstance(value, Tensor) and id(holder) in opened and self._recorder.writer.find(value) is not None
            if at is not None and key not in self.written and isinstance(value, REFILLED):
                self._filled(key, at, added)
            elif made and not snapshot.held(holder, name, value):
                self.written.setdefault(key, self.known.at(holder, name))
        for key, at in [*self.fixed.items()]:
            filled = not isinstance(at.holder, nn.Module) and key not in self.written and isinstance(at.value, REFILLED)
            if filled and comparable(at.value, at.seen) != comparable(at.seen, at.seen):
                self._filled(key, at, added)

    def _filled(self, key: Key, at: Read, added: Callable[[Read], list[Any] | None]) -> None:
        """Note a container that the run filled in place."""
        self.contents[key] = at
        new = added(at) if key in self.fixed else None
        if new is not None:
            before = self.fixed.pop(key).seen
            self.added[key] = new if isinstance(before, dict) else [len(before) + place for place in new]

    def writes(self, installs: bool) -> tuple[list[Write], list[fx.Node]]:
        """Return what the run left on the model, and the nodes of the values in it.

        Args:
            installs: Whether the run installed hooks. Then flags that it set say so, and are not left: the hooks are not.
        """
        found, nodes = [], []
        for key, at in (self.written | self.contents).items():
            value = self.left(key, at)
            if value is not Missing:
                parts = self._recorder.writer.variables(value)
                if installs and not parts:
                    continue
                build = ops.Template(value, [part for part, _ in parts]).build
                in_place, buffer = key in self.contents, persistence(at.holder, at.name)
                found.append(Write(at.holder, at.name, at.path, build, len(parts), in_place, buffer, key in self.added))
                nodes += [node for _, node in parts]
        return found, nodes

    def left(self, key: Key, at: Read) -> Any:
        """Return the value that an attribute is left with; of a container that is filled in place, its content or what is added."""
        value = at.value
        if key not in self.contents:
            return value
        if isinstance(value, dict):
            return {name: value[name] for name in self.added.get(key, value)}
        return [value[place] for place in self.added[key]] if key in self.added else list(value)

    def carried(self) -> list[str]:
        """Return the attributes that are part of the input kind though the run changed them: they have to be inputs.

        Of a buffer that the run replaced, the sizes have to be read from the buffer in each run.
        """
        both = [at for key, at in self.fixed.items() if key in self.written]
        buffers = [at.path for at in self.written.values() if persistence(at.holder, at.name) is not None]
        return [*buffers, *(at.path for at in both if can_be_input(at.seen) and at.path not in self._plan.unfollowed)]


def persistence(holder: Any, name: str) -> bool | None:
    """Return whether an attribute is a persistent buffer; None where it is no buffer."""
    if not isinstance(holder, nn.Module) or name not in holder._buffers:
        return None
    return name not in holder._non_persistent_buffers_set


class AttributeReads:
    """An observer that notes what a run reads, for graphs that are not recorded.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.active = True
        self.unwatched: Callable[[], AbstractContextManager[None]] = nullcontext
        self.found: dict[Key, Read] = {}
        self._known = KnownObjects(model)

    def paused(self) -> AbstractContextManager[None]:
        """Do nothing: nothing but reads is noted."""
        return nullcontext()

    def read_attribute(self, holder: Any, name: str, value: Any) -> Any:
        """Note a read; see ``AttributeObserver``."""
        if self._known.knows(holder):
            self.found.setdefault((id(holder), name), replace(self._known.at(holder, name), seen=value))
        return value

    def read_object(self, holder: Any, name: str, value: Any) -> None:
        """Note an object; see ``AttributeObserver``."""
        self._known.holds(holder, name, value)

    def read_variable(self, at: Read, value: Any) -> None:
        """Note a variable outside of the model; see ``VariableObserver``."""
        self.found.setdefault((id(at.holder), at.name), replace(at, seen=value))
        if is_object(value):
            self._known.holds_outside(at, value)

    def left_alone(self, holder: Any) -> None:
        """Ignore assignments that cannot be seen, too."""

    def wrote_attribute(self, holder: Any, name: str) -> None:
        """Ignore an assignment; see ``AttributeObserver``. Verification compares what a run leaves."""


def reads_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Read, ...], tuple[str, ...]]:
    """Run a model once; return the attributes that its Python reads, and those that it changes. The model is left as it was."""
    reads = AttributeReads(model)
    own_args, own_kwargs = copied_arguments(args, kwargs)
    with preserved(model) as snapshot, snapshot.watching():
        with torch.enable_grad(), watching(model, reads, snapshot):
            model(*own_args, **own_kwargs)
        return tuple(reads.found.values()), changed_in_place(snapshot.changes(), ())


def changed_in_place(changes: Mapping[tuple[Any, str], str], writes: Sequence[Write]) -> tuple[str, ...]:
    """Return the attributes that a run changed, beside those that the graph leaves: what modules kept whole do is among it."""
    found = (
        f"self.{name}" if isinstance(holder, nn.Module) else name
        for (holder, _), names in changes.items()
        for name in names.split(", ")
    )
    left = {each.path for each in writes}
    return tuple(path for path in dict.fromkeys(found) if path not in left)
