"""Optimizers and learning-rate schedulers by partition and boundary: made, and checked for full coverage."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dnifx.errors import OptimizerError, nearest
from dnifx.ir import Interface, Program, Recurrence

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
OptimizerSpec = MakeOptimizer | Mapping[str, MakeOptimizer]
SchedulerSpec = Callable[[Optimizer], LRScheduler] | Mapping[str, Callable[[Optimizer], LRScheduler]]


def fitted_parameters(interface: Interface) -> list[nn.Parameter]:
    """Return the parameters that one boundary's fit trains: the estimator's, and the input model's."""
    models = [interface.estimator] if interface.fits else []
    models += [interface.input_model] if interface.input_model is not None else []
    return [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]


def shared_callable(spec: OptimizerSpec) -> OptimizerSpec:
    """Return what makes the estimators' optimizers when nothing is said of them."""
    return next(iter(spec.values())) if isinstance(spec, Mapping) else spec


def make_optimizers(
    spec: OptimizerSpec, groups: Mapping[str, list[nn.Parameter]], argument: str
) -> dict[str, Optimizer]:
    """Make one optimizer a group; a mapping has to name every group and no other.

    Raises:
        OptimizerError: It does not, or what it gives is no optimizer.
    """
    makers = cover(spec, groups, argument)
    optimizers = {name: makers[name](parameters) for name, parameters in groups.items()}
    for name, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise OptimizerError(
                f"{argument}= gave {type(optimizer).__name__} for {name}; give a callable from parameters to an optimizer, "
                "such as lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
            )
    return optimizers


def make_schedulers(
    spec: SchedulerSpec | None, every: Mapping[str, Optimizer], partitions: Mapping[str, Optimizer]
) -> dict[str, LRScheduler]:
    """Make one learning-rate scheduler an optimizer; a mapping names the partitions, and estimators if it likes."""
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        return {name: spec(optimizer) for name, optimizer in every.items()}
    chosen = {name: item for name, item in every.items() if name in partitions or name in spec}
    makers = cover(spec, chosen, "lr_scheduler")
    return {name: makers[name](optimizer) for name, optimizer in chosen.items()}


def cover(spec: Any, groups: Mapping[str, Any], argument: str) -> Mapping[str, Any]:
    """Return one callable a group.

    Raises:
        OptimizerError: A mapping leaves a group out or names one that is not there.
    """
    if not isinstance(spec, Mapping):
        if not callable(spec):
            raise OptimizerError(f"{argument}={spec!r}: give a callable, or a mapping from names to callables")
        return dict.fromkeys(groups, spec)
    missing = [name for name in groups if name not in spec]
    unknown = [name for name in spec if name not in groups]
    if missing or unknown:
        raise OptimizerError(
            f"{argument}= does not cover its groups exactly: missing {nearest('', missing, 10)}, unknown "
            f"{nearest('', unknown, 10)}; the groups are {nearest('', groups, 50)}"
        )
    return spec


def advance(schedulers: Iterable[LRScheduler]) -> None:
    """Step learning-rate schedulers, also those of partitions that a schedule has not let update yet, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in schedulers:
            scheduler.step()


def fitted_in_time(each: Recurrence) -> list[nn.Parameter]:
    """Return the parameters that the fit at a cut in time trains: the estimator's, and the auxiliary head's."""
    own = fitted_parameters(each.interface) if each.interface is not None else []
    return own + (list(each.head.parameters()) if each.head is not None and own else [])


def fitted_groups(program: Program, recurrences: Sequence[Recurrence]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that each fit trains, by boundary key: those of boundaries, then those of boundaries in time."""
    pairs = zip(program.boundaries, program.interfaces, strict=True)
    groups = {boundary.key: fitted_parameters(interface) for boundary, interface in pairs}
    groups.update((each.key, fitted_in_time(each)) for each in recurrences)
    return {key: parameters for key, parameters in groups.items() if parameters}
