"""Devices and streams in a schedule: the place of each partition in one process."""

from collections.abc import Sequence
from dataclasses import replace

from dnifx.engines.places import Place, read_place
from dnifx.errors import ScheduleError
from dnifx.ir import Action, Period, Program, Schedule
from dnifx.schedules.dependencies import links


def places_of(schedule: Schedule | Period, program: Program) -> tuple[str, ...] | None:
    """Return the device and stream that a schedule names for each partition; None where it names one, or not all.

    Raises:
        ScheduleError: Actions of one partition name several.
    """
    if isinstance(schedule, Period) or any(each.rank is not None for each in schedule.actions):
        return None
    wiring, found = links(program), dict[int, Action]()
    for action in schedule.actions:
        first = found.setdefault(wiring.place(action), action)
        if first.place and action.place and first.place != action.place:
            raise ScheduleError(
                f"{action} runs in another place than {first}, and both belong to {program.partitions[wiring.place(action)].name}. Let all "
                "actions of a partition, and of the boundaries that it produces, name the same place"
            )
        found[wiring.place(action)] = action if action.place else first
    named = [found[index].place.removeprefix("@") if index in found else "" for index in wiring.partitions]
    return tuple(named) if all(named) and len(set(named)) > 1 else None


def without_devices(schedule: Schedule, program: Program, numbers: Sequence[int], places: Sequence[Place]) -> Schedule:
    """Return a schedule without devices and streams, after checking that they are those of the partitions.

    Args:
        schedule: The schedule.
        program: The program.
        numbers: The number of each partition's place.
        places: The places.

    Raises:
        ScheduleError: An action names another place.
    """
    wiring, order = links(program), list[Action]()
    for action in schedule.actions:
        own, named = places[numbers[wiring.place(action)]], action.place.removeprefix("@")
        if named and (action.rank is not None or read_place(named) != own):
            raise ScheduleError(
                f"{action} names {named}, but {program.partitions[wiring.place(action)].name} is on {own}. Name its place, or leave places "
                "out of the schedule"
            )
        order.append(replace(action, device=None, stream=None) if named else action)
    return replace(schedule, actions=tuple(order))
