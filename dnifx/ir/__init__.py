"""The value types that flow through the passes: a Program and what it is made of."""

from dnifx.ir.actions import BAR, READS_TIED, RECEIVED, SENDS, TRANSFERS, Action, Kind, Period, Schedule
from dnifx.ir.capture import Capture, Kept, Signature, constants_root, free_attribute
from dnifx.ir.cuts import MODULE_NAMES, Boundary, Cut, Edge, Interface, Partition, free_name, identifier, own_parameters
from dnifx.ir.parts import Message, Part, PartState, Take
from dnifx.ir.program import Context, Program
from dnifx.ir.terms import Term, terms
from dnifx.ir.time import Carry, Every, Recurrence, Recurrent
from dnifx.ir.values import Holder, Measure, TensorSpec, count_parameters, module_path

__all__ = [
    "BAR",
    "MODULE_NAMES",
    "READS_TIED",
    "RECEIVED",
    "SENDS",
    "TRANSFERS",
    "Action",
    "Boundary",
    "Capture",
    "Carry",
    "Context",
    "Cut",
    "Edge",
    "Every",
    "Holder",
    "Interface",
    "Kept",
    "Kind",
    "Measure",
    "Message",
    "Part",
    "PartState",
    "Partition",
    "Period",
    "Program",
    "Recurrence",
    "Recurrent",
    "Schedule",
    "Signature",
    "Take",
    "TensorSpec",
    "Term",
    "constants_root",
    "count_parameters",
    "free_attribute",
    "free_name",
    "identifier",
    "module_path",
    "own_parameters",
    "terms",
]
