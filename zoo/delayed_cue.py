"""The delayed cue: a task whose answer lies beyond the window, so that only a gradient from later windows can teach it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.errors import OptionError

INPUTS = 3
WINDOWS = 5


class CueNetwork(nn.Module):
    """An LSTM with a readout that does not take the cue in before it has learned to.

    The weights from the two cue inputs are zero, and the forget gates begin open, so what is once taken in is kept. No loss
    inside the cue's own window asks for it: under truncated backpropagation these weights get the gradient 0 and stay.

    Args:
        width: Units of the LSTM.
        open_gate: What is added to the bias of the forget gates.
    """

    def __init__(self, width: int = 32, open_gate: float = 3.0) -> None:
        super().__init__()
        self.core = nn.LSTM(INPUTS, width, batch_first=True)
        self.readout = nn.Linear(width, 2)
        with torch.no_grad():
            self.core.get_parameter("weight_ih_l0")[:, :2] = 0
            self.core.get_parameter("bias_hh_l0")[width : 2 * width] += open_gate

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits [batch, steps, 2] and the next state."""
        hidden, left = self.core(x, state)
        return self.readout(hidden), left


@dataclass(frozen=True)
class DelayedCue:
    """Episodes of five windows: one of two cues at the first step, the question 4 windows later.

    Attributes:
        steps: Steps of a window, T; the delay is 4 T.
        batch: Episodes at once.
    """

    steps: int = 3
    batch: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise OptionError(f"{self}: steps and batch have to be 1 or more")

    def episode(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the inputs [windows, batch, steps, 3] and the cues [batch]."""
        cues = torch.randint(2, (self.batch,), generator=generator)
        inputs = torch.zeros(WINDOWS, self.batch, self.steps, INPUTS)
        inputs[0, torch.arange(self.batch), 0, cues] = 1
        inputs[-1, :, 0, 2] = 1
        return inputs, cues


def answer_loss(logits: Tensor, target: tuple[Tensor, bool]) -> Tensor:
    """Return the cross entropy of the answer in the window that asks, and 0 in all others.

    Args:
        logits: [batch, steps, 2].
        target: The cues [batch], and whether this window asks.
    """
    cues, asks = target
    return functional.cross_entropy(logits[:, 0], cues) if asks else 0 * logits.sum()


def learn(gradient: Any, seed: int, episodes: int, task: DelayedCue | None = None) -> list[float]:
    """Train from a seed and return the share of right answers in each episode.

    Args:
        gradient: The estimator between windows, as ``dnifx.decouple`` takes it; ``"zero"`` is truncated backpropagation.
        seed: Of weights and episodes.
        episodes: Episodes to train on, each of ``batch`` at once.
        task: The task.
    """
    task = task or DelayedCue()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CueNetwork()
        zero = torch.zeros(1, task.batch, model.core.hidden_size)
        inputs, _ = task.episode(generator)
        cut = dnifx.Recurrent("state", "1", scale=0.5)
        net = dnifx.decouple(model, cut, args=(inputs[0], (zero, zero)), gradient=gradient, loss=answer_loss)
    trainer = net.trainer(
        lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        estimator_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )
    right = []
    for _ in range(episodes):
        inputs, cues = task.episode(generator)
        trainer.reset()
        for window, x in enumerate(inputs):
            result = trainer.step(x, target=(cues, window == WINDOWS - 1))
        right.append(float((result.output[0][:, 0].argmax(1) == cues).float().mean()))
    return right
