"""What a training step runs, in which order and where: written, drawn, checked, simulated.

``F1`` forward, ``S1`` synthesise, ``B1`` backward, ``U1`` update, ``I2`` synthetic input, ``T1`` target arrives,
``M1`` fit.
"""

from dnifx.ir import Period
from dnifx.schedules.chance import random_order, unlocked
from dnifx.schedules.dependencies import Answer, answers, timed
from dnifx.schedules.drawing import Grid, grid
from dnifx.schedules.language import on_partition, parse, parse_period
from dnifx.schedules.locking import Lock, locks
from dnifx.schedules.orders import backprop, diagnosed, placed, sequential, with_time, without_fits
from dnifx.schedules.periods import period_of, placed_period, resolve_period, sequential_period, validate_period
from dnifx.schedules.probing import probing
from dnifx.schedules.registry import resolve
from dnifx.schedules.simulation import Simulation, Span, simulate
from dnifx.schedules.sources import ScheduleSource, alternate, fit_every, fixed, warm_up
from dnifx.schedules.validation import validate

__all__ = [
    "Answer",
    "Grid",
    "Lock",
    "Period",
    "ScheduleSource",
    "Simulation",
    "Span",
    "alternate",
    "answers",
    "backprop",
    "diagnosed",
    "fit_every",
    "fixed",
    "grid",
    "locks",
    "on_partition",
    "parse",
    "parse_period",
    "period_of",
    "placed",
    "placed_period",
    "probing",
    "random_order",
    "resolve",
    "resolve_period",
    "sequential",
    "sequential_period",
    "simulate",
    "timed",
    "unlocked",
    "validate",
    "validate_period",
    "warm_up",
    "with_time",
    "without_fits",
]
