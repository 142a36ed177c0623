"""What a model with several rates refuses, and why; nothing else in the compiler or the trainer asks for rates."""

from collections.abc import Sequence
from typing import Any

from dnifx.errors import ContextError, CutError, DnifxError, EstimatorError, LossError
from dnifx.ir import Boundary, Interface, Message, Part, Program, Recurrence, Recurrent
from dnifx.schedules.dependencies import links
from dnifx.schedules.orders import trained


def refuse_options(cuts: Any, inside: Any, **options: Any) -> None:
    """Raise CutError where an option or a form of cuts does not go together with ``every=``."""
    for name, value in options.items():
        if value is not None:
            raise CutError(
                f"{name}= does not go together with every=. Parts take messages of other windows, which {name}= does not cover: leave "
                "it out"
            )
    if isinstance(inside, int) or inside == ():
        raise CutError(
            f"cuts={cuts!r} with every=: a number of cuts falls elsewhere for several windows. Name the modules after which to cut, the "
            "last fast one among them"
        )


def refuse_kept_states(cuts: Sequence[Recurrent]) -> None:
    """Raise CutError where a cut in time names a state that the model keeps on itself."""
    for cut in cuts:
        if cut.on_model:
            raise CutError(
                f"{cut!r}: the model keeps this state on itself, and parts of several rates carry no attributes. Take the state as an "
                "argument, return it, and cut it there"
            )


def refuse_attributes(program: Program) -> None:
    """Raise CutError where forward keeps a state in attributes, which windows laid end to end would share."""
    kept = program.signature.kept if program.signature is not None else ()
    if kept:
        raise CutError(
            f"forward keeps {', '.join(kept[:3])} on the model, and parts of several rates carry no attributes. Take the state as an "
            "argument, return it, and cut it in time with dnifx.Recurrent"
        )


def refuse_waiting(boundary: Boundary, interface: Interface) -> None:
    """Raise EstimatorError where the estimator of messages waits for what comes only when the slow part fires."""
    if interface.locked or interface.blends or interface.needs_end:
        raise EstimatorError(
            f"boundary {boundary.name!r} carries messages to a part that fires once for {boundary.messages} of them, and "
            f"{interface.description} waits for the gradient or the loss, which come only then: give an estimator that answers at once, "
            "as dnifx.estimators.Synthetic()"
        )


def refuse_end(interfaces: Sequence[Interface]) -> None:
    """Raise EstimatorError where an estimator inside a part needs the loss or the output's error."""
    for interface in interfaces:
        if interface.needs_end:
            raise EstimatorError(
                f"{interface.description} needs the loss or the output's error, and a model of several rates has no one loss; give an "
                "estimator that learns from the target"
            )


def refuse_traces(recurrences: Sequence[Recurrence]) -> None:
    """Raise EstimatorError where a state inside a part has an exact gradient."""
    for each in recurrences:
        if each.exact is not None:
            raise EstimatorError(
                f"the state at {each.name!r} has no exact gradient with every=: its trace would have to follow the messages to parts of "
                "other rates; give dnifx.estimators.SyntheticState()"
            )


def refuse_shared(programs: Sequence[Program]) -> None:
    """Raise CutError where parts that fire at different rates read the same trainable parameter."""
    owners: dict[str, int] = {}
    for index, program in enumerate(programs):
        for name in (name for part in program.partitions for name in part.uses):
            if owners.setdefault(name, index) != index:
                raise CutError(
                    f"{name!r} is trained by two parts that fire at different rates; give each part parameters of its own, or freeze it"
                )


def refuse_untaught(parts: Sequence[Part], programs: Sequence[Program], messages: Sequence[Message]) -> None:
    """Raise CutError where a part takes messages and trains nothing, so that it runs no backward pass to answer them."""
    for each in messages:
        part, program = parts[each.target], programs[each.target]
        backward = {part.partitions[index] for index in trained(links(program))}
        for index in set(each.boundary.consumers) - backward:
            raise CutError(
                f"submod_{index} takes the messages {each.boundary.name!r} and reads no trainable parameter, so that no gradient of theirs "
                "would come back; unfreeze it, or cut elsewhere"
            )


def refuse_fused(program: Program, mean: bool | None) -> None:
    """Refuse a model that has no fused form.

    Args:
        program: The compiled program.
        mean: Whether all losses average over examples; None where some do and others sum.

    Raises:
        ContextError: Estimators see the targets of single windows.
        LossError: Losses average and sum.
    """
    if program.context is not None:
        raise ContextError(
            f"the estimators of messages see a context ({program.context.description}). It is made of the targets of single windows, "
            "which a forward does not know. Train with net.trainer(...).step(...), or decouple without context="
        )
    if mean is None:
        raise LossError(
            "some losses average over examples and others sum, but a fused forward has one backward pass for all. Train with "
            "net.trainer(...).step(...), or give losses of one reduction"
        )


def refuse_folder(program: Program) -> None:
    """Raise DnifxError where a model has several rates: a package runs one step, and messages are kept over several."""
    if program.parts:
        raise DnifxError(
            "a net with several rates cannot be written to a folder. A package runs one step of one part, and messages are kept over "
            "several windows. Train it here, and write the trained original with its own tools"
        )
