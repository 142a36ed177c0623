"""What is kept for a part until it fires: the messages of faster parts, and inputs of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import ContextError, StateError
from dnifx.ir import Part
from dnifx.runtime.emitted.windows import without_rows
from dnifx.runtime.net.carried_states import reset_rows

BATCH = 1
"""The dimension of messages that counts examples."""


@dataclass(frozen=True)
class KeptTensor:
    """One tensor that was kept.

    Attributes:
        value: [messages, batch, ...].
        lost: Which examples began an episode since, [batch], or None. The part sees zeros for them, and their target is 0.
    """

    value: Tensor
    lost: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """What the part sees."""
        return self.value if self.lost is None else without_rows(self.value, self.lost, BATCH)

    def without(self, mask: Tensor | None) -> "KeptTensor":
        """Return the same, the given examples lost; all of them without a mask.

        Raises:
            InputError: The mask does not fit.
        """
        if self.value.dim() <= BATCH:
            return self
        rows = reset_rows(mask, self.value.size(BATCH)).to(self.value.device)
        return KeptTensor(self.value, rows if self.lost is None else self.lost | rows)


class MessageBuffer:
    """What is kept for one part until it fires.

    Args:
        part: The part.
        attached: Whether what is kept stays attached to what made it, so that gradients flow from part to part.
    """

    def __init__(self, part: Part, attached: bool = False) -> None:
        self.part, self.attached = part, attached
        self.kept: list[tuple[KeptTensor, ...]] = [() for _ in part.takes]
        self.features: dict[int, tuple[Tensor, ...]] = {}

    def add(self, source: int | None, values: Sequence[Tensor], features: Tensor | None = None) -> None:
        """Keep what a part gave, or, from None, the model's inputs of this window.

        Args:
            source: Index of the part.
            values: All that it gives.
            features: The context's features of its firing, where estimators see a context.
        """
        if source is not None and features is not None:
            self.features[source] = (*self.features.get(source, ()), features)
        for number, take in enumerate(self.part.takes):
            if take.source == source:
                value = values[take.place] if self.attached else values[take.place].detach()
                before = self.kept[number] if value.dim() else ()
                self.kept[number] = (*before, KeptTensor(value))

    def laid_out(self) -> tuple[Tensor, ...]:
        """Return what the part takes, as it sees it: all messages end to end."""
        return tuple(end_to_end([each.seen for each in kept]) for kept in self.kept)

    def features_of(self, source: int, kept: Sequence[KeptTensor]) -> Tensor | None:
        """Return the features of all messages from a part as estimators see them, where they see any."""
        if source not in self.features:
            return None
        pairs = zip(self.features[source], kept, strict=True)
        return end_to_end([message_features(features, each.value) for features, each in pairs])

    def clear(self) -> None:
        """Keep nothing, after the part fired."""
        self.kept, self.features = [() for _ in self.part.takes], {}

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
        if len(state["kept"]) != len(self.part.takes):
            raise StateError(
                f"the saved part takes {len(state['kept'])} values, this one {len(self.part.takes)}; make the trainer with the same "
                "model and cuts"
            )
        self.kept = [tuple(KeptTensor(value, lost) for value, lost in kept) for kept in state["kept"]]
        self.features = dict(state["features"])


def message_features(features: Tensor, message: Tensor) -> Tensor:
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
            f"[{count}, {examples}, ..., width]. They are made of the target of the part that sends the messages"
        )
    return features.flatten(0, BATCH).detach().to(message.device, message.dtype)


def end_to_end(values: Sequence[Tensor]) -> Tensor:
    """Join tensors along their first dimension."""
    return values[0] if len(values) == 1 else torch.cat(list(values))
