"""Schedules that change nothing: what a probe runs to see how good the estimates are."""

from dataclasses import replace

from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Answer, Links, links
from dnifx.schedules.orders import arranged, chosen_actions, differentiable, eager, whole_step

KEPT = (Kind.FORWARD, Kind.BACKWARD, Kind.SYNTHESISE, Kind.TARGET)


def probing(program: Program, true: bool) -> Schedule:
    """Return a step in which every estimator answers and every target arrives, and nothing is updated or fitted.

    Partitions run on the real values of those before them, also where there are synthetic inputs.

    Args:
        program: A program with partitions, boundaries and interfaces.
        true: Whether every producer waits, so that the targets are the gradients of backpropagation; else they are those that
            the estimators are fitted to, which contain the estimates further on.
    """
    wiring = links(program)
    every = frozenset(range(len(wiring.gates))) if true else frozenset[int]()
    choice = replace(whole_step(wiring, diagnose=True), true=every, fit=False)
    actions = {action for action in chosen_actions(choice, wiring) if action.kind in KEPT} | asked(wiring)
    answered = dict.fromkeys(every, Answer.TARGET)
    return Schedule("probe of true gradients" if true else "probe", arranged(actions, wiring, eager, answered))


def asked(wiring: Links) -> set[Action]:
    """Return the actions of the estimators that answer at all."""
    live = differentiable(wiring)
    return {
        Action(Kind.SYNTHESISE, index)
        for index, gate in enumerate(wiring.gates)
        if gate.producer in live and (gate.fits or gate.blends or not gate.locked)
    }
