"""The arms of a feed-forward experiment: every way to train that it sets side by side."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from dnifx.zoo.recipes.settings import Settings

LABELLED = frozenset({"critic", "sobolev", "local_loss"})
"""Gradients that are nothing without a label."""

CONTEXTUAL = frozenset({"synthetic", "sigmoid_linear", "bplambda", "prop"})
"""Gradients that may see a label or not."""

_NAMES = {
    ("zero", "none"): "no gradient",
    ("stale", "none"): "stale gradient",
    ("synthetic", "none"): "DNI",
    ("synthetic", "label"): "cDNI",
    ("oracle", "none"): "true gradient",
    ("direct_feedback", "none"): "direct feedback",
    ("local_loss", "label"): "local loss",
    ("critic", "label"): "critic",
    ("sobolev", "label"): "Sobolev",
    ("sigmoid_linear", "none"): "sigmoid-linear DNI",
    ("sigmoid_linear", "label"): "sigmoid-linear cDNI",
    ("bplambda", "none"): "BP(0.5)",
    ("bplambda", "label"): "BP(0.5), label",
    ("prop", "none"): "DNI + prop",
    ("prop", "label"): "cDNI + prop",
}


@dataclass(frozen=True)
class Arm:
    """One way to train the network.

    Attributes:
        gradient: What the hidden layers learn from: ``backprop``, or the name of an estimator.
        context: What the estimators see beside the activation: ``none`` or ``label``.
        layers: Layers of the network; None until it is chosen.
        position: The hidden layer, from 1, that the only interface stands after; None where one stands after each.
        p: Update probability, where the schedule is drawn.
        lr: Learning rate of the network; this and what follows is None until it is chosen, or where it has no meaning.
        estimator_lr: Learning rate of the estimators.
        hidden: Hidden layers of an estimator.
        decay: Decay of a stale gradient.
    """

    gradient: str
    context: str = "none"
    layers: int | None = None
    position: int | None = None
    p: float | None = None
    lr: float | None = None
    estimator_lr: float | None = None
    hidden: int | None = None
    decay: float | None = None

    @property
    def name(self) -> str:
        """As tables show it, but for the number of layers."""
        words = [_NAMES.get((self.gradient, self.context), self.gradient)]
        words += [] if self.position is None else [f"after layer {self.position}"]
        words += [] if self.p is None else [f"p = {self.p:g}"]
        return ", ".join(words)

    @property
    def key(self) -> str:
        """As files are named; another for every other arm."""
        words = [self.gradient if self.context == "none" else f"{self.gradient}-{self.context}"]
        numbers = list(asdict(self).items())[2:]
        return "-".join(words + [f"{name}={value:g}" for name, value in numbers if value is not None])

    @property
    def fitted(self) -> bool:
        """Whether its estimators learn."""
        return self.gradient in LABELLED | CONTEXTUAL

    @property
    def guesses(self) -> bool:
        """Whether its hidden layers learn from anything that can be compared with the gradient it stands for."""
        return self.gradient not in {"backprop", "zero", "oracle"}


def arms(settings: Settings) -> tuple[Arm, ...]:
    """Return the arms that the settings ask for, what is tuned left open.

    Synthetic gradients come once for each context, position and update probability, backprop once for each number of
    layers.
    """
    return tuple(dict.fromkeys(arm for layers in settings.layers for arm in _of_depth(settings, layers)))


def named(arm: Arm, settings: Settings) -> str:
    """Return the arm's name as the tables of an experiment show it."""
    return arm.name if len(settings.layers) == 1 else f"{arm.name}, {arm.layers} layers"


def candidates(arm: Arm, settings: Settings) -> tuple[Arm, ...]:
    """Return the arm with everything chosen, once for each choice that the settings leave to validation."""
    plain = arm.gradient == "synthetic" and arm.context == "none"
    rates = settings.plain_lr if plain else settings.lr
    estimator_rates = settings.plain_estimator_lr if plain else settings.estimator_lr
    hidden = settings.plain_hidden if plain else settings.hidden
    open_: tuple[tuple[float | None, ...], ...] = (
        rates,
        estimator_rates if arm.fitted else (None,),
        hidden if arm.fitted and arm.gradient != "sigmoid_linear" else (None,),
        settings.decay if arm.gradient == "stale" else (None,),
    )
    return tuple(
        replace(arm, lr=lr, estimator_lr=estimator_lr, hidden=None if depth is None else int(depth), decay=decay)
        for lr, estimator_lr, depth, decay in product(*open_)
    )


def _of_depth(settings: Settings, layers: int) -> Iterator[Arm]:
    for gradient in settings.gradient:
        if gradient == "backprop":
            yield Arm(gradient, layers=layers)
            continue
        for context, position, p in product(
            _contexts(settings, gradient), settings.position or [None], settings.p or [None]
        ):
            yield Arm(gradient, context, layers, position, p)


def _contexts(settings: Settings, gradient: str) -> tuple[str, ...]:
    if gradient in LABELLED:
        return ("label",)
    return settings.context if gradient in CONTEXTUAL else ("none",)
