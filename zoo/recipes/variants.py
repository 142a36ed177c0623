"""The variants of a feed-forward experiment: the ways to train that it compares."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from dnifx.zoo.recipes.settings import Settings

LABELLED = frozenset({"critic", "sobolev", "local_loss"})
"""Gradients that always need a label. Their estimators are heads."""

CONTEXTUAL = frozenset({"synthetic", "sigmoid_linear", "bplambda", "prop"})
"""Gradients that work with or without a label."""

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
class Variant:
    """One way to train the network.

    The attributes from ``lr`` on are None until a value is chosen, or where they have no meaning.

    Attributes:
        gradient: What the hidden layers learn from: ``backprop``, or the name of an estimator.
        context: What the estimators see beside the activation: ``none`` or ``label``.
        layers: Number of layers of the network; None until it is chosen.
        position: The hidden layer, from 1, before the only interface; None: one after each layer.
        p: Update probability of a random schedule.
        lr: Learning rate of the network.
        estimator_lr: Learning rate of the estimators or heads.
        hidden: Number of hidden layers of an estimator.
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
        """The name in tables, without the number of layers."""
        words = [_NAMES.get((self.gradient, self.context), self.gradient)]
        words += [] if self.position is None else [f"after layer {self.position}"]
        words += [] if self.p is None else [f"p = {self.p:g}"]
        return ", ".join(words)

    @property
    def key(self) -> str:
        """The name in file names. No two variants share one."""
        words = [self.gradient if self.context == "none" else f"{self.gradient}-{self.context}"]
        numbers = list(asdict(self).items())[2:]
        return "-".join(words + [f"{name}={value:g}" for name, value in numbers if value is not None])

    @property
    def fitted(self) -> bool:
        """Whether its estimators learn."""
        return self.gradient in LABELLED | CONTEXTUAL

    @property
    def guesses(self) -> bool:
        """Whether its hidden layers learn from estimates that can be compared with a gradient."""
        return self.gradient not in {"backprop", "zero", "oracle"}


def variants(settings: Settings) -> tuple[Variant, ...]:
    """Return the variants that the settings ask for. Tuned values are still open.

    There is one synthetic gradient for each context, position and update probability, and one
    backprop for each number of layers.
    """
    return tuple(dict.fromkeys(variant for layers in settings.layers for variant in _of_depth(settings, layers)))


def named(variant: Variant, settings: Settings) -> str:
    """Return the variant's name in the tables of this experiment."""
    return variant.name if len(settings.layers) == 1 else f"{variant.name}, {variant.layers} layers"


def candidates(variant: Variant, settings: Settings) -> tuple[Variant, ...]:
    """Return the variant with every value chosen, once for each choice left to validation."""
    plain = variant.gradient == "synthetic" and variant.context == "none"
    rates = settings.plain_lr if plain else settings.lr
    of_estimators = settings.plain_estimator_lr if plain else settings.estimator_lr
    estimator_rates = settings.head_lr if variant.gradient in LABELLED else of_estimators
    hidden = settings.plain_hidden if plain else settings.hidden
    open_: tuple[tuple[float | None, ...], ...] = (
        rates,
        estimator_rates if variant.fitted else (None,),
        hidden if variant.fitted and variant.gradient != "sigmoid_linear" else (None,),
        settings.decay if variant.gradient == "stale" else (None,),
    )
    return tuple(
        replace(variant, lr=lr, estimator_lr=estimator_lr, hidden=None if depth is None else int(depth), decay=decay)
        for lr, estimator_lr, depth, decay in product(*open_)
    )


def _of_depth(settings: Settings, layers: int) -> Iterator[Variant]:
    for gradient in settings.gradient:
        if gradient == "backprop":
            yield Variant(gradient, layers=layers)
            continue
        for context, position, p in product(
            _contexts(settings, gradient), settings.position or [None], settings.p or [None]
        ):
            yield Variant(gradient, context, layers, position, p)


def _contexts(settings: Settings, gradient: str) -> tuple[str, ...]:
    if gradient in LABELLED:
        return ("label",)
    return settings.context if gradient in CONTEXTUAL else ("none",)
