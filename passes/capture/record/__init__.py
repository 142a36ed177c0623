"""Capture by recording: run the model once on real inputs, and write an fx graph while it runs."""

from dnifx.passes.capture.record.hazards import close_to_line
from dnifx.passes.capture.record.inputs import RecordedSignature
from dnifx.passes.capture.record.rounds import Recording, record
from dnifx.passes.capture.record.run_graph import replay, runnable
from dnifx.passes.capture.record.state import finish_draws
from dnifx.passes.capture.record.verification import SideBySide, under_seeds, verify

__all__ = [
    "RecordedSignature",
    "Recording",
    "SideBySide",
    "close_to_line",
    "finish_draws",
    "record",
    "replay",
    "runnable",
    "under_seeds",
    "verify",
]
