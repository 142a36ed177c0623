"""What torch itself compiled: taken out of models, and run as it is written while a model is captured."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dnifx.errors import CaptureError
from dnifx.ir import Program

COMPILED = "_orig_mod"
"""The child under which ``torch.compile(module)`` holds the module."""


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` gave for another one."""
    return COMPILED in module._modules


def why_closed(module: nn.Module) -> str | None:
    """Return why the inside of a module cannot be looked into; None where it can."""
    if issubclass(type(module), torch.jit.ScriptModule):
        return "TorchScript has no Python to look into"
    return "torch.compile was called on it" if is_compiled(module) else None


def without_compilation(program: Program) -> Program:
    """Return the program of the module that was compiled, where the model is what ``torch.compile`` gave for it.

    Raises:
        CaptureError: The model is TorchScript.
    """
    model = program.model
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise CaptureError(
            f"the model {name} is TorchScript, which cannot be cut: it has no Python to look into. Decouple the nn.Module that it was "
            "made from, or a model that holds it as one of its modules, which is then kept whole"
        )
    if not is_compiled(model):
        return program
    note = (
        "the model was compiled by torch.compile; the plain module is decoupled. torch.compile(net) compiles it again"
    )
    return replace(program, model=model.get_submodule(COMPILED), notes=(*program.notes, note))


@contextmanager
def as_written() -> Iterator[None]:
    """Run code as it is written within the block: TorchScript unoptimised, and what torch.compile gave not compiled.

    Optimised code gives other numbers in the last bits, and TorchScript's from its second run on only.
    """
    with ExitStack() as stack:
        jit: Any = torch.jit
        stack.enter_context(jit.optimized_execution(False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
