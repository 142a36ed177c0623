"""Whether decoupling pays: a net over places beside what waits for gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from typing import Any, TypeVar, cast

from rich.console import Group, RenderableType
from rich.table import Column, Table
from torch.optim import Optimizer

from dnifx.doctor.baselines import Kind, Stage, data_parallel_rate, pipeline_rate, pipeline_work
from dnifx.doctor.machine import Machine, this_machine
from dnifx.doctor.memory import Holding, holdings, size_of, staged, whole
from dnifx.doctor.prediction import predict
from dnifx.doctor.profiling import (
    Profile,
    adding_seconds,
    backprop_seconds,
    batch_size,
    handling_seconds,
    profile,
    why_never_late,
)
from dnifx.errors import OptionError, PlaceError
from dnifx.passes.place import balanced, refuse_everywhere
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.schedules import Link, Ranks, is_delayed, parse
from dnifx.schedules.clock import value_bytes
from dnifx.units import byte_size, plural

MICRO_BATCHES = (2, 4, 8)
"""Numbers of micro-batches of which a pipeline takes the best."""

BETTER = 0.05
"""A difference below this share counts as none."""


@dataclass(frozen=True)
class Contestant:
    """One way to train the net.

    Attributes:
        name: ``backprop``, ``ddp``, ``gpipe``, ``1f1b`` or ``dnifx``.
        detail: How it is set: ``4 micro-batches``, ``lag 3``.
        places: Number of places that it takes.
        rate: Steps per second, a whole batch each.
        bytes: What the place holds that holds most.
    """

    name: str
    detail: str
    places: int
    rate: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True)
class Diagnosis:
    """What a net costs in places, and whether it pays to decouple it.

    Attributes:
        machine: Where it was measured.
        model: Name of the model's class.
        examples: Examples in a batch.
        link: The link between any two places.
        cores: Cores that the places share; infinite where each has one of its own.
        ranks: The place of each partition.
        places: What each place of dnifx holds.
        contestants: Ways to train the net: backpropagation on one place first, dnifx last.
        notes: What could not be measured, and why.
    """

    machine: Machine
    model: str
    examples: int
    link: Link
    cores: float
    ranks: Ranks
    places: tuple[Holding, ...]
    contestants: tuple[Contestant, ...]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Say in one sentence whether decoupling pays, and in what."""
        *others, own = self.contestants
        fastest = max(others, key=lambda each: each.rate)
        smallest = min(others, key=lambda each: each.bytes)
        faster, less = own.rate / fastest.rate, own.bytes / smallest.bytes
        time = f"dnifx makes {faster:.2g} times the steps of {fastest}"
        memory = f"its largest place holds {less:.2g} times what that of {smallest} holds"
        wins = [word for word, won in (("time", faster > 1 + BETTER), ("memory", less < 1 - BETTER)) if won]
        head = (
            f"Decoupling pays in {' and in '.join(wins)}" if wins else "Decoupling pays neither in time nor in memory"
        )
        return f"{head}: {time}, and {memory}."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; times are in seconds and sizes in bytes. What has no bound is None."""
        found: dict[str, Any] = bounded(asdict(self))
        for holding, each in zip(found["places"], self.places, strict=True):
            holding["total"] = each.total
        return {**found, "verdict": self.verdict}

    def __rich__(self) -> RenderableType:
        numbers = (Column(name, justify="right") for name in (*HELD, "total"))
        memory = Table("place", *numbers, **STYLE)
        for rank, each in enumerate(self.places):
            if rank < SHOWN or rank == len(self.places) - 1:
                memory.add_row(str(rank), *(byte_size(getattr(each, name)) for name in HELD), byte_size(each.total))
            elif rank == SHOWN:
                memory.add_row("...", *["..."] * (len(HELD) + 1))
        columns = (Column(name, justify="right") for name in ("places", "steps/s", "largest place"))
        title = f"Predicted for batches of {self.examples}, {self.between}"
        rates = Table("way to train", "", *columns, **STYLE)
        for one in self.contestants:
            rates.add_row(one.name, one.detail, str(one.places), f"{one.rate:.3g}", byte_size(one.bytes))
        return Group(
            self.machine, "", "Memory of each place", memory, "", title, rates, *self.notes, "", self.verdict, ACCURACY
        )

    @property
    def between(self) -> str:
        """The link in words."""
        if len(self.places) == 1:
            return "one place"
        speed = "" if self.link.bandwidth == inf else f" and {self.link.bandwidth * 8e-6:g} Mbit/s"
        shared = "" if self.cores == inf else f", on {plural(round(self.cores), 'core')} together"
        return f"links of {self.link.latency * 1000:g} ms one way{speed}{shared}"


HELD = ("weights", "gradients", "optimizer", "estimators", "activations", "waiting")
SHOWN = 8
"""Places that a table shows, beside the last one."""
STYLE: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "dim"}
ACCURACY = "Synthetic gradients and late targets cost accuracy, which is not counted here."


Found = TypeVar("Found")


def tried(measure: Callable[[], Found], examples: int, notes: list[str]) -> Found | None:
    """Measure with a part of the batch; where the model does not take it, note why and return None."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - a model may raise anything where it takes only the whole batch
        notes.append(f"Not measured with {plural(examples, 'example')}: {type(error).__name__}: {error}")
        return None


def bounded(value: Any) -> Any:
    """Return plain values in which None stands for what is infinite."""
    if isinstance(value, Mapping):
        return {key: bounded(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [bounded(each) for each in value]
    return None if value == inf else value


def diagnose(
    net: DecoupledModule,
    target: Any,
    optimizer: Callable[[Any], Optimizer],
    *,
    places: int = 1,
    link: Link | None = None,
    lag: int | None = None,
    cores: float = inf,
    rounds: int = 10,
) -> Diagnosis:
    """Measure a net on its example inputs, and predict how it trains over places. The net stays as it is.

    Args:
        net: A net that was made with ``loss=``.
        target: What the loss compares the output with.
        optimizer: From parameters to an optimizer.
        places: Number of places; partitions are balanced over them by their measured time.
        link: The link between any two places. What packing a message costs is measured, and added to ``link.handling``.
        lag: Steps that targets are late; by default the smallest under which nothing waits for them.
        cores: How many cores the places share; by default each has as many as this process has threads.
        rounds: Steps that are measured of each way.

    Raises:
        PlaceError: The net cannot run over places, or has too few partitions.
        OptionError: A number is out of range.
    """
    given = Link() if link is None else link
    numbers = {
        "places": (places, places >= 1),
        "link.latency": (given.latency, given.latency >= 0),
        "link.bandwidth": (given.bandwidth, given.bandwidth > 0),
        "lag": (lag, lag is None or lag >= 0),
        "cores": (cores, cores > 0),
        "rounds": (rounds, rounds >= 1),
    }
    for name, (value, fits) in numbers.items():
        if not fits:
            raise OptionError(f"{name}={value}: give a number above zero; a latency and a lag may be zero")
    refuse_everywhere(net.program)
    if is_delayed(net.program):
        raise PlaceError(
            "Late(k) keeps steps under way, which the doctor does not predict. Ask it of the same cuts with another estimator"
        )
    return _Examination(net, target, optimizer, rounds, cores).over(places, given, lag)


@dataclass(frozen=True)
class _Examination:
    """Measures, and puts together what follows."""

    net: DecoupledModule
    target: Any
    optimizer: Callable[[Any], Optimizer]
    rounds: int
    cores: float

    def over(self, places: int, link: Link, lag: int | None) -> Diagnosis:
        """Measure all ways to train over so many places."""
        net, program = self.net, self.net.program
        measured = profile(net, self.optimizer, self.target, rounds=self.rounds)
        ranks = balanced(program, places, {parse(name).actions[0]: cost for name, cost in measured.costs.items()})
        line = replace(link, handling=link.handling + handling_seconds()) if places > 1 else link
        never = why_never_late(net)
        found = predict(program, measured, ranks, line, 0 if never or places == 1 else lag, self.cores)
        held = holdings(net, measured, ranks, found.peaks, found.lag)
        seconds = backprop_seconds(net, self.optimizer, self.target, rounds=self.rounds)
        contestants = [Contestant("backprop", "", 1, 1 / seconds, whole(net, measured).total)]
        notes = [f"The lag is 0: {never}"] if never and places > 1 else []
        for make in (self.replicas, self.pipelines) if places > 1 else ():
            contestants += make(measured, ranks, line, notes)
        detail = f"lag {found.lag}" if places > 1 else plural(len(ranks), "partition")
        own = Contestant("dnifx", detail, places, found.rate, max(each.total for each in held))
        name, size = type(net.original).__name__, measured.examples
        return Diagnosis(this_machine(), name, size, link, self.cores, ranks, held, (*contestants, own), tuple(notes))

    def replicas(self, measured: Profile, ranks: Ranks, link: Link, notes: list[str]) -> list[Contestant]:
        """Return data parallel training, with as many replicas as there are places, or as divide the batch."""
        size = batch_size(self.net)
        count = next(each for each in range(len(set(ranks)), 0, -1) if size % each == 0 or each == 1)
        if count == 1:
            return []
        seconds = tried(
            lambda: backprop_seconds(self.net, self.optimizer, self.target, size // count, self.rounds),
            size // count,
            notes,
        )
        if seconds is None:
            return []
        gradients = size_of([each for each in self.net.original.parameters() if each.requires_grad])
        rate = data_parallel_rate(seconds, gradients, count, link)
        work = count * seconds + 8 * (count - 1) * gradients * link.handling
        held = whole(self.net, measured, 1 / count).total
        return [Contestant("ddp", plural(count, "replica"), count, min(rate, self.cores / work), held)]

    def pipelines(self, measured: Profile, ranks: Ranks, link: Link, notes: list[str]) -> list[Contestant]:
        """Return both pipelines, each with its best number of micro-batches."""
        size, places = batch_size(self.net), len(set(ranks))
        counts = [count for count in MICRO_BATCHES if size % count == 0 and size >= count]
        made = {count: tried(partial(self.stages, ranks, count), size // count, notes) for count in counts}
        stages = {count: found for count, found in made.items() if found is not None}
        found = []
        for kind in cast(Sequence[Kind], ("gpipe", "1f1b")) if stages else ():
            rates = {
                count: min(pipeline_rate(kind, count, each, link), self.cores / pipeline_work(count, each, link))
                for count, each in stages.items()
            }
            best = max(rates, key=lambda count: rates[count])
            ahead = [1.0 if kind == "gpipe" else min(best, places - rank) / best for rank in range(places)]
            held = max(each.total for each in staged(self.net, measured, ranks, ahead))
            found.append(Contestant(kind, f"{best} micro-batches", places, rates[best], held))
        return found

    def stages(self, ranks: Ranks, count: int) -> list[Stage]:
        """Measure the stages of a pipeline on a micro-batch."""
        program, sizes = self.net.program, value_bytes(self.net.program)
        costs = profile(
            self.net,
            self.optimizer,
            self.target,
            examples=batch_size(self.net) // count,
            locked=True,
            rounds=self.rounds,
        ).costs
        spent: list[dict[str, float]] = [{"F": 0.0, "B": 0.0, "U": 0.0} for _ in set(ranks)]
        adding, bytes_of = (count - 1) * adding_seconds(self.net.original), [0] * len(spent)
        total = sum(each.parameter_bytes for each in program.partitions) or 1
        for each in program.partitions:
            here = spent[ranks[each.index]]
            for kind in here:
                here[kind] += costs.get(f"{kind}{each.index}", 0.0)
            here["U"] += adding * each.parameter_bytes / total
        for boundary in program.boundaries:
            if any(ranks[consumer] != ranks[boundary.producer] for consumer in boundary.consumers):
                size = sum(sizes.get(name, 0) for name in boundary.values)
                bytes_of[ranks[boundary.producer]] += size // count
        return [Stage(each["F"], each["B"], each["U"], size) for each, size in zip(spent, bytes_of, strict=True)]
