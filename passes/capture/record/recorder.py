"""Records one run of a model: a torch function mode that writes every call into a graph."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from dnifx.passes.capture.model_state import Read
from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.anew import GENERATORS, FollowedGenerator, refuse_iterator
from dnifx.passes.capture.record.attributes import ModelAttributes
from dnifx.passes.capture.record.calls import in_region, write_call
from dnifx.passes.capture.record.draws import Draws
from dnifx.passes.capture.record.guards import Guards
from dnifx.passes.capture.record.hazards import model_line
from dnifx.passes.capture.record.node_values import NodeValue, Path
from dnifx.passes.capture.record.open_modules import OpenModules
from dnifx.passes.capture.record.plan import Plan, ancestry, is_made, made_path, runs_torch_alone
from dnifx.passes.capture.record.sizes import Number, SymbolicInt, plain, symbolic
from dnifx.passes.capture.record.state import Snapshot
from dnifx.passes.capture.record.structure import contents_of, gives_tensors, tensors_among, views_of
from dnifx.passes.capture.record.unseen import UnseenTensors
from dnifx.passes.capture.record.writer import Writer
from dnifx.passes.graph import RAGGED
from dnifx.runtime.emitted import ops
from dnifx.runtime.emitted.checkpoints import Region


class Recorder(TorchFunctionMode):
    """Writes a graph while a model runs.

    Args:
        model: The model.
        plan: Which modules are opened.
        snapshot: Is told of parameters that forward writes.
        imports: Modules that earlier runs tried to import.

    Attributes:
        writer: The graph.
        modules: The opened modules that are running, and what was found in them.
        unseen: Tensors that no torch function made.
        guards: The guards on what Python saw of tensors and sizes.
        leaking: Modules that another run has to open.
        interrupted: Whether an import removed the stand-ins for builtins, so that another run is needed.
        inside_leaf: The path of the module kept whole that is running, if one is.
        notes: How the graph differs from the model, in words.
        attributes: What Python read from the model's attributes and wrote there.
        draws: Records what gives another value in each call.
        unwatched: Looks at no functions within the block; a watch over variables sets it, since looking takes time.
        read_inside: The modules and parameters that the last function recorded as one call read by itself.
    """

    def __init__(self, model: nn.Module, plan: Plan, snapshot: Snapshot, imports: set[str]) -> None:
        super().__init__()
        self.writer = Writer(model, self, self._unknown, plan.varying)
        self.modules = OpenModules(model, plan, self.writer)
        self.unseen = UnseenTensors(self, snapshot)
        self.guards = Guards(self, self.writer, self.modules, self.unseen)
        self.active = False
        self.imports = imports
        self.interrupted = False
        self.inside_leaf: str | None = None
        self.unwatched: Callable[[], AbstractContextManager[None]] = nullcontext
        self.leaking: set[str] = set()
        self.notes: dict[str, None] = {}
        self.attributes = ModelAttributes(model, plan, self)
        self.modules.written = self.attributes.written
        self.draws = Draws(self, self.writer, self.modules, self.guards, plan)
        self._plan = plan
        self._opaque = 0
        self._untold = False
        self.read_inside: dict[str, None] = {}
        self._checkpoints = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing within the block."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function and write it down."""
        if self._untold:
            return func(*args, **kwargs or {})
        with nullcontext() if any(map(callable, (*args, *(kwargs or {}).values()))) else self.unwatched():
            if not self.active:
                if self._opaque:
                    self._look_into_opaque(args)
                return func(*args, **kwargs or {})
            self.active = False
            try:
                result = func(*args, **kwargs or {})
            finally:
                self.active = True
            return self._record(func, args, kwargs or {}, result)

    def _record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        name = functions.name_of(function)
        owner = getattr(function, "__self__", None)
        field = getattr(owner, "__name__", "") if name in ("__get__", "__set__", "__delete__") else ""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        asks = name in functions.METADATA and not isinstance(result, Tensor)  # x.type() asks, x.type(dtype) converts
        if asks or (name == "__get__" and field in functions.PROPERTIES):
            if field == "device" and first is not None and self.writer.knows(first):
                self.writer.remember_device(result, first)
            if name in functions.TEXTS and first is not None and self.writer.knows(first):
                self.draws.formatted = True
            if first is not None and (field == "requires_grad" or name == "is_contiguous"):
                self.attributes.asked[field if field == "requires_grad" else name] = None
            return result
        if name in functions.EFFECTS:
            self.modules.hazard(f"{name}() of a tensor, which acts by its effect", hard=True, effect=True)
            return result
        if field == "shape" or name in ("size", "stride", "__len__", "numel", "nelement"):
            return self.guards.size(name, args, kwargs, result)
        if name in functions.READS and not isinstance(result, Tensor):
            return self.guards.read(name, args, kwargs, result)
        self.draws.indexed(name, args)
        written = functions.writes(name, kwargs)
        if not written and not gives_tensors(result):
            return self.draws.repeated(function, args, kwargs) if result is None and first is not None else result
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.modules.hazard("a torch.func transform", hard=True)
        arguments = self.writer.argument(tuple(args)), self.writer.argument(dict(kwargs))
        node = write_call(self.writer, self.modules.regions, function, name, field, arguments)
        if functions.is_ragged(name, args):
            self.writer.ragged.add(node)
            node.meta[RAGGED] = True
        if name in ("__setitem__", "__set__"):
            self.writer.remember(args[0], NodeValue(node))
            return result
        if not written:
            result = self._with_own_identity(result, args, kwargs)
        self.writer.bind(result, node)
        self.guards.pieces(name, args, kwargs, node, result)
        return result

    def _with_own_identity(self, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Replace a result that is one of the arguments by a view of it, so that both keep their nodes."""
        with self.paused():
            return views_of(tensors_among((*args, *kwargs.values())), result)

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        """Python took a decision on numbers; see ``sizes.Owner``."""
        self.guards.compared(function, operands, value)

    def consumed(self, number: Number) -> None:
        """Python took the plain value of a number; see ``sizes.Owner``."""
        self.guards.consumed(number)

    def formatted(self, number: Number) -> None:
        """Python made a text of a number; see ``sizes.Owner``."""
        self.draws.formatted = self.draws.formatted or number.expression.data
        if isinstance(number, SymbolicInt) and self.writer.number(number) in self.writer.drawn:
            self.guards.consumed(number)  # the name of an attribute, or the key of a dict

    def _unknown(self, tensor: Tensor) -> Tensor:
        """Return what the graph reads for a tensor that it did not make, and note what is wrong with that."""
        leaf = self.unseen.maker(tensor)
        if leaf is not None:
            self.leaking.add(leaf)
            return tensor
        unseen = self.unseen.find(tensor)
        if unseen is not None and unseen.constant:
            return tensor.detach().clone()
        if unseen is not None:
            self.modules.hazard(f"{unseen.operation}, which no torch function shows", hard=True)
        elif tensor.grad_fn is not None:
            self.modules.hazard("a tensor that carries gradient from outside this call", hard=True)
        return tensor

    def read_attribute(self, holder: Any, name: str, value: Any) -> Any:
        """Python reads an attribute; see ``attribute_watch.AttributeObserver``."""
        if not self.active:
            return value
        refuse_iterator(self.attributes.known, holder, name, value)
        seen = self.attributes.read(holder, name, value)
        return FollowedGenerator(value, self.draws) if isinstance(value, GENERATORS) else seen

    def read_variable(self, at: Read, value: Any) -> None:
        """A function names a variable outside of the model; see ``outside.VariableObserver``."""
        followed = FollowedGenerator(value, self.draws) if isinstance(value, GENERATORS) else value
        self.attributes.read_variable(at, value, followed)

    def read_object(self, holder: Any, name: str, value: Any) -> None:
        """Python reads an attribute that is an object; see ``attribute_watch.AttributeObserver``."""
        if self.active:
            refuse_iterator(self.attributes.known, holder, name, value)
            self.attributes.holds(holder, name, value)

    def left_alone(self, holder: Any) -> None:
        """Assignments to an object cannot be seen; see ``attribute_watch.AttributeObserver``."""
        if self.active and self.attributes.known.knows(holder) and hasattr(holder, "__dict__"):
            self.attributes.unshown.append((holder, dict(vars(holder))))

    def wrote_attribute(self, holder: Any, name: str) -> None:
        """Python assigns an attribute; see ``attribute_watch.AttributeObserver``."""
        if self.active:
            self.attributes.wrote(holder, name)

    def imported(self, name: str) -> None:
        """The model imports a module; see ``interpose.Observer``."""
        self.imports.add(name)
        self.interrupted = True

    def called_module(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module is called; see ``interpose.Observer``."""
        path = self.modules.paths.get(id(module))
        if not self.active:
            if self._opaque and path is not None:
                self.read_inside.setdefault(path)
            return call(module, *args, **kwargs)
        path = made_path(module) if path is None else path
        with self.unwatched():
            is_leaf = self._is_leaf(path, module)
            if is_leaf and runs_torch_alone(module) and not is_made(path):
                return self._leaf(call, module, path, args, kwargs, torch_alone=True)
        if is_leaf and not is_made(path):
            return self._leaf(call, module, path, args, kwargs)
        if is_leaf:
            return self._opaque_call(lambda *a, **k: call(module, *a, **k), ops.call, (module,), args, kwargs)
        self.modules.enter(module, path)
        try:
            result = call(module, *args, **kwargs)
            self.guards.settle()
            return result
        finally:
            self.modules.leave()

    def _is_leaf(self, path: str, module: nn.Module) -> bool:
        """Whether a call is one node: not where a module runs with others' parameters (torch.func.functional_call)."""
        self.active = False
        try:
            opened = bool(self.modules.regions) and self._plan.may_open(path, module)
            own = all(id(each) in self.writer.owned for each in module._parameters.values() if each is not None)
            return own and not opened and self._plan.is_leaf(path, module)
        finally:
            self.active = True

    def _leaf(
        self,
        call: Callable[..., Any],
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        torch_alone: bool = False,
    ) -> Any:
        """Run a module as one node; within one that runs ``torch_alone`` there is nothing to look at."""
        items, named = self.writer.argument(tuple(args)), self.writer.argument(dict(kwargs))
        before = self._versions(args, kwargs)
        whole = path in self._plan.whole
        if whole:
            self.modules.note_draws(model_line)
        held = () if torch_alone else contents_of((args, kwargs))
        self.active, self.inside_leaf, self._untold = False, path, torch_alone
        try:
            result = call(module, *map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
            result = views_of(dict(before.items() & self._versions(args, kwargs).items()), result)
        finally:
            self.active, self.inside_leaf, self._untold = True, None, False
        if not torch_alone and contents_of((args, kwargs)) != held:
            self.leaking.add(path)
        if whole:
            self.modules.forget_draws()
        node = self.writer.add("call_module", path, items, named)
        number = self.modules.count(path)
        node.meta.pop("call", None)
        if number:
            node.meta["call"] = number
        if self.modules.regions:
            self.modules.hazard(f"an autocast region around {path!r}")
        result = self._numbers(result, node, ())
        self.writer.bind(result, node)
        if not torch.is_grad_enabled():
            self.writer.detach(result)
        return result

    def _versions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, int]:
        """Return how often torch saw each of the tensors that a call is given being written."""
        self._untold = True
        try:
            given = (item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
            return {id(item): item._version for item in given if not item.is_inference()}
        finally:
            self._untold = False

    def _numbers(self, result: Any, node: fx.Node, path: Path) -> Any:
        """Make the numbers in a module's output symbolic, since another call may give others."""
        if isinstance(result, bool):
            self.guards.equal(self.writer.node_of(NodeValue(node, path)), result)
            return result
        if type(result) in (int, float):
            return symbolic(result, self, None, (NodeValue(node, path), None, ""), False)
        if type(result) in (list, tuple, torch.Size):
            parts = [self._numbers(part, node, (*path, ("item", index))) for index, part in enumerate(result)]
            return type(result)(parts)
        if type(result) is dict:
            return {key: self._numbers(part, node, (*path, ("item", key))) for key, part in result.items()}
        if is_dataclass(result) and not isinstance(result, type | Mapping):
            for name, part in list(vars(result).items()):
                object.__setattr__(result, name, self._numbers(part, node, (*path, ("attribute", name))))
        return result

    def called_function(
        self, call: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function, or one of TorchScript, which detaches what it is given; see ``interpose.Observer``."""
        if isinstance(kind, type) and kind.__name__ == "CheckpointFunction":
            return self._dissolve_checkpoint(*args)
        target = ops.apply_function if isinstance(kind, type) else ops.call_anew
        return self._opaque_call(lambda *a, **k: call(kind, *a, **k), target, (kind,), args, kwargs)

    def _dissolve_checkpoint(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Record what a reentrant checkpoint runs; it passes gradient only where an argument asks for one."""
        needed = any(isinstance(item, Tensor) and item.requires_grad for item in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needed), self.checkpoint(preserve, False, False):
            return function(*args)

    def checkpoint(self, preserve: bool, early_stop: bool, chooses: bool) -> AbstractContextManager[None]:
        """Mark what is run under a checkpoint; see ``interpose.Observer``."""
        if not torch.is_grad_enabled():
            return nullcontext()
        self._checkpoints += 1
        if chooses:
            note = f"the context_fn of the checkpoint at {model_line()} is ignored: all of it is computed again"
            self.notes[note] = None
        return self.writer.checkpointed(Region(self._checkpoints, model_line(), preserve, early_stop))

    def called_vmap(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A vmapped function is called; see ``interpose.Observer``."""
        function, *options = args[:5]
        run = lambda *rest, **named: call(function, *options, *rest, **named)  # noqa: E731
        return self._opaque_call(run, ops.vmapped, (function, tuple(options)), args[5:], kwargs)

    def _opaque_call(
        self, run: Callable[..., Any], target: Any, head: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call as one node, whatever it does inside."""
        result, node = self.opaque_node(run, target, head, args, kwargs)
        self.writer.bind(result, node)
        return result

    def opaque_node(
        self, run: Callable[..., Any], target: Any, head: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, fx.Node]:
        """Run a call and write it as one node; return its result, which is not bound yet, and the node."""
        fixed = target is ops.call_anew or isinstance(head[0], type | nn.Module)
        first = self.writer.constant(head[0]) if fixed else self.writer.argument(head[0])
        rest = self.writer.argument((*head[1:], *args))
        named = self.writer.argument(dict(kwargs))
        self.active, self._opaque, self.read_inside = False, self._opaque + 1, {}
        try:
            result = run(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
        finally:
            self.active, self._opaque = True, self._opaque - 1
        result = self._with_own_identity(result, args, kwargs)
        name = functions.name_of(head[0] if fixed and not isinstance(head[0], nn.Module) else type(head[0])).strip("_")
        call = self._with_reads(target, (first, *rest), named)
        return result, in_region(self.writer, self.modules.regions, "call_function", *call, name)

    def _with_reads(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Let a call read what its function reads by itself, the outermost modules and parameters, so that its partition owns them."""
        given = {node.target for node in self.writer.nodes_in((args, kwargs)) if node.op == "get_attr"}
        found = {path for path in self.read_inside if path in self.writer.parameters or self.modules.has_state(path)}
        reads = [path for path in self.read_inside if path in found and not found & set(ancestry(path)[1:-1])]
        nodes = tuple(self.writer.add("get_attr", path) for path in reads if not given & set(ancestry(path)))
        return (
            (ops.reading, ((nodes, self.writer.constant(target), *args), kwargs)) if nodes else (target, (args, kwargs))
        )

    def _look_into_opaque(self, args: tuple[Any, ...]) -> None:
        """Note the parameters that a function recorded as one call reads by itself."""
        for item in args:
            path = self.writer.owned.get(id(item)) if isinstance(item, Tensor) else None
            if path in self.writer.parameters:
                self.read_inside.setdefault(path)

    def entered_autocast(self, region: torch.autocast) -> None:
        """The model opens an autocast region; see ``interpose.Observer``."""
        if self.active and self.modules.calls:
            self.modules.calls[-1].regions.append((region.device, region.fast_dtype, bool(region._enabled)))

    def left_autocast(self) -> None:
        """The model closes its innermost autocast region; see ``interpose.Observer``."""
        if self.active and self.modules.calls and self.modules.calls[-1].regions:
            self.modules.calls[-1].regions.pop()
