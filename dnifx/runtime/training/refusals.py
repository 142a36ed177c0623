"""What a trainer refuses before its first step."""

from typing import Any

from dnifx.errors import LossError, StateError, nearest
from dnifx.ir import Program


def refuse_results(program: Program) -> None:
    """Raise LossError where a partition before the last leaves a result with a gradient on the model, for a loss to read.

    Such a partition has made its backward pass before the loss is known.
    """
    results = program.signature.results if program.signature is not None else ()
    if not results or program.graph is None or program.parts:
        return
    outputs: Any = program.graph.output_node().args[0]
    for node, path in zip(outputs[-len(results) :], results, strict=True):
        home = program.partition_of.get(node.name, len(program.partitions) - 1)
        if path and home < len(program.partitions) - 1 and program.measures[node.name].requires_grad:
            raise LossError(
                f"forward leaves {path} with a gradient in submod_{home}, which has made its backward pass before the loss is known: a "
                "loss that reads it would not train it. Return it in the output, detach it in forward, or train the net in a loop of "
                "your own (net(x), loss.backward())"
            )


def refuse_refrozen(program: Program) -> None:
    """Raise StateError where parameters were frozen or unfrozen after the module was made: its steps are written for the others."""
    used = {name for partition in program.partitions for name in partition.uses}
    read = {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
    frozen = sorted(used - read)
    idle = [
        boundary.name
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
        if interface.fits and not any(parameter.requires_grad for parameter in interface.estimator.parameters())
    ]
    if frozen or idle:
        what = f"parameters {nearest('', frozen, 3)}" if frozen else f"the estimators of {nearest('', idle, 3)}"
        raise StateError(
            f"{what} were frozen after dnifx.decouple; freeze first, then decouple (or put requires_grad back)"
        )
