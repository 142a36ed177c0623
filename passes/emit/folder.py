"""Emit a folder: the program as a Python package that imports torch and nothing of dnifx."""

import os
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from dnifx import errors
from dnifx.errors import DnifxError, PassError
from dnifx.ir import Program
from dnifx.passes.compiled import why_closed
from dnifx.passes.emit.folder_text import RUNTIME, model_roots, model_text, written_models
from dnifx.runtime import emitted
from dnifx.runtime.emitted.ops import held
from dnifx.writing import save, write_whole_folder

if TYPE_CHECKING:
    from dnifx.runtime.net.net import Net

FILES = (
    *("backward", "derivatives", "ends", "finite", "fitting", "gradients"),
    *("interface", "loss_scale", "messages", "ops", "parameter_gradients", "recording", "suffixes", "windows"),
)
"""Modules of the runtime that generated code may call. They import torch, each other and the errors; a folder holds copies."""


def write_folder(net: "Net", path: str | os.PathLike[str], overwrite: bool) -> None:
    """Write a decoupled module as a package: first beside its place, then moved there as a whole.

    Raises:
        DnifxError: The folder already exists, or a part of the program cannot be written.
    """
    refuse_kept_windows(net.program)
    refuse_attributes(net.program)
    place = Path(path)
    if place.exists() and not overwrite:
        raise DnifxError(f"{place} already exists; give another path, or overwrite=True")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole_folder(place, partial(write_files, net))
    except OSError as error:
        raise DnifxError(
            f"{place} cannot be written: {error.strerror or error}; name a folder that can be made"
        ) from error


def write_files(net: "Net", folder: Path) -> None:
    """Write the package's files."""
    graphs = [net.program.fused, *net.program.submodules]
    models = written_models(net)
    (folder / "model.py").write_text(model_text(net, models), encoding="ascii")
    (folder / "__init__.py").write_text(
        '"""A decoupled model."""\n\nfrom .model import Net, Trainer\n\n__all__ = ["Net", "Trainer"]\n',
        encoding="ascii",
    )
    for source in (Path(errors.__file__), *(Path(emitted.__file__).with_name(f"{name}.py") for name in FILES)):
        text = source.read_text(encoding="utf-8").replace(f"from {RUNTIME}", "from .")
        (folder / source.name).write_text(text.replace("from dnifx.errors", "from .errors"), encoding="utf-8")
    save_modules(net, [*(graph for graph in graphs if graph is not None), *models.values()], folder / "modules.pt")


def refuse_kept_windows(program: Program) -> None:
    """Raise DnifxError where a step needs more of the earlier windows than the state that they left."""
    for cut in program.recurrents:
        if cut.into_core or cut.auxiliary or cut.trace is not None:
            raise DnifxError(
                f"{cut!r} cannot be written to a folder: into_core and auxiliary run the last window again, and trace goes on "
                "from the trace of that window, but a folder keeps the state alone; decouple without these options"
            )
    traced = next((each.name for each in program.recurrences if each.exact is not None), None)
    if traced is not None:
        raise DnifxError(
            f"the exact gradient of the state at {traced!r} cannot be written to a folder, which keeps the state alone and not its trace; "
            "train with the net itself, or give this state another estimator, such as dnifx.estimators.SyntheticState()"
        )


def refuse_attributes(program: Program) -> None:
    """Raise DnifxError where forward keeps something in attributes: the folder has no model to keep them."""
    kept = program.signature.kept if program.signature is not None else ()
    if kept:
        raise DnifxError(
            f"{type(program.model).__name__} keeps {', '.join(kept[:3])} from call to call, which a folder cannot hold. Take the state "
            "as an argument and return it, or leave results in the output"
        )


def save_modules(net: "Net", graphs: Iterable[fx.Graph], path: Path) -> None:
    """Save the modules, parameters and buffers that graphs name, in plain torch containers under their own paths.

    Raises:
        DnifxError: A module that is kept whole cannot be pickled.
    """
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
    interfaces = {f"{root}.{key}" for root in model_roots(net.program) for key in net.interface_keys()}
    whole = {str(node.target) for node in nodes if node.op == "call_module"} - interfaces
    read = {str(node.target) for node in nodes if node.op == "get_attr"} - interfaces
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    tree = Tree(net)
    for target in (*sorted(whole), *sorted(read), *(name for name, _ in named)):
        tree.put(target)
    root = tree.root
    refuse_closed(root)
    try:
        save(root, path)
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError) as error:
        kept = ", ".join(sorted({type(module).__name__ for module in root.modules()}))
        raise DnifxError(
            f"the modules of the folder cannot be saved: {error}; define the class of a module that is kept whole where it "
            f"can be imported from (the classes are {kept})"
        ) from error
    own = [path for path, module in root.named_modules() if type(module).__module__.startswith("dnifx")]
    if own:
        raise PassError(f"the folder would need dnifx to load {own[0]!r}")


def refuse_closed(root: nn.Module) -> None:
    """Raise DnifxError where a module is TorchScript or compiled, which cannot be pickled."""
    for path, module in root.named_modules():
        if why_closed(module):
            raise DnifxError(
                f"the module {path!r} cannot be saved in a folder: {why_closed(module)}, and pickle does not take it. Hold the "
                "nn.Module that it was made from instead, and decouple the model again"
            )


class Tree:
    """A copy of a module and its children as plain containers, which hold the very parameters, buffers and whole modules.

    A module that has two names in the net has two names in the copy.

    Args:
        net: The module.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.copies: dict[int, nn.Module] = {}
        self.root = self.container(net)

    def container(self, module: nn.Module) -> nn.Module:
        """Return the container that stands for a module."""
        if id(module) not in self.copies:
            made = self.copies[id(module)] = nn.Module()
            made.training = module.training
            made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        return self.copies[id(module)]

    def put(self, target: str) -> None:
        """Put what a path names into the tree, unless a module that is kept whole holds it."""
        holder, source = self.root, self.net
        *parents, name = target.split(".")
        for parent in parents:
            source = source._modules[parent]  # type: ignore[assignment]
            holder = holder._modules.setdefault(parent, self.container(source))  # type: ignore[assignment]
            if holder is source:
                return
        value: Any = held(source, name)
        if isinstance(value, nn.Module):
            self.copies[id(value)] = holder._modules[name] = value
        elif name in source._parameters:
            holder._parameters[name] = value
        elif name in source._buffers:
            holder._buffers[name] = value
        else:
            setattr(holder, name, value)
