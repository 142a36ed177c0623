"""A simulated schedule as a Chrome trace, for chrome://tracing and ui.perfetto.dev."""

import json
from pathlib import Path
from typing import Any

from dnifx.schedules import Simulation, Span
from dnifx.writing import write_whole

_MICROSECONDS = {"s": 1e6, "flop": 1e-6}


def chrome_trace(simulation: Simulation) -> dict[str, Any]:
    """Return a simulation in the Trace Event Format: a process for each device, a thread for each stream.

    Args:
        simulation: The result of ``dnifx.schedules.simulate``. Seconds stay seconds; 10^12 FLOPs count as one second.
    """
    devices = list(dict.fromkeys(span.device for span in simulation.spans))
    streams = list(dict.fromkeys((span.device, span.stream) for span in simulation.spans))
    scale = _MICROSECONDS[simulation.unit]
    names = [_label("process_name", index, 0, device) for index, device in enumerate(devices)]
    names += [_label("thread_name", devices.index(device), stream, f"stream {stream}") for device, stream in streams]
    events = [_event(span, devices.index(span.device), scale) for span in simulation.spans]
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"schedule": simulation.name}}


def write_chrome_trace(simulation: Simulation, path: str | Path) -> Path:
    """Write ``chrome_trace`` as JSON, and return the path."""
    target = Path(path)
    text = json.dumps(chrome_trace(simulation))
    write_whole(target, lambda part: part.write_text(text, encoding="utf-8"))
    return target


def _label(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _event(span: Span, process: int, scale: float) -> dict[str, Any]:
    return {
        "name": f"{span.action.kind}{span.action.index}",
        "cat": span.action.kind.name.lower(),
        "ph": "X",
        "ts": span.start * scale,
        "dur": (span.end - span.start) * scale,
        "pid": process,
        "tid": span.stream,
        "args": {"step": span.step, "partition": span.partition, "waited": (span.start - span.ready) * scale},
    }
