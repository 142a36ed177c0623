"""dnifx: a compiler that cuts any PyTorch module and puts decoupled neural interfaces on every cut."""

from dnifx import errors, estimators, schedules
from dnifx.api import decouple
from dnifx.errors import DnifxError
from dnifx.ir import Edge, Every, Recurrent
from dnifx.passes.time.unroll import unroll
from dnifx.runtime.module.decoupled import DecoupledModule
from dnifx.runtime.module.system import DecoupledSystem
from dnifx.runtime.training.probing import Probe
from dnifx.runtime.training.system_probing import SystemProbe
from dnifx.runtime.training.system_trainer import SystemResult, SystemTrainer
from dnifx.runtime.training.trainer import StepResult, Trainer
from dnifx.runtime.training.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "DecoupledModule",
    "DecoupledSystem",
    "DnifxError",
    "Edge",
    "Every",
    "Probe",
    "Recurrent",
    "StepResult",
    "SystemProbe",
    "SystemResult",
    "SystemTrainer",
    "Trainer",
    "Watch",
    "decouple",
    "errors",
    "estimators",
    "schedules",
    "unroll",
]
