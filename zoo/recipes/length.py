"""A finished run that is made longer: the steps at which its learning rates drop, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import MultiStepLR

from dnifx.errors import StateError
from dnifx.zoo.recipes.settings import Settings


class Drops(MultiStepLR):
    """Learning rates that drop by a factor of 10 after some steps.

    A loaded state does not change these steps, so that a longer run has the drops that it was given.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to a saved state."""
        super().load_state_dict({**state_dict, "milestones": self.milestones})


def drops(shares: Sequence[float], steps: int) -> list[int]:
    """Return after how many steps the rates drop.

    Args:
        shares: The shares of the steps after which they do.
        steps: Steps of the run.

    >>> drops((0.6, 0.8), 1500)
    [900, 1200]
    """
    return [round(share * steps) for share in shares]


def check_length(settings: Settings, saved: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Check that a saved run can go on to the steps that are asked for, as a run of that length from its first step on.

    Args:
        settings: What is asked for.
        saved: The settings of the saved run.
        state: Its state.

    Raises:
        StateError: It has made more steps, or its rates dropped at other steps than those of the longer run.
    """
    made = state["step"]
    if made > settings.steps:
        raise StateError(
            f"--steps {settings.steps}: the run in --out has made {made} steps; give at least as many, or another --out"
        )
    old, new = drops(saved["lr_drops"], saved["steps"]), drops(settings.lr_drops, settings.steps)
    past = [step for step in old if step <= made]
    if past != [step for step in new if step <= made]:
        shares = ",".join(f"{step / settings.steps:.6g}" for step in past) or "none"
        raise StateError(
            f"--lr-drops: in the {made} steps of the run in --out the rates dropped after {past or 'none'}, but a run of "
            f"{settings.steps} would drop them after {new or 'none'}; give --lr-drops {shares} to go on, or another --out"
        )
