"""What each action costs: measured by the passes, or given by the user."""

from collections.abc import Iterable, Mapping

from torch import nn

from dnifx.errors import ScheduleError, nearest
from dnifx.ir import Action, Interface, Kind, Program, TensorSpec, count_parameters
from dnifx.schedules.dependencies import links, timed
from dnifx.schedules.language import on_partition, unplaced
from dnifx.schedules.orders import chosen_actions, whole_step

BACKWARD_TO_FORWARD = 2
UPDATE_FLOPS = 10
ELEMENT_BYTES = 4


def measured_costs(program: Program) -> dict[Action, float]:
    """Return the cost of each action in floating-point operations.

    - Forward: the measured FLOPs, and one for each element that is made. Backward: twice that.
    - Estimate and synthetic input: two FLOPs for each parameter and position (an example, a token, a pixel), which is
      what linear layers and convolutions that keep the resolution do.
    - Fit: twice that, and the update. Where consumers take several messages at once, the fit also asks the estimator
      again, for each of them.
    - Update: ten FLOPs for each parameter, as Adam's. Target: nothing.
    """
    wiring = links(program)
    interfaces = {interface.boundary: interface for interface in program.interfaces}
    stands = [(each.specs, interfaces[each.index], each.messages) for each in program.boundaries]
    stands += [(each.specs, each.interface, 1) for each in timed(program) if each.interface is not None]
    return {
        action: _partition_cost(action, program, interfaces)
        if on_partition(action.kind)
        else _interface_cost(action.kind, *stands[action.index])
        for action in chosen_actions(whole_step(wiring, diagnose=True), wiring)
    }


def _partition_cost(action: Action, program: Program, interfaces: Mapping[int, Interface]) -> float:
    partition = program.partitions[action.index]
    if action.kind is Kind.INPUT:
        consumed = [boundary for boundary in program.boundaries if action.index in boundary.consumers]
        models = ((interfaces[boundary.index].input_model, boundary.specs) for boundary in consumed)
        return sum(_run(model, specs) for model, specs in models if model is not None)
    if action.kind is Kind.UPDATE:
        return UPDATE_FLOPS * partition.parameter_bytes / ELEMENT_BYTES
    forward = partition.flops + partition.activation_bytes / ELEMENT_BYTES
    return forward * BACKWARD_TO_FORWARD if action.kind is Kind.BACKWARD else forward


def _interface_cost(kind: Kind, specs: tuple[TensorSpec, ...], interface: Interface, messages: int) -> float:
    if kind is Kind.SYNTHESISE:
        return _run(interface.estimator, specs)
    if kind is Kind.TARGET:
        return 0.0
    learners = [interface.estimator] if interface.fits else []
    learners += [] if interface.input_model is None else [interface.input_model]
    passes = BACKWARD_TO_FORWARD if messages == 1 else messages * (1 + BACKWARD_TO_FORWARD)
    return sum(passes * _run(learner, specs) + UPDATE_FLOPS * count_parameters(learner) for learner in learners)


def _run(model: nn.Module, specs: tuple[TensorSpec, ...]) -> float:
    """FLOPs of one run over the boundary's values: one for each element if the model has no parameters."""
    positions = max((spec.elements // _features(spec) for spec in specs), default=1)
    return 2.0 * count_parameters(model) * positions or float(sum(spec.elements for spec in specs))


def _features(spec: TensorSpec) -> int:
    """Number of elements that the model takes at once: the channels of an image, else the last dimension."""
    return max(1, spec.shape[1] if spec.is_image else spec.shape[-1] if spec.shape else 1)


def given_costs(costs: Mapping[str, float], actions: Iterable[Action]) -> dict[Action, float]:
    """Return the costs that a user gave by name (``{"F0": 0.1}``, in seconds) for the actions of a schedule.

    Raises:
        ScheduleError: An action has no cost, a cost is negative or not a number, or a name is no action of the schedule.
    """
    wanted = {str(unplaced(action)): unplaced(action) for action in actions}
    missing, strange = sorted(wanted.keys() - costs.keys()), sorted(costs.keys() - wanted.keys())
    if missing:
        raise ScheduleError(
            f"No cost was given for {', '.join(missing)}. Give the seconds of every action of the schedule."
        )
    if strange:
        raise ScheduleError(
            f"A cost was given for {strange[0]!r}, which the schedule does not run; nearest: {nearest(strange[0], wanted)}."
        )
    wrong = [name for name, cost in costs.items() if not cost >= 0]
    if wrong:
        raise ScheduleError(f"The cost of {wrong[0]} is {costs[wrong[0]]}; give seconds, zero or more.")
    return {action: float(costs[name]) for name, action in wanted.items()}
