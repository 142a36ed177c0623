"""Group norm after a cut: torch's backward pass ends the process where its input is channels last and needs no gradient."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

import torch
from torch import nn
from torch.nn.functional import group_norm, mse_loss

import dnifx


class Functional(nn.Module):
    def forward(self, x):
        return group_norm(x, 4)


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        return self.norm(x)


for norm in (nn.GroupNorm(4, 16), Functional(), Inside()):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    net = dnifx.decouple(model, ["0"], args=x, gradient=sys.argv[1], loss=mse_loss)
    net.trainer(lambda parameters: torch.optim.SGD(parameters, 0.1)).step(x, target=torch.randn(2, 4, 4, 4))
print("done")
"""


@pytest.mark.parametrize("gradient", ["zero", "suffix"])
def test_a_step_in_channels_last_does_not_end_the_process(gradient: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, gradient], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "done\n"
