"""Plain models by family, each with something that is hard to capture or to cut."""

from collections.abc import Callable, Mapping

from tests.real_models.hard.containers import container_family
from tests.real_models.hard.control_flow import control_family
from tests.real_models.hard.generative import generative_family
from tests.real_models.hard.memory import memory_family
from tests.real_models.hard.pieces import Factory
from tests.real_models.hard.sequences import recurrent_family
from tests.real_models.hard.sharing import shared_family

HARD: Mapping[str, Callable[[], Mapping[str, Factory]]] = {
    "recurrent": recurrent_family,
    "sharing and freezing": shared_family,
    "memory and dtypes": memory_family,
    "containers": container_family,
    "control flow": control_family,
    "generative": generative_family,
}
"""Families of hard plain models, as in ``tests.real_models.families``."""
