"""Half precision with a scaled loss on a CPU: the frameworks' own code, where their check of the device would leave it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

SCALE = 2.0**10
"""What the loss is multiplied by at first."""


@contextmanager
def scaling(scale: float = SCALE) -> Iterator[None]:
    """Let each ``Accelerator(mixed_precision="fp16")`` on a CPU have the scaler and the autocast that it has on a GPU."""
    make = accelerate.Accelerator.__init__

    def make_scaling(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16" and self.device.type == "cpu":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.native_amp = True

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of a process's first accelerator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "__init__", make_scaling)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def lightning_options() -> dict[str, Any]:
    """Return the options of a ``lightning.Trainer`` for ``precision="16-mixed"``, which it turns into bfloat16 on a CPU."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
