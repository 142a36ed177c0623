"""Optimizers and learning-rate schedulers by partition and boundary: made, and checked for full coverage."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dnifx.errors import OptimizerError, nearest
from dnifx.ir import Interface, Program, Recurrence
from dnifx.runtime.training.optimizer_set import OptimizerSet

MakeOptimizer = Callable[[Any], Optimizer | Sequence[Optimizer]]
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


class OptimizedParameters(list[nn.Parameter]):
    """The parameters of one optimizer, as the callable that makes it receives them.

    Attributes:
        named: Pairs of name and parameter, for an optimizer that groups them by name, or keeps their names.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.named = list(named)
        super().__init__(parameter for _, parameter in self.named)


def with_names(groups: Mapping[str, Sequence[nn.Parameter]], net: nn.Module) -> dict[str, OptimizedParameters]:
    """Return groups of parameters with their names in the net."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {key: OptimizedParameters((names[each], each) for each in group) for key, group in groups.items()}


def make_optimizers(
    spec: OptimizerSpec, groups: Mapping[str, OptimizedParameters], argument: str
) -> dict[str, Optimizer]:
    """Make one optimizer a group; a mapping has to name every group and no other.

    Raises:
        OptimizerError: It does not, or what it gives is no optimizer of these parameters.
    """
    makers = cover(spec, groups, argument)
    optimizers: dict[str, Optimizer] = {}
    for name, parameters in groups.items():
        made = call(makers[name], parameters, argument, name)
        several = isinstance(made, list | tuple) and len(made) > 0
        for each in made if several else [made]:
            check_kind(each, argument, name)
        optimizers[name] = OptimizerSet(made) if several else made
        check_parameters(optimizers[name], parameters, argument, name)
    return optimizers


def call(maker: Callable[[Any], Any], given: Any, argument: str, name: str) -> Any:
    """Call what makes an optimizer or a scheduler.

    Raises:
        OptimizerError: It fails.
    """
    try:
        return maker(given)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise OptimizerError(
            f"{argument}= failed for {name}: {type(error).__name__}: {error}; {MAKERS[argument == 'lr_scheduler']}"
        ) from error


MAKERS = (
    "give a callable from parameters to an optimizer, such as lambda parameters: torch.optim.Adam(parameters, lr=1e-3)",
    "give a callable from an optimizer to a scheduler, such as lambda optimizer: StepLR(optimizer, 1000)",
)


def check_kind(made: Any, argument: str, name: str) -> None:
    """Raise OptimizerError where something is no optimizer that a training step can call."""
    if not isinstance(made, Optimizer):
        raise OptimizerError(f"{argument}= gave {type(made).__name__} for {name}; {MAKERS[0]}")
    if requires_argument(type(made).step):
        raise OptimizerError(
            f"{argument}= gave {type(made).__name__} for {name}, whose step() computes the loss again through a closure. A training "
            "step computes it once: give an optimizer without a closure, such as torch.optim.Adam"
        )


def requires_argument(step: Callable[..., Any]) -> bool:
    """Whether a ``step`` cannot be called without an argument."""
    named = (each for each in inspect.signature(step).parameters.values() if each.name != "self")
    free = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return any(each.default is inspect.Parameter.empty and each.kind not in free for each in named)


def check_parameters(optimizer: Optimizer, parameters: OptimizedParameters, argument: str, name: str) -> None:
    """Raise OptimizerError where an optimizer does not hold each of its parameters once, and no other."""
    held = Counter(id(each) for group in optimizer.param_groups for each in group["params"])
    missing = [own for own, each in parameters.named if not held[id(each)]]
    twice = [own for own, each in parameters.named if held[id(each)] > 1]
    stray = len(held.keys() - {id(each) for each in parameters})
    found = [f"lacks {nearest('', missing, 3)}"] * bool(missing) + [f"holds {stray} that are not its own"] * bool(stray)
    found += [f"holds {nearest('', twice, 3)} twice"] * bool(twice)
    if found:
        raise OptimizerError(
            f"{argument}= gave an optimizer over other parameters than those of {name}: it {' and '.join(found)} (of "
            f"{len(parameters)}). Make it of the parameters that the callable is given, as lambda parameters: "
            "torch.optim.SGD(parameters, lr=0.1) does; freeze those that shall stay as they are before dnifx.decouple"
        )


def make_schedulers(
    spec: SchedulerSpec | None, every: Mapping[str, Optimizer], partitions: Mapping[str, Optimizer]
) -> dict[str, LRScheduler]:
    """Make one learning-rate scheduler an optimizer; a mapping names the partitions, and estimators if it likes.

    Raises:
        OptimizerError: It does not, or what it gives is no scheduler.
    """
    if spec is None:
        return {}
    chosen = every
    if isinstance(spec, Mapping):
        chosen = {name: item for name, item in every.items() if name in partitions or name in spec}
    makers = cover(spec, chosen, "lr_scheduler")
    made = {name: call(makers[name], optimizer, "lr_scheduler", name) for name, optimizer in chosen.items()}
    for name, scheduler in made.items():
        if not isinstance(scheduler, LRScheduler):
            raise OptimizerError(f"lr_scheduler= gave {type(scheduler).__name__} for {name}; {MAKERS[1]}")
    return made


def cover(spec: Any, groups: Mapping[str, Any], argument: str) -> Mapping[str, Any]:
    """Return one callable a group.

    Raises:
        OptimizerError: A mapping leaves a group out, names one that is not there, or gives something that cannot be called.
    """
    if not isinstance(spec, Mapping):
        if not callable(spec):
            given = type(spec).__name__ if isinstance(spec, Optimizer | LRScheduler) else repr(spec)
            raise OptimizerError(f"{argument}={given}: give a callable, or a mapping from names to callables")
        return dict.fromkeys(groups, spec)
    missing = [name for name in groups if name not in spec]
    unknown = [str(name) for name in spec if name not in groups]
    if missing or unknown:
        raise OptimizerError(
            f"{argument}= does not cover its groups exactly: missing {nearest('', missing, 10)}, unknown "
            f"{nearest('', unknown, 10)}; the groups are {nearest('', groups, 50)}"
        )
    for name, maker in spec.items():
        if not callable(maker):
            made = " that is made already" if isinstance(maker, Optimizer | LRScheduler) else ""
            raise OptimizerError(
                f"{argument}= gives {type(maker).__name__}{made} for {name}; {MAKERS[argument == 'lr_scheduler']}"
            )
    return spec


def advance(schedulers: Iterable[LRScheduler], metric: Any = None) -> None:
    """Step learning-rate schedulers, also those of partitions that have not updated yet and those of copies, of which torch warns.

    Args:
        schedulers: The schedulers.
        metric: What a scheduler that follows a measurement is stepped with (``ReduceLROnPlateau``); it waits where there is none.

    Raises:
        OptimizerError: One fails.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Detected call of `lr_scheduler.step|Seems like `optimizer.step)")
        for scheduler in schedulers:
            try:
                if not follows_metric(scheduler):
                    scheduler.step()
                elif metric is not None:
                    scheduler.step(metric)
            except (TypeError, ValueError) as error:
                raise OptimizerError(
                    f"lr_scheduler= failed in the step of {type(scheduler).__name__}: {type(error).__name__}: {error}. The updates of this "
                    "step are made. Give a scheduler for as many steps as are trained, and a number as metric="
                ) from error


def follows_metric(scheduler: LRScheduler) -> bool:
    """Whether a scheduler's step has to be given a measurement."""
    return requires_argument(type(scheduler).step)


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
