"""What passes between the parts of a net: its inputs, the messages of faster parts, and the states that parts carry."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import ContextError, PassError
from dnifx.ir import Action, Interface, Kind, Message, Part, Schedule
from dnifx.runtime.emitted.fitting import per_example
from dnifx.runtime.emitted.windows import without_rows
from dnifx.runtime.net.carried_states import Window
from dnifx.runtime.net.net import Net
from dnifx.runtime.net.states import (
    bound_arguments,
    first_state,
    follow,
    is_none,
    refuse_unknown_none,
    state_out,
    steps_of,
    with_state,
)
from dnifx.runtime.training.messages import BATCH, KeptTensor, MessageBuffer, end_to_end, message_features


class Exchange:
    """Takes a call of the net apart into calls of its parts, and puts their results together.

    Args:
        net: The net; it has several rates.
        attached: Whether messages stay attached to what made them, as a probe wants it.
    """

    def __init__(self, net: Net, attached: bool = False) -> None:
        if net.program.signature is None or net.program.graph is None:
            raise PassError("the program was not captured; run all passes first")
        check_senders(net)
        self.net, self.program, self.signature = net, net.program, net.program.signature
        self.buffers = [MessageBuffer(part, attached) for part in self.program.parts]
        self.zeros = Window(self.program)
        outputs = net.program.graph.output_node().args[0]
        self.size = len(outputs) if isinstance(outputs, tuple | list) else 1
        marks = tuple(torch.empty(0) for _ in range(self.size))
        order = {id(mark): place for place, mark in enumerate(marks)}
        output = self.signature.unflatten(marks)
        cuts = self.program.recurrents
        self.state_places = [[order[id(mark)] for mark in state_out(self.program.model, output, cut)] for cut in cuts]

    def take(self, windows: Sequence[Window], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in the inputs of one window. States that the caller gives go to the windows of the parts that carry them.

        A state inside a structure is taken as long as none is carried.
        """
        bound = bound_arguments(self.program.model, args, kwargs).arguments
        for part, window in zip(self.program.parts, windows, strict=True):
            for index, state in enumerate(part.states):
                cut = self.program.recurrents[state.cut]
                first, *inside = steps_of(cut.state)
                if first not in bound or (inside and index in window.states):
                    continue
                if is_none(self.program.model, args, kwargs, cut):
                    refuse_unknown_none(self.program, cut)
                    window.refuse_none(index, cut)
                else:
                    window.states[index] = pytree.tree_map_only(Tensor, Tensor.detach, follow(bound, cut.state))
        for index, cut in enumerate(self.program.recurrents):
            if steps_of(cut.state)[0] in bound:
                args, kwargs = with_state(self.program.model, args, kwargs, cut, first_state(self.program, index))
        flat = self.signature.flatten(*self.zeros.filled(args, kwargs))
        for buffer in self.buffers:
            buffer.add(None, flat)

    def call(self, part: Part, window: Window) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return what a firing takes: values, and the states to start from where the part carries none yet, by key."""
        values = self.buffers[part.index].laid_out()
        states = {
            state.key: None
            if index in window.states
            else first_state(self.program, state.cut, (values[0].size(BATCH),))
            for index, state in enumerate(part.states)
        }
        return values, states

    def send(self, part: Part, gives: Sequence[Tensor], features: Tensor | None) -> None:
        """Keep what a firing gave for the slower parts."""
        for buffer in self.buffers[part.index + 1 :]:
            buffer.add(part.index, gives, features)

    def write(self, part: Part, window: Window, results: Sequence[Tensor], flat: list[Any]) -> None:
        """Write what a firing computed, and what the part carries now, into the flat output of the net."""
        for place, value in zip(part.results, results, strict=True):
            flat[place] = value
        for index, state in enumerate(part.states):
            leaves = pytree.tree_leaves(window.states[index])
            for place, leaf in zip(self.state_places[state.cut], leaves, strict=True):
                flat[place] = leaf

    def output(self, flat: Sequence[Any]) -> Any:
        """Return the net's output in its own structure."""
        return self.signature.unflatten(tuple(flat))

    def interface(self, each: Message) -> Interface:
        """Return what stands on the boundary of messages."""
        return self.program.interfaces[each.boundary.index]

    def fits(self, each: Message, schedule: Schedule) -> bool:
        """Whether the estimator of messages learns, and a window says so."""
        return self.interface(each).fits and Action(Kind.FIT, each.boundary.index) in schedule.actions

    def sent(self, part: Part) -> list[Message]:
        """Return the boundaries of the messages that a part sends."""
        return [each for each in self.program.messages if each.source == part.index]

    def features(self, part: Part, target: Any) -> Tensor | None:
        """Return the features of a firing's own target, where estimators of the part's messages see a context."""
        context = self.program.context
        return context.features(target) if context is not None and self.sent(part) else None

    def weight(self, each: Message, examples: int) -> float:
        """Return the weight of an example in the loss of the part that takes a message."""
        return 1.0 / examples if self.net.parts[each.target].mean else 1.0

    def answered(self, part: Part, gives: Sequence[Tensor], features: Tensor | None) -> Tensor:
        """Return a zero that, differentiated, gives each message its synthetic gradient."""
        sent = self.sent(part)
        first = gives[sent[0].places[0]]
        total = torch.zeros((), dtype=first.dtype, device=first.device)
        for each in sent:
            values = [gives[place] for place in each.places]
            weight = each.scale * self.weight(each, values[0].size(BATCH))
            for value, estimate in zip(values, self.estimated(each, values, features), strict=True):
                total = total + (value * (estimate.detach() * weight).view_as(value).to(value.dtype)).sum()
        return total - total.detach()

    def estimated(self, each: Message, values: Sequence[Tensor], features: Tensor | None) -> tuple[Tensor, ...]:
        """Ask the estimator of messages about what a firing gave, [messages, batch, ...] each."""
        seen = tuple(value.detach().flatten(0, BATCH) for value in values)
        told = None if features is None else message_features(features, values[0])
        made: tuple[Tensor, ...] = self.interface(each).estimator(seen, told)
        return made

    def arriving(self, part: Part, values: Sequence[Tensor], schedule: Schedule, diagnose: bool) -> list[Message]:
        """Return the messages whose targets a firing computes; their values record gradients from here on."""
        taken = [each for each in self.program.messages if each.target == part.index]
        wanted = [each for each in taken if diagnose or Action(Kind.TARGET, each.boundary.index) in schedule.actions]
        for each in wanted:
            for number in each.inputs:
                values[number].requires_grad_()
        return wanted

    def arrived(self, each: Message, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the estimates and the targets of all messages that a firing took, one an example and message.

        The target of a message is the gradient of the example's own loss. It is 0 where an episode began since.
        """
        buffer = self.buffers[each.target]
        kept = [buffer.kept[number] for number in each.inputs]
        weight = self.weight(each, values[each.inputs[0]].size(BATCH))
        targets = tuple(
            target_of(values[number], of, weight).flatten(0, BATCH)
            for number, of in zip(each.inputs, kept, strict=True)
        )
        seen = tuple(end_to_end([one.value for one in of]).flatten(0, BATCH) for of in kept)
        with torch.enable_grad():
            return self.interface(each).estimator(seen, buffer.features_of(each.source, kept[0])), targets


def check_senders(net: Net) -> None:
    """Raise ContextError where no target would be there for the context of a message."""
    for each in net.program.messages if net.program.context is not None else ():
        if each.source not in net.losses and net.program.context is not None:
            name = net.partitions[each.boundary.producer].name
            raise ContextError(
                f"context= ({net.program.context.description}) is made of the target of the part that sends a message, and {name}, which "
                f"sends {each.boundary.name!r}, has no loss, and so no target. Give its part one too, loss={{...}} by the path of a "
                "module in it, or leave context= out"
            )


def target_of(value: Tensor, kept: Sequence[KeptTensor], weight: float) -> Tensor:
    """Return the per-example target of each message, from the gradient that arrived at all of them, end to end."""
    arrived = torch.zeros_like(value) if value.grad is None else value.grad
    pieces = torch.split(arrived, [len(each.value) for each in kept])
    own = [without_rows(piece, each.lost, BATCH) for piece, each in zip(pieces, kept, strict=True)]
    return per_example(end_to_end(own), weight)


def local_schedule(schedule: Schedule, partitions: Sequence[int], boundaries: Sequence[int]) -> Schedule:
    """Return the actions of some partitions and boundaries, numbered among these."""
    found = []
    for action in schedule.actions:
        known = boundaries if action.kind in (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT) else partitions
        if action.index in known:
            found.append(replace(action, index=known.index(action.index)))
    return Schedule(schedule.name, tuple(found))
