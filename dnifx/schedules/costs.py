"""What each action costs, from what the passes measured or from what the user gives."""

from collections.abc import Iterable, Mapping

from torch import nn

from dnifx.errors import ScheduleError, nearest
from dnifx.ir import Action, Boundary, Interface, Kind, Partition, Program, TensorSpec
from dnifx.schedules.dependencies import links, timed
from dnifx.schedules.language import unplaced
from dnifx.schedules.orders import chosen_actions, whole_step

BACKWARD_TO_FORWARD = 2
UPDATE_FLOPS = 10
ELEMENT_BYTES = 4


def measured_costs(program: Program) -> dict[Action, float]:
    """Return the cost of each action in floating-point operations.

    Forward: the FLOPs measured, and one for each element made. Backward: twice that. An estimator or input model: two
    FLOPs for each parameter and position (an example, a token, a pixel), which is what linear and size-preserving
    convolutional layers do; fitting: twice that, and its update. An update: ten FLOPs a parameter, as Adam's. A target
    costs nothing. Where consumers take several messages at once, the fit asks the estimator again, for all of them.

    Args:
        program: A program with partitions, boundaries and interfaces.
    """
    interfaces = {interface.boundary: interface for interface in program.interfaces}
    wiring = links(program)
    actions = chosen_actions(whole_step(wiring, diagnose=True), wiring)
    return {action: _cost(action, program, interfaces) for action in actions}


def _cost(action: Action, program: Program, interfaces: Mapping[int, Interface]) -> float:
    if action.kind in (Kind.SYNTHESISE, Kind.FIT, Kind.TARGET):
        place = action.index - len(program.boundaries)
        if place >= 0:
            each = timed(program)[place]
            boundary = Boundary(action.index, each.name, each.producer, each.consumers, each.values, each.specs)
            return _interface_cost(action.kind, boundary, each.interface) if each.interface is not None else 0.0
        return _interface_cost(action.kind, program.boundaries[action.index], interfaces[action.index])
    partition = program.partitions[action.index]
    if action.kind is Kind.INPUT:
        consumed = [boundary for boundary in program.boundaries if action.index in boundary.consumers]
        models = ((interfaces[boundary.index].input_model, boundary.specs) for boundary in consumed)
        return sum(_run(model, specs) for model, specs in models if model is not None)
    if action.kind is Kind.UPDATE:
        return UPDATE_FLOPS * partition.parameter_bytes / ELEMENT_BYTES
    return _forward(partition) * (BACKWARD_TO_FORWARD if action.kind is Kind.BACKWARD else 1)


def _forward(partition: Partition) -> float:
    return partition.flops + partition.activation_bytes / ELEMENT_BYTES


def _interface_cost(kind: Kind, boundary: Boundary, interface: Interface) -> float:
    if kind is Kind.SYNTHESISE:
        return _run(interface.estimator, boundary.specs)
    if kind is Kind.TARGET:
        return 0.0
    learners = [interface.estimator] if interface.fits else []
    learners += [] if interface.input_model is None else [interface.input_model]
    passes = BACKWARD_TO_FORWARD if boundary.messages == 1 else boundary.messages * (1 + BACKWARD_TO_FORWARD)
    return sum(passes * _run(learner, boundary.specs) + UPDATE_FLOPS * _parameters(learner) for learner in learners)


def _run(model: nn.Module, specs: Iterable[TensorSpec]) -> float:
    """FLOPs of one run over the boundary's values: one for each element if the model has no parameters."""
    values = tuple(specs)
    positions = max((spec.elements // _features(spec) for spec in values), default=1)
    return 2.0 * _parameters(model) * positions or float(sum(spec.elements for spec in values))


def _features(spec: TensorSpec) -> int:
    """Elements that one run of the model takes at once: the channels of an image, else the last dimension."""
    return max(1, spec.shape[1] if spec.is_image else spec.shape[-1] if spec.shape else 1)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def given_costs(costs: Mapping[str, float], actions: Iterable[Action]) -> dict[Action, float]:
    """Return costs that a user gave by action (``{"F0": 0.1}``, in seconds) for the actions of a schedule.

    Raises:
        ScheduleError: An action has no cost, a cost is negative or no number, or a name is no action of the schedule.
    """
    wanted = {str(unplaced(action)): unplaced(action) for action in actions}
    lacking, strange = sorted(wanted.keys() - costs.keys()), sorted(costs.keys() - wanted.keys())
    if lacking:
        raise ScheduleError(
            f"No cost was given for {', '.join(lacking)}. Give the seconds of every action of the schedule."
        )
    if strange:
        raise ScheduleError(
            f"A cost was given for {strange[0]!r}, which the schedule does not run; "
            f"nearest: {nearest(strange[0], wanted)}."
        )
    wrong = [name for name, cost in costs.items() if not cost >= 0]
    if wrong:
        raise ScheduleError(f"The cost of {wrong[0]} is {costs[wrong[0]]}; expected seconds, zero or more.")
    return {action: float(costs[name]) for name, action in wanted.items()}
