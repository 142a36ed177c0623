"""The doctor: what a machine can run, what a net costs in places, and whether decoupling it pays.

Costs are measured by steps of a copy of the net. Rates over links are computed from them; nothing is sent.
"""

from dnifx.doctor.chains import repeated
from dnifx.doctor.diagnosis import Diagnosis, diagnose
from dnifx.doctor.machine import Machine, this_machine
from dnifx.doctor.prediction import Prediction, predict
from dnifx.doctor.profiling import Profile, profile

__all__ = [
    "Diagnosis",
    "Machine",
    "Prediction",
    "Profile",
    "diagnose",
    "predict",
    "profile",
    "repeated",
    "this_machine",
]
