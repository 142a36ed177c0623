"""What is kept for a part that does not fire at every window: the messages of the faster parts, and inputs of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import ContextError, InputError, StateError
from dnifx.runtime.emitted.windows import without_rows
from dnifx.runtime.module.parts import PartPlan

BATCH = 1
"""The dimension of messages that counts examples."""


@dataclass(frozen=True)
class Kept:
    """One tensor that was kept.

    Attributes:
        value: [messages, batch, ...].
        lost: Which examples began an episode since, [batch]: for them the part sees zeros, and the target is 0. Or None.
    """

    value: Tensor
    lost: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """What the part sees."""
        return self.value if self.lost is None else without_rows(self.value, self.lost, BATCH)

    def without(self, mask: Tensor | None) -> "Kept":
        """Return the same, the given examples lost; all of them without a mask.

        Raises:
            InputError: The mask does not fit.
        """
        if self.value.dim() <= BATCH:
            return self
        examples = self.value.size(BATCH)
        rows = torch.ones(examples, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        if rows.dtype != torch.bool or rows.shape != (examples,):
            raise InputError(
                f"reset(mask): got {tuple(rows.shape)} of {rows.dtype}; give one boolean for each of the {examples} examples"
            )
        rows = rows.to(self.value.device)
        return Kept(self.value, rows if self.lost is None else self.lost | rows)


class Mail:
    """What is kept for one part until it fires.

    Args:
        plan: The part.
        attached: Whether what is kept stays attached to what made it: gradients flow from part to part, as in a probe.
    """

    def __init__(self, plan: PartPlan, attached: bool = False) -> None:
        self.plan, self.attached = plan, attached
        self.kept: list[tuple[Kept, ...]] = [() for _ in plan.takes]
        self.features: dict[int, tuple[Tensor, ...]] = {}

    def add(self, source: int | None, values: Sequence[Tensor], features: Tensor | None = None) -> None:
        """Keep what a part gave, or, from None, what the system's inputs of this window are.

        Args:
            source: Index of the part.
            values: All that it gives.
            features: The context's features of its firing, where estimators see a context.
        """
        if source is not None and features is not None:
            self.features[source] = (*self.features.get(source, ()), features)
        for number, take in enumerate(self.plan.takes):
            if take.source == source:
                value = values[take.place] if self.attached else values[take.place].detach()
                before = self.kept[number] if value.dim() else ()
                self.kept[number] = (*before, Kept(value))

    def laid_out(self) -> tuple[Tensor, ...]:
        """Return what the part takes, as it sees it: all messages end to end."""
        return tuple(end_to_end([each.seen for each in kept]) for kept in self.kept)

    def letters(self, number: int) -> tuple[Kept, ...]:
        """Return what was kept of one thing that the part takes."""
        return self.kept[number]

    def features_of(self, source: int, letters: Sequence[Kept]) -> Tensor | None:
        """Return the features of all messages from a part as estimators see them, where they see any."""
        if source not in self.features:
            return None
        pairs = zip(self.features[source], letters, strict=True)
        return end_to_end([features_of_each(features, letter.value) for features, letter in pairs])

    def empty(self) -> None:
        """Begin anew, after the part fired."""
        self.hold(([() for _ in self.plan.takes], {}))

    def held(self) -> "Held":
        """Return what is kept, to be put back by ``hold`` if a step breaks off."""
        return list(self.kept), dict(self.features)

    def hold(self, held: "Held") -> None:
        """Keep this and no more."""
        self.kept, self.features = list(held[0]), dict(held[1])

    def reset(self, mask: Tensor | None) -> None:
        """Let episodes begin: what was kept of these examples is lost."""
        self.kept = [tuple(each.without(mask) for each in kept) for kept in self.kept]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept."""
        kept = [[(each.value, each.lost) for each in kept] for kept in self.kept]
        return {"kept": kept, "features": dict(self.features)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved.

        Raises:
            StateError: It is another part's.
        """
        if len(state["kept"]) != len(self.plan.takes):
            raise StateError(
                f"the saved part takes {len(state['kept'])} values, this one {len(self.plan.takes)}; make the trainer with the same "
                "system and cuts"
            )
        kept = [tuple(Kept(value, lost) for value, lost in kept) for kept in state["kept"]]
        self.hold((kept, state.get("features", {})))


Held = tuple[list[tuple[Kept, ...]], dict[int, tuple[Tensor, ...]]]
"""What a mail holds: by what the part takes, what was kept of it, and by sender the features of each of its firings."""


def features_of_each(features: Tensor, message: Tensor) -> Tensor:
    """Return the context's features of each message, [messages batch, ..., width], as estimators see messages.

    Args:
        features: Of a firing: [batch, width], the same for all messages of the firing, or [messages, batch, ..., width].
        message: What the firing gave, [messages, batch, ...].

    Raises:
        ContextError: The features are neither.
    """
    count, examples = message.shape[:2]
    if features.dim() == 2 and len(features) == examples:
        features = features.expand(count, *features.shape)
    if features.dim() < 3 or features.shape[:2] != (count, examples):
        raise ContextError(
            f"the context's features are {list(features.shape)} for messages of {list(message.shape)}; expected [{examples}, width], or "
            f"[{count}, {examples}, ..., width]: they are made of the target of the part that sends the messages"
        )
    return features.flatten(0, BATCH).detach().to(message.device, message.dtype)


def end_to_end(values: Sequence[Tensor]) -> Tensor:
    """Join tensors along their first dimension."""
    return values[0] if len(values) == 1 else torch.cat(list(values))
