"""dnifx: a compiler that cuts any PyTorch module and puts decoupled neural interfaces on every cut.

A public name is imported when it is first used, so that ``dnifx --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dnifx import errors
from dnifx.errors import DnifxError

if TYPE_CHECKING:
    from dnifx import doctor, estimators, schedules
    from dnifx.api import decouple
    from dnifx.engines.cuda_graph import StepGraphs
    from dnifx.engines.joining import join_ranks
    from dnifx.engines.stopping import Signals
    from dnifx.ir import Edge, Every, Recurrent
    from dnifx.passes.time.unroll import unroll
    from dnifx.runtime.decoupled import DecoupledModule
    from dnifx.runtime.training.probing import PeriodProbe, Probe
    from dnifx.runtime.training.results import StepResult
    from dnifx.runtime.training.trainer import Trainer
    from dnifx.runtime.training.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "DecoupledModule",
    "DnifxError",
    "Edge",
    "Every",
    "PeriodProbe",
    "Probe",
    "Recurrent",
    "Signals",
    "StepGraphs",
    "StepResult",
    "Trainer",
    "Watch",
    "decouple",
    "doctor",
    "errors",
    "estimators",
    "join_ranks",
    "schedules",
    "unroll",
]

MODULES = {
    "DecoupledModule": "dnifx.runtime.decoupled",
    "Edge": "dnifx.ir",
    "Every": "dnifx.ir",
    "PeriodProbe": "dnifx.runtime.training.probing",
    "Probe": "dnifx.runtime.training.probing",
    "Recurrent": "dnifx.ir",
    "Signals": "dnifx.engines.stopping",
    "StepGraphs": "dnifx.engines.cuda_graph",
    "StepResult": "dnifx.runtime.training.results",
    "Trainer": "dnifx.runtime.training.trainer",
    "Watch": "dnifx.runtime.training.watch",
    "decouple": "dnifx.api",
    "join_ranks": "dnifx.engines.joining",
    "unroll": "dnifx.passes.time.unroll",
}
"""The module that each public name is imported from."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name in MODULES:
            found = globals()[name] = getattr(import_module(MODULES[name]), name)
            return found
        if name in __all__:
            return import_module(f"dnifx.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names too that nobody has used yet."""
        return sorted({*globals(), *__all__})
