"""Capture by recording: run the model once on real inputs, and write an fx graph while it runs."""

from dnifx.passes.recording.hazards import close_to_line
from dnifx.passes.recording.inputs import RecordedSignature
from dnifx.passes.recording.rounds import Recording, record
from dnifx.passes.recording.running import replay, runnable
from dnifx.passes.recording.state import finish_draws
from dnifx.passes.recording.verification import SideBySide, under_seeds, verify

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
