"""How the two networks of ``two-clocks`` learn: jointly, or decoupled."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dnifx
from dnifx.zoo.recipes.two_clocks_options import Clocks
from dnifx.zoo.two_clocks import DigitStreams, TwoClocks, count_loss, zero_state


class ClockLearner(ABC):
    """Trains both networks on one period of digits after another."""

    @abstractmethod
    def period(self, streams: DigitStreams) -> Tensor:
        """Train on the next period and return the slow network's loss."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next periods depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


class Joint(ClockLearner):
    """Backpropagation through both networks and a whole period.

    The next period starts from the detached states.
    """

    def __init__(self, options: Clocks, model: TwoClocks) -> None:
        self.model = model
        groups: list[dict[str, Any]] = [
            {"params": list(model.fast.parameters())},
            {"params": list(model.slow.parameters()), "lr": options.slow_lr or options.lr},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=options.lr)
        self.states = [zero_state(options.batch, options.width) for _ in range(2)]

    def period(self, streams: DigitStreams) -> Tensor:
        """Train on the next period and return the slow network's loss."""
        digits, odd, threes = streams.period()
        said_odd, said_threes, *states = self.model(digits, *self.states)
        slow = count_loss(said_threes, threes)
        self.optimizer.zero_grad()
        (count_loss(said_odd, odd) + slow).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.states = [(hidden.detach(), memory.detach()) for hidden, memory in states]
        return slow.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the optimizer and the networks' states."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.states = [tuple(each) for each in state["states"]]


class Decoupled(ClockLearner):
    """The fast network learns in every window, the slow one once a period.

    An estimator stands between them.

    Args:
        options: What to train.
        model: Both networks.
        gradient: The estimator of the gradient of a message.
        labelled: Whether the estimator also sees the slow network's label, the threes of the last T
            windows.
    """

    def __init__(self, options: Clocks, model: TwoClocks, gradient: Any, labelled: bool) -> None:
        digits = torch.rand(options.ticks, options.batch, model.fast.pixels)
        states = [zero_state(options.batch, options.width) for _ in range(2)]
        counts = model.slow.readout.out_features
        net = dnifx.decouple(
            model,
            ["fast", dnifx.Recurrent("fast_state", "2"), dnifx.Recurrent("slow_state", "3")],
            every={"slow": dnifx.Every(options.ticks, scale=options.scale)},
            args=(digits, *states),
            gradient={"fast": gradient, "*_state": "zero"},
            context=ThreesUntilNow(counts) if labelled else None,
            num_classes=counts if labelled else None,
            loss={"fast": odd_loss, "slow": count_loss},
        )
        adam = torch.optim.Adam
        self.trainer = net.trainer(
            {"submod_0": partial(adam, lr=options.lr), "submod_1": partial(adam, lr=options.slow_lr or options.lr)},
            estimator_optimizer=partial(adam, lr=options.estimator_lr),
        )
        self.ticks = options.ticks

    def period(self, streams: DigitStreams) -> Tensor:
        """Train on the windows of the next period and return the slow network's loss."""
        for _ in range(self.ticks):
            digits, odd, threes = streams.window()
            result = self.trainer.step(digits, target={"fast": (odd, threes), "slow": threes})
        return result.losses["slow"]

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.trainer.load_state_dict(state)


def odd_loss(logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``count_loss`` of the odd digits, the first of the target's two counts."""
    return count_loss(logits, target[0])


@dataclass(frozen=True)
class ThreesUntilNow:
    """The estimator's context: the threes of the last T windows as one-hot features.

    They are the second of the target's two counts.

    Attributes:
        width: Number of features, T T + 1.
    """

    width: int

    def __call__(self, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return features [batch, width]."""
        return functional.one_hot(target[1], self.width)
