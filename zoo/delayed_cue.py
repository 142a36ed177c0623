"""The delayed cue: a task that only a gradient from later windows can teach."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.errors import OptionError
from dnifx.zoo.diagonal_cells import MinGRUCell

INPUTS = 3


class CueNetwork(nn.Module):
    """An LSTM with a readout, with torch's initial weights.

    Only the first window shows the cue, and only the last window asks for it. Truncated
    backpropagation therefore gives the weights of the cue inputs a gradient of 0, and they never
    change. It can only learn to read the trace that the cue leaves in the untrained state. Forget
    gates near 1/2 lose almost all of this trace within four windows of three steps.

    Some changes keep the trace. With 3 added to the forget gates' bias, truncated backpropagation
    solves the task within 100 episodes. With windows of two steps it does so within 1,000.

    Args:
        delay: Steps from the cue to the question; they change nothing here.
        width: Units of the LSTM.
    """

    def __init__(self, delay: int = 0, width: int = 32) -> None:
        super().__init__()
        self.core = nn.LSTM(INPUTS, width, batch_first=True)
        self.readout = nn.Linear(width, 2)

    def first_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return zeros, as the state of a number of episodes that begin."""
        zero = torch.zeros(1, batch, self.core.hidden_size)
        return zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits [batch, steps, 2] and the next state."""
        hidden, left = self.core(x, state)
        return self.readout(hidden), left


class CueCells(nn.Module):
    """A minimal GRU with a readout, whose state changes entry by entry.

    Truncated backpropagation gives the weights of the cue inputs a gradient of 0 here too.

    Args:
        delay: Steps from the cue to the question. At first, units keep what they see for up to so many steps.
        width: Units.
    """

    def __init__(self, delay: int, width: int = 32) -> None:
        super().__init__()
        self.cell = MinGRUCell(INPUTS, width, 2, longest=delay)
        self.width = width

    def first_state(self, batch: int) -> Tensor:
        """Return zeros, as the state of a number of episodes that begin."""
        return torch.zeros(batch, self.width)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [batch, steps, 2] and the next state."""
        outputs = []
        for step in range(x.size(1)):
            output, state = self.cell(x[:, step], state)
            outputs.append(output)
        return torch.stack(outputs, 1), state


@dataclass(frozen=True)
class DelayedCue:
    """Episodes of some windows: one of two cues at the first step, the question in the last window.

    Attributes:
        steps: Steps of a window, T. The delay is T times the windows but one.
        batch: Episodes in parallel.
        windows: Windows of an episode.
    """

    steps: int = 3
    batch: int = 64
    windows: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.windows < 2:
            raise OptionError(f"{self}: expected steps and batch of 1 or more, and 2 windows or more")

    @property
    def delay(self) -> int:
        """Steps from the cue to the question."""
        return self.steps * (self.windows - 1)

    def episode(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the inputs [windows, batch, steps, 3] and the cues [batch]."""
        cues = torch.randint(2, (self.batch,), generator=generator)
        inputs = torch.zeros(self.windows, self.batch, self.steps, INPUTS)
        inputs[0, torch.arange(self.batch), 0, cues] = 1
        inputs[-1, :, 0, 2] = 1
        return inputs, cues


def answer_loss(logits: Tensor, target: tuple[Tensor, bool]) -> Tensor:
    """Return the cross entropy of the answer in the window that asks, and 0 in all other windows.

    Args:
        logits: [batch, steps, 2].
        target: The cues [batch], and whether this window asks.
    """
    cues, asks = target
    return functional.cross_entropy(logits[:, 0], cues) if asks else 0 * logits.sum()


def learner(
    gradient: Any,
    seed: int,
    episodes: int,
    task: DelayedCue,
    network: type[CueNetwork | CueCells] = CueNetwork,
    lr: float = 3e-3,
) -> dnifx.Trainer:
    """Return the trainer of a fresh network. The rates fall to a twentieth over the episodes.

    Args:
        gradient: The estimator between windows, as ``dnifx.decouple`` takes it. ``"zero"`` is
            truncated backpropagation.
        seed: Seed of the weights.
        episodes: Number of training episodes.
        task: The task.
        network: The network.
        lr: Learning rate of Adam at first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(task.delay)
        args = torch.zeros(task.batch, task.steps, INPUTS), model.first_state(task.batch)
        cut = dnifx.Recurrent("state", "1", scale=1.0)
        net = dnifx.decouple(model, cut, args=args, gradient=gradient, loss=answer_loss)
    falling = partial(
        torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.05, total_iters=episodes * task.windows
    )
    return net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=lr), lr_scheduler=falling)


def learn(
    gradient: Any,
    seed: int,
    episodes: int,
    task: DelayedCue | None = None,
    network: type[CueNetwork | CueCells] = CueNetwork,
    lr: float = 3e-3,
    told: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """Train from a seed and return the share of right answers in each episode.

    Args:
        gradient: The estimator between windows, as ``learner`` takes it.
        seed: Seed of weights and episodes.
        episodes: Number of training episodes, each with ``batch`` of them in parallel.
        task: The task; by default ``DelayedCue()``.
        network: The network.
        lr: Learning rate of Adam at first.
        told: Told after each episode of the number done, the loss, and the share of right answers.
    """
    task = task or DelayedCue()
    generator = torch.Generator().manual_seed(seed)
    trainer, right = learner(gradient, seed, episodes, task, network, lr), []
    for episode in range(episodes):
        inputs, cues = task.episode(generator)
        trainer.reset()
        for window, x in enumerate(inputs):
            result = trainer.step(x, target=(cues, window == task.windows - 1))
        right.append(float((result.output[0][:, 0].argmax(1) == cues).float().mean()))
        if told is not None:
            told(episode + 1, 0.0 if result.loss is None else float(result.loss), right[-1])
    return right
