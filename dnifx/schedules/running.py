"""What a trainer of one process can run of a schedule with places."""

import torch

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Period, Program, Schedule
from dnifx.schedules.dependencies import links
from dnifx.schedules.transfers import Ranks


def refuse_other_places(schedule: Schedule | Period, program: Program, ranks: Ranks = ()) -> None:
    """Check that every action runs where its partition is: in this process, or, with ``ranks``, on the rank of its partition.

    Raises:
        ScheduleError: An action names a rank, a stream, or a device on which its partition is not.
    """
    wiring = links(program)
    for action in (action for window in schedule.windows for action in window.actions):
        own = program.partitions[wiring.place(action)].device
        if action.rank is not None and not ranks:
            reason = f"{action} names a rank, and this trainer runs in one process"
            remedy = 'make the trainer with places="ranks", in a process of its own for each rank (torchrun)'
        elif action.stream is not None:
            reason, remedy = f"{action} names a stream, and a trainer runs everything in one", ""
        elif not _is_on(action, own):
            reason = f"{action} names a device, and its partition is on {own}"
            remedy = f"move the module to {action.device} before dnifx.decouple"
        else:
            continue
        raise ScheduleError(
            f"{reason}. To run a schedule over several devices, let every action name its place, two or more in all, or give "
            "net.trainer(..., places=[...]); else leave them out of the trainer's schedule"
            + (f", or {remedy}." if remedy else ".")
        )


def _is_on(action: Action, own: torch.device) -> bool:
    """Whether an action runs where its partition is. A device without an index is any of its kind."""
    if action.device is None:
        return True
    named = torch.device(action.device)
    return named.type == own.type and (None in (named.index, own.index) or named.index == own.index)
