"""Training steps as functions: generated once for each input kind and schedule, compiled, and given what they call."""

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from dnifx.engines.base import Engine
from dnifx.ir import Program, Schedule
from dnifx.runtime.emitted.backward import (
    apply_gradients,
    backpropagate,
    detached_at,
    give_gradient,
    take_gradients,
    take_values,
)
from dnifx.runtime.emitted.exact import advance_trace, attach_trace, begin_trace
from dnifx.runtime.emitted.fitting import (
    arrived,
    compare,
    count_only,
    fit_gradient,
    output_error,
    per_example,
    propagated,
)
from dnifx.runtime.emitted.parameter_gradients import keeping_weights, parameter_cosine
from dnifx.runtime.emitted.windows import auxiliary_fit, by_example, window_gradients, window_targets, without_rows
from dnifx.runtime.net.attach import on_device
from dnifx.runtime.net.captured import CapturedPart
from dnifx.runtime.net.input_kinds import InputKind
from dnifx.runtime.net.net import Emitters
from dnifx.runtime.training.late import fit_late, summed
from dnifx.runtime.training.own_losses import OwnLosses, with_own_losses
from dnifx.runtime.training.ownership import Ownership
from dnifx.runtime.training.refusals import places_of, refuse_idle, refuse_other_sharing, refuse_replaced
from dnifx.runtime.training.shards import Shards
from dnifx.runtime.training.together import Together
from dnifx.runtime.training.traces import extend_trace, fit_by_trace, pass_on, window_jacobian

Step = Callable[..., Any]
STEP_GLOBALS = {
    "torch": torch,
    "advance_trace": advance_trace,
    "apply_gradients": apply_gradients,
    "arrived": arrived,
    "attach_trace": attach_trace,
    "auxiliary_fit": auxiliary_fit,
    "backpropagate": backpropagate,
    "begin_trace": begin_trace,
    "by_example": by_example,
    "compare": compare,
    "count_only": count_only,
    "detached_at": detached_at,
    "extend_trace": extend_trace,
    "fit_by_trace": fit_by_trace,
    "fit_gradient": fit_gradient,
    "fit_late": fit_late,
    "give_gradient": give_gradient,
    "keeping_weights": keeping_weights,
    "output_error": output_error,
    "parameter_cosine": parameter_cosine,
    "pass_on": pass_on,
    "per_example": per_example,
    "propagated": propagated,
    "summed": summed,
    "take_gradients": take_gradients,
    "take_values": take_values,
    "window_gradients": window_gradients,
    "window_jacobian": window_jacobian,
    "window_targets": window_targets,
    "without_rows": without_rows,
}
KEPT_STEPS = 256


@dataclass
class Steps:
    """The compiled steps of a part.

    Attributes:
        part: The part.
        emitters: What writes their source.
        shared: What the steps of all input kinds call by name: optimizers, the loss, the context's features.
        ownership: Lets the optimizers update what only another input kind trains.
        engine: Says which partitions run here.
        cast: From a function to one that runs under autocast, where the trainer does.
        scaled: Whether the backward passes are those of a multiple of the loss.
        joined: Whether updates may wait, to be made together.
        own_losses: What partitions train themselves of what they leave on the model.
        shards: The weights that are sharded over replicas, or None.
    """

    part: CapturedPart
    emitters: Emitters
    shared: Mapping[str, Any]
    ownership: Ownership
    engine: Engine
    cast: Callable[[Any], Any]
    scaled: bool = False
    joined: bool = False
    own_losses: OwnLosses = field(default_factory=dict)
    shards: Shards | None = None
    _functions: dict[tuple[int, Schedule, bool], Step] = field(default_factory=dict)
    _evaluations: dict[int, Step] = field(default_factory=dict)
    _probes: dict[tuple[int, bool], Step] = field(default_factory=dict)
    _names: dict[int, SimpleNamespace] = field(default_factory=dict)
    _latest: tuple[InputKind, Schedule, bool, Step] | None = None
    _learning: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        self._parameters = tuple(self.part.net.parameters())
        self._places = places_of(self.part.net)

    def training(self, input_kind: InputKind, schedule: Schedule, diagnose: bool, late: bool = False) -> Step:
        """Return the function of a schedule in an input kind, generated once; the run may read tied parameters late.

        Raises:
            InputError: It would train parameters that no optimizer of their partition can hold.
            LossError: A partition leaves something for the loss that nobody named.
            PlaceError: Partitions in several places share other parameters there.
        """
        self.notice()
        latest = self._latest  # a schedule that stays is the same object: nothing of it has to be hashed
        if latest and latest[0] is input_kind and latest[1] is schedule and latest[2] is diagnose:
            return latest[3]
        key = (input_kind.number, schedule, diagnose)
        if key not in self._functions:
            self.ownership.admit(input_kind.program)
            several = range(len(input_kind.program.partitions)) if late else self.engine.ranks
            if several:
                refuse_other_sharing(self.part.program, input_kind.program, several)
            if self.shards is not None:
                self.shards.admit(input_kind.program)
            self.engine.settle(input_kind.program)
            program = with_own_losses(input_kind.program, self.own_losses)
            if len(self._functions) >= KEPT_STEPS:
                self._functions.pop(next(iter(self._functions)))
            options = (
                self.part.mean,
                diagnose,
                self.ranks,
                self.engine.rank,
                self.scaled,
                self.joined,
                self.engine.named,
                self.engine.captures,
            )
            source = self.emitters.step(program, schedule, *options)
            self._functions[key] = compile_step(source)
        self._latest = input_kind, schedule, diagnose, self._functions[key]
        return self._functions[key]

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: not the functions, which are generated anew."""
        return {**self.__dict__, "_functions": {}, "_evaluations": {}, "_probes": {}, "_names": {}, "_latest": None}

    def notice(self) -> None:
        """Drop the functions where parameters were frozen or unfrozen since: they are written for what learns.

        Raises:
            StateError: An estimator was frozen, or a parameter was replaced.
        """
        refuse_replaced(self._places, self.shards.leaf if self.shards is not None else None)
        learning = tuple([each.requires_grad for each in self._parameters])
        if learning != self._learning:
            refuse_idle(self.part.program)
            self._learning, self._latest = learning, None
            self._functions.clear()
            self._probes.clear()
            self._evaluations.clear()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each partition, or the number of its place in this process; empty where there is one place."""
        return self.engine.ranks or self.engine.places

    def evaluating(self, input_kind: InputKind) -> Step:
        """Return the function of a forward pass over the ranks in an input kind, generated once.

        Raises:
            PlaceError: The model is cut otherwise there.
        """
        if input_kind.number not in self._evaluations:
            source = self.emitters.evaluation(input_kind.program, self.ranks, self.engine.rank, self.engine.named)
            self.engine.settle(input_kind.program)
            self._evaluations[input_kind.number] = compile_step(source)
        return self._evaluations[input_kind.number]

    def probing(self, input_kind: InputKind, true: bool) -> Step:
        """Return the function of a probe in an input kind, against true gradients or targets, generated once."""
        self.notice()
        key = (input_kind.number, true)
        if key not in self._probes:
            program = with_own_losses(input_kind.program, self.own_losses)
            self._probes[key] = compile_step(self.emitters.probe(program, self.part.mean, true))
        return self._probes[key]

    def in_place(self, partition: int, module: fx.GraphModule) -> fx.GraphModule:
        """Return the graph of a partition, which names the device of its place."""
        home, device = self.engine.home, self.engine.device_of(partition)
        return module if home is None or device is None else on_device(module, home, device)

    def names(self, input_kind: InputKind) -> SimpleNamespace:
        """Return what the functions of an input kind call by name, gathered once."""
        if input_kind.number not in self._names:
            modules = [self.in_place(*each) for each in enumerate(input_kind.submodules)]
            calls: list[Callable[..., Any]] = [each.forward for each in modules]
            if self.shards is not None:
                calls = [self.shards.around(*each) for each in enumerate(calls)]
            names = called_by_name(self.part.program, input_kind, self.shared, self.cast, modules, calls)
            self._names[input_kind.number] = names
        return self._names[input_kind.number]


def called_by_name(
    program: Program,
    input_kind: InputKind,
    shared: Mapping[str, Any],
    cast: Callable[[Any], Any],
    modules: Sequence[nn.Module],
    calls: Sequence[Callable[..., Any]],
) -> SimpleNamespace:
    """Return what generated functions call by name: partitions, estimators, input models, and what is shared.

    ``calls`` are what runs the partitions, whose graphs are ``modules``.
    """
    names = SimpleNamespace(**shared, unflatten=input_kind.finish)
    names.modules = {}
    for partition, module, call in zip(input_kind.program.partitions, modules, calls, strict=True):
        setattr(names, partition.name, cast(call))
        names.modules[partition.name] = module
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        setattr(names, f"estimate_{boundary.key}", cast(interface.estimator))
        setattr(names, f"imagine_{boundary.key}", cast(interface.input_model))
        setattr(names, f"suffix_{boundary.key}", interface.estimator)
    estimators = {each.key: one.estimator for each, one in zip(program.boundaries, program.interfaces, strict=True)}
    names.together = cast(Together(estimators))
    for each in program.recurrences:
        setattr(names, f"estimate_{each.key}", cast(each.interface.estimator) if each.interface else None)
        setattr(names, f"head_{each.key}", cast(each.head))
    for each in input_kind.program.recurrences:
        setattr(names, f"rule_{each.key}", each.exact)
    return names


def compile_step(source: str) -> Step:
    """Compile the source of a step; tracebacks show its lines."""
    name = f"<dnifx step {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = dict(STEP_GLOBALS)
    exec(compile(source, name, "exec"), namespace)
    function: Step = namespace["step"]
    return function
