"""Schedules that change nothing: what a probe runs to see how good the estimates are."""

from dataclasses import replace

from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Answer, Links, links
from dnifx.schedules.orders import arranged, chosen_actions, differentiable, whole_step

KEPT = (Kind.FORWARD, Kind.BACKWARD, Kind.SYNTHESISE, Kind.TARGET)


def probing(program: Program, true: bool) -> Schedule:
    """Return a step in which every estimator answers and every target arrives, and nothing is updated or fitted.

    Partitions run on the real values of those before them, even where there are synthetic input models. With ``true``,
    every producer waits, so the targets are the gradients of backpropagation. Otherwise they are what estimators are
    fitted to, and contain the estimates from further behind.
    """
    wiring = links(program)
    every = frozenset(range(len(wiring.gates))) if true else frozenset[int]()
    choice = replace(whole_step(wiring, diagnose=True), true=every, fit=False)
    actions = {action for action in chosen_actions(choice, wiring) if action.kind in KEPT} | _estimates(wiring)
    name = "probe of true gradients" if true else "probe"
    return arranged(name, actions, wiring, answered=dict.fromkeys(every, Answer.TARGET))


def _estimates(wiring: Links) -> set[Action]:
    """The actions of all estimators that give an answer; an oracle gives none."""
    live = differentiable(wiring)
    return {
        Action(Kind.SYNTHESISE, index)
        for index, gate in enumerate(wiring.gates)
        if gate.producer in live and (gate.fits or gate.blends or not gate.locked)
    }
