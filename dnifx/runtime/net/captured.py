"""The graphs of one part of a net, captured for each input kind that it meets."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dnifx.errors import InputError, PassError
from dnifx.ir import CONSTANTS, Part, Program
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.input_kinds import InputKind, hold_constants, what_is_read

Recompile = Callable[[Program, tuple[Any, ...], Mapping[str, Any], int], Program]
MOST_INPUT_KINDS = 16
"""How many kinds of inputs one part captures before it says that something changes that should not."""


class CapturedPart:
    """One part of a net with its graphs, which run on the net's own modules.

    Args:
        part: What the part is.
        program: Its program.
        net: The module that holds parameters, buffers, children and estimators.
        mean: Whether gradients are means over examples (else sums).
        recompile: Compiles the program again for another input kind: (program, args, kwargs, its number) to a program.

    Attributes:
        input_kinds: What was captured so far. The example's is the first.
    """

    def __init__(self, part: Part, program: Program, net: nn.Module, mean: bool, recompile: Recompile) -> None:
        self.part, self.program, self.net, self.mean, self.recompile = part, program, net, mean, recompile
        self.input_kinds: list[InputKind] = []

    def capture(self, program: Program) -> InputKind:
        """Attach a program's graphs to the net, as one more input kind."""
        if program.fused is None or program.signature is None:
            raise PassError("the program was not emitted; run all passes first")
        if program.constants:
            if CONSTANTS not in self.net._modules:
                self.net.add_module(CONSTANTS, nn.Module())
            hold_constants(self.net.get_submodule(CONSTANTS), program.constants)
        made = InputKind(
            program,
            program.signature,
            program.signature.key(program.args, program.kwargs),
            attach(program.fused, self.net, f"Fused{type(program.model).__name__}"),
            tuple(
                attach(graph, self.net, partition.name)
                for graph, partition in zip(program.submodules, program.partitions, strict=True)
            ),
        )
        self.input_kinds.append(made)
        return made

    def matching(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[InputKind]:
        """Yield the input kinds that a call may run in; the last one is compiled for this very call.

        Raises:
            InputError: There are too many, or the cuts cannot be found again in a new one.
        """
        if torch.compiler.is_compiling():
            yield self.input_kinds[0]
            return
        for input_kind in tuple(self.input_kinds):
            if input_kind.signature.key(args, kwargs) == input_kind.key:
                yield input_kind
        if len(self.input_kinds) >= MOST_INPUT_KINDS:
            raise InputError(
                f"{type(self.program.model).__name__} has met {MOST_INPUT_KINDS} kinds of inputs. Each structure, fixed value and mode "
                f"is captured by itself. Pass what changes from call to call as tensors{what_is_read(self.input_kinds)}"
            )
        yield self.capture(self.recompile(self.program, args, kwargs, len(self.input_kinds)))
