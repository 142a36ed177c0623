"""Messages: what crosses from one part to parts that fire less often, and the interfaces there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from dnifx.errors import CutError
from dnifx.ir import Boundary, Context, Interface, Message, Part, Program, TensorSpec, free_name, identifier
from dnifx.passes.insert.interfaces import Choice, make_interface
from dnifx.passes.legalize.legalize import cut_name
from dnifx.passes.rates.rated import BATCH, RatedProgram
from dnifx.passes.rates.refusals import refuse_waiting


def find_messages(rated: Mapping[int, RatedProgram], formed: Sequence[tuple[Part, Program]]) -> list[Message]:
    """Return what crosses from each part to each slower one, by the partition that makes it; no interface stands there yet.

    Args:
        rated: By rate, the model captured from as many windows.
        formed: The parts, their partitions and boundaries formed.

    Raises:
        CutError: A value is not one message a window, or two parts have boundaries of one name.
    """
    taken = boundary_keys([program for _, program in formed])
    first = sum(len(program.boundaries) for _, program in formed)
    found: list[Message] = []
    for fast, _ in formed:
        here = rated[fast.every]
        for slow, program in formed[fast.index + 1 :]:
            given, received = (each.crossing(fast.every, slow.every) for each in (here, rated[slow.every]))
            specs = agreeing(rated, fast, slow, given, received)
            groups: dict[int, list[int]] = {}
            for number, (node, spec) in enumerate(zip(given, specs, strict=True)):
                if spec.requires_grad:
                    groups.setdefault(here.program.partition_of[node.name], []).append(number)
            names, gives = [take.name for take in slow.takes], here.gives(fast.every)
            for producer, numbers in groups.items():
                inputs = [received[number].name for number in numbers]
                consumers = [slow.partitions[each.index] for each in program.partitions if {*inputs} & {*each.inputs}]
                name = free_name(cut_name(here.program, given[numbers[0]]), taken)
                taken.add(identifier(name))
                boundary = Boundary(
                    first + len(found),
                    name,
                    producer,
                    tuple(consumers),
                    tuple(given[number].name for number in numbers),
                    tuple(seen_spec(specs[number]) for number in numbers),
                    slow.every // fast.every,
                )
                found.append(
                    Message(
                        boundary,
                        fast.index,
                        slow.index,
                        tuple(gives.index(given[number]) for number in numbers),
                        tuple(map(names.index, inputs)),
                        here.rates[consumers[0]].scale,
                    )
                )
    return found


def seen_spec(spec: TensorSpec) -> TensorSpec:
    """Return the spec of the messages of a firing as an estimator sees them: all messages of all examples, one by one."""
    return replace(spec, shape=(spec.shape[0] * spec.shape[1], *spec.shape[2:]))


def boundary_keys(programs: Sequence[Program]) -> set[str]:
    """Return the identifiers of the boundaries inside parts.

    Raises:
        CutError: Two parts have boundaries of one name.
    """
    taken: set[str] = set()
    for program in programs:
        named = [*((b.key, b.name) for b in program.boundaries), *((r.key, r.name) for r in program.recurrences)]
        for key, name in named:
            if key in taken:
                raise CutError(f"two parts have a boundary named {name!r}; give the cuts other names")
            taken.add(key)
    return taken


def agreeing(
    rated: Mapping[int, RatedProgram], fast: Part, slow: Part, here: list[fx.Node], there: list[fx.Node]
) -> list[TensorSpec]:
    """Return the specs of what one firing of the fast part gives, after making sure that the slow part takes k of each.

    Raises:
        CutError: It does not.
    """
    few = [rated[fast.every].program.measures[node.name].tensors[0] for node in here]
    for node, spec in zip(here, few, strict=True):
        if spec.requires_grad and len(spec.shape) <= BATCH + 1:
            raise CutError(
                f"{node.name!r} crosses to the part that fires every {slow.every} windows, and is {spec}; a message is [windows, batch, "
                "features, ...]: let inputs and messages lead with time, a single step being one window"
            )
    many = [rated[slow.every].program.measures[node.name].tensors[0] for node in there]
    count = slow.every // fast.every
    wanted = [(count * spec.shape[0], *spec.shape[1:]) if len(spec.shape) > BATCH else None for spec in few]
    if wanted != [spec.shape for spec in many]:
        shown = [", ".join(map(str, specs)) for specs in (few, many)]
        raise CutError(
            f"what crosses to the part that fires every {slow.every} windows is {shown[0]} in {fast.every} of them and {shown[1]} in "
            f"{slow.every}; expected {count} times as many messages: let inputs and messages lead with time ([windows, batch, ...]), so "
            "that windows can be laid end to end"
        )
    return few


def message_interface(each: Message, choice: Choice, context: Context | None, program: Program) -> Interface:
    """Build the interface of messages.

    Args:
        each: The messages.
        choice: The estimator.
        context: What the estimator sees beside the messages.
        program: The part that gives.

    Raises:
        EstimatorError: The estimator waits for the target, or needs what no message brings.
    """
    interface = make_interface(each.boundary, choice, context, program, each.boundary.specs[0].shape[0])
    refuse_waiting(each.boundary, interface)
    return interface
