"""Two networks that tick at different rates: one sees digits, the other hears its messages."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dnifx.errors import OptionError
from dnifx.zoo.cells import BatchNormLSTMCell
from dnifx.zoo.data import Split

State = tuple[Tensor, Tensor]
THREE = 3


class FastNetwork(nn.Module):
    """Network A. It sees digits; after each window it counts the odd ones and sends a message.

    Args:
        pixels: Size of a digit.
        width: Units of every layer.
        ticks: Steps of a window, T.
    """

    def __init__(self, pixels: int, width: int, ticks: int) -> None:
        super().__init__()
        self.pixels, self.ticks = pixels, ticks
        self.layers = nn.Sequential(
            *(nn.Linear(pixels, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.cell = BatchNormLSTMCell(width, width)
        self.readout = nn.Linear(width, ticks + 1)
        self.speech = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def forward(self, digits: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Return the logits of each window's count, the messages, and the next state.

        Args:
            digits: [windows T, batch, pixels].
            state: h and c [batch, width].
        """
        counts, messages = [], []
        for window in torch.split(digits, self.ticks):
            seen = self.layers(window.flatten(0, 1)).view(self.ticks, *window.shape[1:2], -1)
            for step in seen:
                state = self.cell(step, state)
            counts.append(self.readout(state[0]))
            messages.append(self.speech(state[0]))
        return torch.stack(counts), torch.stack(messages), state


class SlowNetwork(nn.Module):
    """Network B. It hears a message a step; after T messages it counts the threes in their digits.

    Args:
        width: Units, and size of a message.
        ticks: Windows from one answer to the next, T.
    """

    def __init__(self, width: int, ticks: int) -> None:
        super().__init__()
        self.cell = BatchNormLSTMCell(width, width)
        self.readout = nn.Linear(width, ticks * ticks + 1)

    def forward(self, messages: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits of the count [batch, T T + 1] after the last message, and the next state.

        Args:
            messages: [windows, batch, width].
            state: h and c [batch, width].
        """
        for message in messages:
            state = self.cell(message, state)
        return self.readout(state[0]), state


class TwoClocks(nn.Module):
    """Both networks, for any number of windows. A call with T windows is a whole period.

    The cuts ``["fast", Recurrent("fast_state", "2"), Recurrent("slow_state", "3")]`` with
    ``every={"slow": T}`` separate them.

    Args:
        pixels: Size of a digit.
        width: Units of every layer, and size of a message.
        ticks: T: the steps of a window, and the windows of a period.

    Raises:
        OptionError: T is below 2.

    >>> zero = torch.zeros(3, 8), torch.zeros(3, 8)
    >>> odd, threes, *_ = TwoClocks(64, width=8, ticks=2)(torch.rand(4, 3, 64), zero, zero)
    >>> odd.shape, threes.shape
    (torch.Size([2, 3, 3]), torch.Size([3, 5]))

    References:
        Jaderberg et al. 2017, section 3.2 and appendix A.4 of v1.

    Differs from the paper in: nothing that it states. The paper leaves open when the networks
    count. Here A counts in the window that just ended, and B answers at the end of each period.
    """

    def __init__(self, pixels: int = 784, width: int = 256, ticks: int = 4) -> None:
        super().__init__()
        if ticks < 2:
            raise OptionError(
                f"TwoClocks(): got {ticks=}, expected 2 or more, so that one network is slower than the other"
            )
        self.fast = FastNetwork(pixels, width, ticks)
        self.slow = SlowNetwork(width, ticks)

    def forward(self, digits: Tensor, fast_state: State, slow_state: State) -> tuple[Tensor, Tensor, State, State]:
        """Return both networks' counts and next states.

        Returns:
            Logits of A's counts [windows, batch, T + 1], logits of B's [batch, T T + 1], and the
            next states of A and of B.
        """
        odd, messages, fast_state = self.fast(digits, fast_state)
        threes, slow_state = self.slow(messages, slow_state)
        return odd, threes, fast_state, slow_state


class DigitStreams:
    """Endless streams of random digits, read in windows.

    Args:
        digits: The digits to draw from, flat.
        batch: Number of streams.
        ticks: Digits of a window, T.
        seed: Seed of the draws.

    >>> split = Split(torch.arange(10.0)[:, None], torch.arange(10))
    >>> digits, odd, _ = DigitStreams(split, batch=2, ticks=2, seed=0).window()
    >>> digits.flatten(1).tolist(), odd.tolist()
    ([[4.0, 9.0], [3.0, 0.0]], [[1, 1]])
    """

    def __init__(self, digits: Split, batch: int, ticks: int, seed: int) -> None:
        self.digits, self.batch, self.ticks = digits, batch, ticks
        self.generator = torch.Generator().manual_seed(seed)
        self.counts: list[Tensor] = []

    def window(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next window.

        Returns:
            The digits [T, batch, pixels], how many of them are odd [1, batch], and the number of
            threes in the last T windows [batch].
        """
        chosen = torch.randint(len(self.digits), (self.ticks, self.batch), generator=self.generator)
        classes = self.digits.targets[chosen]
        self.counts = [*self.counts, (classes == THREE).sum(0)][-self.ticks :]
        return self.digits.inputs[chosen], (classes % 2).sum(0, keepdim=True), torch.stack(self.counts).sum(0)

    def period(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next T windows.

        Returns:
            The digits [T T, batch, pixels], the odd ones in each window [T, batch], and the number
            of threes [batch].
        """
        windows = [self.window() for _ in range(self.ticks)]
        return torch.cat([each[0] for each in windows]), torch.cat([each[1] for each in windows]), windows[-1][2]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the streams."""
        return {"generator": self.generator.get_state(), "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""
        self.generator.set_state(state["generator"])
        self.counts = list(state["counts"])


def count_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Return the cross entropy of counts, averaged over streams and summed over windows.

    Args:
        logits: [windows, batch, classes], or [batch, classes].
        counts: [windows, batch], or [batch].
    """
    total = functional.cross_entropy(logits.flatten(0, -2), counts.flatten(), reduction="sum")
    return total / counts.size(-1)


def zero_state(batch: int, width: int) -> State:
    """Return a state of zeros."""
    return torch.zeros(batch, width), torch.zeros(batch, width)


def count_errors(model: TwoClocks, streams: DigitStreams, periods: int, warm_up: int = 2) -> tuple[float, float]:
    """Return the percentages of wrong counts of A and of B in evaluation mode.

    Args:
        model: The networks.
        streams: The digits that they see.
        periods: Number of measured periods.
        warm_up: Periods before them, which lead the networks away from the zero state.
    """
    width = model.fast.readout.in_features
    states = [zero_state(streams.batch, width), zero_state(streams.batch, width)]
    wrong, training = torch.zeros(2, dtype=torch.double), model.training
    model.eval()
    with torch.no_grad():
        for period in range(warm_up + periods):
            digits, odd, threes = streams.period()
            said_odd, said_threes, *states = model(digits, *states)
            if period >= warm_up:
                wrong[0] += (said_odd.argmax(-1) != odd).double().mean()
                wrong[1] += (said_threes.argmax(-1) != threes).double().mean()
    model.train(training)
    first, second = (100 * wrong / periods).tolist()
    return first, second
