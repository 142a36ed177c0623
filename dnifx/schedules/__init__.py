"""Schedules: what a training step runs, in which order and where. They are written, drawn, checked and simulated.

The actions are ``F`` forward, ``S`` synthesise, ``B`` backward, ``U`` update, ``I`` synthetic input, ``T`` target arrives
and ``M`` fit. ``F1`` is the forward pass of partition 1; ``T1`` is the target of boundary 1.
"""

from dnifx.ir import Period, Schedule
from dnifx.schedules.chance import random_order, unlocked
from dnifx.schedules.clock import Link, Span
from dnifx.schedules.delays import Delayed, delayed, is_delayed
from dnifx.schedules.dependencies import Answer, answers, timed
from dnifx.schedules.devices import places_of, without_devices
from dnifx.schedules.drawing import Grid, grid
from dnifx.schedules.lags import Lagged, lagged, latest
from dnifx.schedules.language import on_partition, parse, parse_period
from dnifx.schedules.locking import Lock, locks
from dnifx.schedules.orders import (
    backprop,
    diagnosed,
    phases,
    placed,
    sequential,
    sequential_period,
    with_time,
    without_fits,
)
from dnifx.schedules.probing import probing
from dnifx.schedules.registry import Spec, period_of, resolve
from dnifx.schedules.running import refuse_other_places
from dnifx.schedules.simulation import Simulation, simulate
from dnifx.schedules.sources import ScheduleSource, alternate, fit_every, fixed, warm_up
from dnifx.schedules.tied import tied_lag
from dnifx.schedules.transfers import Ranks, evaluation, ranks_of, transferred
from dnifx.schedules.validation import validate

__all__ = [
    "Answer",
    "Delayed",
    "Grid",
    "Lagged",
    "Link",
    "Lock",
    "Period",
    "Ranks",
    "Schedule",
    "ScheduleSource",
    "Simulation",
    "Span",
    "Spec",
    "alternate",
    "answers",
    "backprop",
    "delayed",
    "diagnosed",
    "evaluation",
    "fit_every",
    "fixed",
    "grid",
    "is_delayed",
    "lagged",
    "latest",
    "locks",
    "on_partition",
    "parse",
    "parse_period",
    "period_of",
    "phases",
    "placed",
    "places_of",
    "probing",
    "random_order",
    "ranks_of",
    "refuse_other_places",
    "resolve",
    "sequential",
    "sequential_period",
    "simulate",
    "tied_lag",
    "timed",
    "transferred",
    "unlocked",
    "validate",
    "warm_up",
    "with_time",
    "without_devices",
    "without_fits",
]
