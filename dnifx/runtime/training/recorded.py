"""Steps that are recorded as CUDA graphs: what their Python reads, and what cannot be recorded."""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dnifx.engines.base import Engine
from dnifx.errors import OptimizerError, ScheduleError
from dnifx.ir import Program
from dnifx.runtime.emitted.ops import guard, guard_length
from dnifx.runtime.net.input_kinds import SIZES_ALONE
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.own_losses import OwnLosses
from dnifx.runtime.training.updates import Update, UpdateOptions


def python_reads(
    net: Net, schedule: Any, updates: Mapping[str, Update], own_losses: OwnLosses, call: tuple[Any, ...]
) -> Hashable:
    """Return what decides what the Python of a step does, beside the batch.

    Args:
        net: The net.
        schedule: What the step runs.
        updates: Its optimizers.
        own_losses: The weights of own losses.
        call: The positional and the keyword inputs, and whether the step compares.
    """
    args, kwargs, diagnose = call
    signature = net.program.signature
    mode = None if signature is None else signature.key(args, kwargs)
    learning = tuple([each.requires_grad for each in net.parameters()])
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    optimizers = tuple(options_of(each.optimizer) for each in updates.values())
    return schedule, diagnose, mode, learning, autocast, optimizers, tuple(own_losses.items())


def options_of(optimizer: Optimizer) -> Hashable:
    """Return the options of an optimizer's groups, and which tensors it writes."""
    options = tuple(
        (name, id(value) if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name not in ("params", "param_names")
    )
    written = tuple(each.data_ptr() for group in optimizer.param_groups for each in group["params"])
    return options, written, id(optimizer.state)


def refuse_unrecorded(
    engine: Engine, program: Program, lag: int, optimizers: Mapping[str, Optimizer], options: UpdateOptions
) -> None:
    """Refuse what cannot be recorded as a CUDA graph, where the engine does so.

    Raises:
        ScheduleError: Python does something else in each step.
        OptimizerError: An optimizer keeps numbers on the host.
    """
    if not engine.captures:
        return
    reason = next(reasons(program, lag, options), None)
    if reason is not None:
        raise ScheduleError(
            f"engine='cuda-graph' records a step once and replays it without Python, but {reason}. Leave engine= out, to run each step as "
            "it comes"
        )
    for name, optimizer in optimizers.items():
        groups = optimizer.param_groups
        if type(optimizer) is not SGD and not all(group.get("capturable") for group in groups):
            kind = type(optimizer).__name__
            raise OptimizerError(
                f"engine='cuda-graph' replays the updates of {name} without Python, but {kind} counts its steps on the host. Give "
                f"torch.optim.{kind}(parameters, capturable=True), or SGD, or leave engine= out"
            )


def reasons(program: Program, lag: int, options: UpdateOptions) -> Iterator[str]:
    """Return why the steps of a program are not all alike for Python."""
    signature, capture = program.signature, program.capture
    if lag or any(each.late for each in program.interfaces):
        yield "what is kept for late targets changes from step to step (lag=, Late)"
    if program.parts:
        yield "the net has several rates (every=)"
    if program.recurrences or program.carries:
        yield "a state is carried from window to window"
    if options.accumulate > 1:
        yield f"accumulate={options.accumulate} updates in some steps alone"
    if options.scaling is not None:
        yield "a gradient scaler keeps its state on the host"
    if options.total is not None:
        yield "gradients are averaged over processes"
    if capture is not None and capture.steered:
        yield f"a draw decides what forward does ({capture.steered[0]})"
    if capture is not None and capture.kept:
        yield f"{capture.kept[0].path!r} is kept whole ({capture.kept[0].reason}), and what its Python reads is not known"
    for node in program.graph.nodes if program.graph is not None else ():
        if node.op == "call_function" and node.target in (guard, guard_length) and SIZES_ALONE not in node.meta:
            yield f"Python reads a value in forward ({node.args[-1]})"
    if signature is not None and (signature.varying or signature.changed or signature.left):
        names = [*signature.varying, *signature.changed, *signature.left_at]
        yield f"forward reads or changes what the model keeps in Python ({', '.join(names[:3])})"
