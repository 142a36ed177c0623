"""Programs made by hand for the tests of schedules: who gives what to whom, and nothing to compute."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn

from dnifx.ir import Action, Boundary, Interface, Kind, Partition, Program, TensorSpec

SPEC = TensorSpec((8, 4), torch.float32, requires_grad=True)


@dataclass(frozen=True)
class Gate:
    """A boundary to be: who makes its values, who takes them, what stands on it.

    ``learns`` is what its estimator learns from: ``target``, ``loss``, ``both`` or nothing but itself, ``alone``; ``errs`` is
    whether it answers from the output's error; ``copies`` are the parameters that it copies, every ``refresh`` steps.
    """

    producer: int
    consumers: tuple[int, ...]
    locked: bool = False
    fits: bool = True
    imagines: bool = False
    learns: str = "target"
    errs: bool = False
    copies: tuple[str, ...] = ()
    refresh: int = 1


@dataclass(frozen=True)
class Plan:
    """A program to be: ``parameters`` by partition, ``gates``, and ``plain`` edges whose values carry no gradient."""

    parameters: tuple[tuple[str, ...], ...]
    uses: tuple[tuple[str, ...], ...] = ()
    gates: tuple[Gate, ...] = ()
    plain: tuple[tuple[int, int], ...] = field(default=())

    @property
    def program(self) -> Program:
        """The program, as the passes before ``schedule`` would leave it."""
        return Program(
            model=nn.Identity(),
            partitions=tuple(_partition(self, index) for index in range(len(self.parameters))),
            boundaries=tuple(_boundary(gate, index) for index, gate in enumerate(self.gates)),
            interfaces=tuple(_interface(gate, index) for index, gate in enumerate(self.gates)),
        )


def _partition(plan: Plan, index: int) -> Partition:
    taken = [f"v{number}" for number, gate in enumerate(plan.gates) if index in gate.consumers]
    taken += [f"n{source}" for source, target in plan.plain if target == index]
    given = [f"v{number}" for number, gate in enumerate(plan.gates) if gate.producer == index]
    given += [f"n{index}"] if any(source == index for source, _ in plan.plain) else []
    own = plan.parameters[index]
    return Partition(
        index=index,
        nodes=(f"node{index}",),
        inputs=("x", *taken),
        outputs=tuple(given),
        parameters=own,
        uses=(*own, *(plan.uses[index] if plan.uses else ())),
        flops=1000 * (index + 1),
        parameter_bytes=400,
        activation_bytes=128 * (index + 1),
    )


def _boundary(gate: Gate, index: int) -> Boundary:
    return Boundary(index, f"layer{index}", gate.producer, gate.consumers, (f"v{index}",), (SPEC,))


def _interface(gate: Gate, index: int) -> Interface:
    model = nn.Linear(4, 4) if gate.imagines else None
    return Interface(
        index,
        nn.Linear(4, 4),
        "Linear",
        locked=gate.locked,
        fits=gate.fits,
        input_model=model,
        needs_target=gate.learns in ("target", "both"),
        needs_loss=gate.learns in ("loss", "both"),
        needs_error=gate.errs,
        mirrors=gate.copies,
        refresh=gate.refresh,
    )


def chain(count: int, locked: bool = False, fits: bool = True, imagines: bool = False) -> Program:
    """Partitions in a row, each with a parameter, an interface between any two."""
    gates = tuple(Gate(index, (index + 1,), locked, fits, imagines) for index in range(count - 1))
    return Plan(tuple((f"p{index}",) for index in range(count)), gates=gates).program


@st.composite
def plans(draw: st.DrawFn, imagines: bool | None = None, locked: bool | None = None, most: int = 5) -> Plan:
    """Draw partition graphs: fan-out, plain edges, partitions without parameters, shared parameters, all interfaces.

    Args:
        draw: Hypothesis's.
        imagines: Whether boundaries have synthetic input models; drawn for each if None.
        locked: Whether interfaces are locked; drawn for each if None, and only then do some answer from the error.
        most: Most partitions.
    """
    count = draw(st.integers(1, most))
    parameters = [(f"p{index}",) if draw(st.booleans()) or index == 0 else () for index in range(count)]
    uses: list[tuple[str, ...]] = [() for _ in range(count)]
    if count > 2 and draw(st.booleans()):
        owner, user = draw(st.permutations(range(count)))[:2]
        uses[user] = parameters[owner]
    gates = [gate for index in range(count - 1) for gate in draw(_gates(index, count, imagines, locked))]
    plain = draw(st.lists(st.sampled_from(_pairs(count)), max_size=2, unique=True)) if count > 1 else []
    live = _live(parameters, uses, gates)
    return Plan(tuple(parameters), tuple(uses), tuple(gate for gate in gates if gate.producer in live), tuple(plain))


@st.composite
def _gates(draw: st.DrawFn, index: int, count: int, imagines: bool | None, locked: bool | None) -> list[Gate]:
    later = list(range(index + 1, count))
    groups = draw(st.lists(st.lists(st.sampled_from(later), min_size=1, unique=True), max_size=2))
    return [
        Gate(
            index,
            tuple(sorted(group)),
            locked=draw(st.booleans()) if locked is None else locked,
            fits=draw(st.booleans()),
            imagines=draw(st.booleans()) if imagines is None else imagines,
            learns=draw(st.sampled_from(["target", "target", "loss", "both", "alone"])),
            errs=locked is None and draw(st.sampled_from([False, False, True])),
            copies=draw(st.sampled_from([(), (), *((f"p{each}",) for each in later)])),
        )
        for group in groups
    ]


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(source, target) for source in range(count) for target in range(source + 1, count)]


def _live(parameters: Sequence[tuple[str, ...]], uses: Sequence[tuple[str, ...]], gates: Sequence[Gate]) -> set[int]:
    """The partitions that a trainable parameter stands in or before, so that their values carry gradients."""
    live: set[int] = set()
    for index in range(len(parameters)):
        fed = any(gate.producer in live and index in gate.consumers for gate in gates)
        if parameters[index] or uses[index] or fed:
            live.add(index)
    return live


def programs(imagines: bool | None = None, locked: bool | None = None, most: int = 5) -> st.SearchStrategy[Program]:
    """Draw the programs of ``plans``."""
    return plans(imagines, locked, most).map(lambda plan: plan.program)


class Refusal(Exception):
    """The machine cannot run an action."""


@dataclass
class Machine:
    """A second account of the rules of a whole step: it holds values and versions of weights, refuses what it cannot do.

    That is an action that stands twice or reads what is not there, a backward pass over weights that changed since its
    forward, and an update or a fit that misses what it learns from.
    """

    plan: Plan
    held: set[Action] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)
    seen: dict[int, dict[str, int]] = field(default_factory=dict)

    def run(self, action: Action) -> None:
        """Run one action.

        Raises:
            Refusal: It cannot be run now.
        """
        if action in self.held or not self._can(action.kind, action.index):
            raise Refusal(str(action))
        self.held.add(action)
        if action.kind is Kind.FORWARD:
            self.seen[action.index] = self._weights(action.index)
        if action.kind is Kind.UPDATE:
            for path in self.plan.parameters[action.index]:
                self.versions[path] = self.versions.get(path, 0) + 1

    def _can(self, kind: Kind, index: int) -> bool:
        gates = self.plan.gates
        match kind:
            case Kind.FORWARD:
                gives = [gate.producer for gate in gates if index in gate.consumers and not gate.imagines]
                gives += [source for source, target in self.plan.plain if target == index]
                hungry = any(index in gate.consumers and gate.imagines for gate in gates)
                return self._all("F", gives) and self._all("I", [index] if hungry else [])
            case Kind.SYNTHESISE:
                return self._all("F", [gates[index].producer, *(self._last if gates[index].errs else ())])
            case Kind.BACKWARD:
                mine = [number for number, gate in enumerate(gates) if gate.producer == index]
                return self.seen.get(index) == self._weights(index) and all(map(self._answered, mine))
            case Kind.TARGET:
                return self._all("B", gates[index].consumers)
            case Kind.FIT:
                gate = gates[index]
                return (not gate.fits or self._taught(gate, index)) and (
                    not gate.imagines or (self._all("I", gate.consumers) and self._all("F", [gate.producer]))
                )
            case Kind.UPDATE:
                return self._all("B", [user for user in range(len(self.plan.parameters)) if self._reads(user, index)])
        return True

    @property
    def _last(self) -> tuple[int, ...]:
        return (len(self.plan.parameters) - 1,)

    def _taught(self, gate: Gate, index: int) -> bool:
        target = gate.learns not in ("target", "both") or self._all("T", [index])
        loss = gate.learns not in ("loss", "both") or self._all("F", self._last)
        return self._all("S", [index]) and target and loss

    def _all(self, kinds: str, indices: Sequence[int]) -> bool:
        return all(Action(Kind(kind), index) in self.held for kind in kinds for index in indices)

    def _answered(self, boundary: int) -> bool:
        kinds = "T" if self.plan.gates[boundary].locked else "ST"
        return any(self._all(kind, [boundary]) for kind in kinds)

    def _paths(self, partition: int) -> set[str]:
        return {*self.plan.parameters[partition], *(self.plan.uses[partition] if self.plan.uses else ())}

    def _reads(self, partition: int, owner: int) -> bool:
        return not self._paths(partition).isdisjoint(self.plan.parameters[owner])

    def _weights(self, partition: int) -> dict[str, int]:
        return {path: self.versions.get(path, 0) for path in self._paths(partition)}


def runs_on_machine(actions: Sequence[Action], plan: Plan) -> bool:
    """Whether the machine runs the actions in this order."""
    machine = Machine(plan)
    try:
        for action in actions:
            machine.run(action)
    except Refusal:
        return False
    return True
