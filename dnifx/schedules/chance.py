"""Schedules that are drawn at random: which partitions take part, and in which order."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, links
from dnifx.schedules.orders import Choice, arranged, chosen_actions, trained
from dnifx.schedules.sources import Resumable, at_least

_AT_ONCE = {Kind.TARGET: 0, Kind.FIT: 1, Kind.UPDATE: 2}
_ORDER = {Kind.INPUT: 0, Kind.FORWARD: 1, Kind.SYNTHESISE: 2, Kind.BACKWARD: 3}


@dataclass
class _Drawn(Resumable):
    """A source that draws which partitions take part, and in which order."""

    p: float
    seed: int = 0
    partial = True
    word: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ScheduleError(f"p={self.p!r} is not an update probability; give a number above 0 and at most 1.")
        at_least(0, seed=self.seed)
        self.p = float(self.p)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.word}(p={self.p}, seed={self.seed})"


class RandomOrder(_Drawn):
    """Sparse updates: after the forward pass each partition runs backward and is updated with probability ``p``.

    A partition that does not fire keeps its weights, and the targets of the boundaries that it consumes do not arrive.
    The producer of a locked boundary fires only together with all its consumers; in plain backpropagation these are all
    partitions behind it. Partitions that share a parameter fire together.

    Args:
        p: Probability for each partition, above 0 and at most 1.
        seed: Seed of the draws. The draws of a step depend on the seed and the step alone.

    References:
        Jaderberg et al. 2017, section 3.1 and figure 7 (left).
    """

    word = "random_order"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule that is drawn for a step."""
        wiring = links(program)
        ranks, fires = drawn(self.p, self.seed, step, wiring)
        choice = Choice(frozenset(wiring.partitions), _able(fires & trained(wiring), wiring, ends=True))

        def key(action: Action) -> tuple[int, ...]:
            if action.kind in _AT_ONCE:
                return 0, _AT_ONCE[action.kind], action.index
            if action.kind is Kind.BACKWARD:
                return 2, ranks[action.index], 0
            return 1, wiring.place(action), _ORDER[action.kind]

        return arranged(self.name, chosen_actions(choice, wiring), wiring, key)


class Unlocked(_Drawn):
    """Complete unlock: partitions run on synthetic inputs and gradients, and with probability ``1 - p`` not at all.

    A partition that is busy runs neither forward nor backward. If the last one is busy, the step has no loss and no
    output. An estimator is fitted if its producer and all its consumers took part, an input model if its producer and
    one consumer did.

    Args:
        p: Probability that a partition takes part, above 0 and at most 1.
        seed: Seed of the draws. The draws of a step depend on the seed and the step alone.

    References:
        Jaderberg et al. 2017, section 3.1 and figure 7 (right).
    """

    word = "unlocked"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule that is drawn for a step.

        Raises:
            ScheduleError: A boundary has no synthetic input model, so its consumers have to wait for it.
        """
        wiring = links(program)
        _demand_inputs(wiring)
        ranks, fires = drawn(self.p, self.seed, step, wiring)

        def key(action: Action) -> tuple[int, ...]:
            if action.kind in _AT_ONCE:
                return 0, _AT_ONCE[action.kind], action.index
            return 1, ranks[wiring.place(action)], _ORDER[action.kind]

        return arranged(self.name, chosen_actions(_taking_part(fires, wiring), wiring), wiring, key)


random_order, unlocked = RandomOrder, Unlocked


def drawn(p: float, seed: int, step: int, wiring: Links) -> tuple[list[int], frozenset[int]]:
    """Draw the rank of each partition in a random order, and the partitions that fire, for one step.

    The step is the high word of the counter of the Philox generator, so a step is drawn without those before it.
    """
    count = len(wiring.partitions)
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    places, chances = generator.random((2, count))
    ranks = np.argsort(np.argsort(places, kind="stable"), kind="stable")
    fires = frozenset(index for index in wiring.partitions if chances[min(_sharing(index, wiring))] < p)
    return [int(rank) for rank in ranks], fires


def _sharing(index: int, wiring: Links) -> frozenset[int]:
    """The partitions that share parameters with one, directly or through others; they fire together."""
    found = frozenset({index})
    while more := found.union(*(wiring.owners[each] | wiring.users[each] for each in found)) - found:
        found |= more
    return found


def _able(fires: frozenset[int], wiring: Links, ends: bool) -> frozenset[int]:
    """Leave out partitions that wait for a target or a loss that will not come, and those that share parameters with them."""
    while True:
        stuck = {
            gate.producer
            for gate in wiring.gates
            if gate.producer in fires
            and ((gate.locked and not gate.consumers <= fires) or (gate.needs_error and not ends))
        }
        alone = {index for index in fires if not _sharing(index, wiring) <= fires}
        if not stuck | alone:
            return fires
        fires -= stuck | alone


def _taking_part(fires: frozenset[int], wiring: Links) -> Choice:
    """Leave out partitions that lack an input or would run forward but not backward, until the rest fits together."""
    idle = frozenset(wiring.partitions) - trained(wiring)
    while True:
        forward = _fed(fires, wiring)
        backward = _able(forward & trained(wiring), wiring, ends=wiring.last in forward)
        if fires == backward | (idle & forward):
            return Choice(forward, backward)
        fires = backward | (idle & forward)


def _fed(fires: frozenset[int], wiring: Links) -> frozenset[int]:
    """Leave out partitions that lack a value: its partition is left out, and no input model stands in for it."""
    fed: set[int] = set()
    for index in wiring.partitions:
        if index in fires and wiring.direct[index] <= fed:
            fed.add(index)
    return frozenset(fed)


def _demand_inputs(wiring: Links) -> None:
    gates = zip(wiring.names, wiring.gates, strict=True)
    bare = [name for name, gate in gates if not gate.has_input_model and not gate.in_time]
    if bare:
        raise ScheduleError(
            f"The schedule 'unlocked' needs a synthetic input model on every boundary; there is none on {bare}. "
            'Decouple with inputs="synthetic", or use random_order, which keeps the forward pass in order.'
        )
