"""Emit a folder: the program as a Python package that imports torch and nothing of dnifx."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from dnifx import errors
from dnifx.errors import DnifxError, PassError
from dnifx.ir import CONSTANTS, Program
from dnifx.passes.compiled import why_closed
from dnifx.passes.emit.folder_text import RUNTIME, model_text, written_models
from dnifx.passes.emit.fused import INPUT_MODELS, interface_root
from dnifx.runtime import emitted

if TYPE_CHECKING:
    from dnifx.runtime.net.net import Net

FILES = (
    *("backward", "derivatives", "ends", "fitting", "gradients"),
    *("interface", "loss_scale", "messages", "ops", "windows"),
)
"""Modules of the runtime that generated code may call. They import torch, each other and the errors; a folder holds copies."""


def write_folder(net: "Net", path: str | os.PathLike[str], overwrite: bool) -> None:
    """Write a decoupled module as a package: first beside its place, then moved there as a whole.

    Raises:
        DnifxError: The folder already exists, or a part of the program cannot be written.
    """
    refuse_kept_windows(net.program)
    refuse_attributes(net.program)
    refuse_suffixes(net.program)
    place = Path(path)
    if place.exists() and not overwrite:
        raise DnifxError(f"{place} already exists; give another path, or overwrite=True")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        made = Path(scratch) / place.name
        made.mkdir()
        write_files(net, made)
        if place.exists():
            shutil.rmtree(place)
        made.rename(place)


def write_files(net: "Net", folder: Path) -> None:
    """Write the package's files."""
    graphs = [net.program.fused, *net.program.submodules]
    models = written_models(net)
    (folder / "model.py").write_text(model_text(net, models))
    (folder / "__init__.py").write_text(
        '"""A decoupled model."""\n\nfrom .model import Net, Trainer\n\n__all__ = ["Net", "Trainer"]\n'
    )
    for source in (Path(errors.__file__), *(Path(emitted.__file__).with_name(f"{name}.py") for name in FILES)):
        text = source.read_text().replace(f"from {RUNTIME}", "from .").replace("from dnifx.errors", "from .errors")
        (folder / source.name).write_text(text)
    save_modules(net, [*(graph for graph in graphs if graph is not None), *models.values()], folder / "modules.pt")


def refuse_kept_windows(program: Program) -> None:
    """Raise DnifxError where a step needs more of the earlier windows than the state that they left."""
    for cut in program.recurrents:
        if cut.into_core or cut.auxiliary or cut.trace is not None:
            raise DnifxError(
                f"{cut!r} cannot be written to a folder: into_core and auxiliary run the last window again, and trace goes on "
                "from the trace of that window, but a folder keeps the state alone; decouple without these options"
            )


def refuse_attributes(program: Program) -> None:
    """Raise DnifxError where forward keeps something in attributes: the folder has no model to keep them."""
    kept = program.signature.kept if program.signature is not None else ()
    if kept:
        raise DnifxError(
            f"{type(program.model).__name__} keeps {', '.join(kept[:3])} from call to call, which a folder cannot hold. Take the state "
            "as an argument and return it, or leave results in the output"
        )


def refuse_suffixes(program: Program) -> None:
    """Raise DnifxError where an estimator computes the user's loss: the folder's forward does not hold it."""
    name = next((program.boundaries[each.boundary].name for each in program.interfaces if each.suffix), None)
    if name is not None:
        raise DnifxError(
            f"the suffix on boundary {name!r} computes the loss that dnifx.decouple was given, which a folder does not hold. Train with "
            "the net itself, or give this boundary another estimator, such as dnifx.estimators.LocalLoss()"
        )


def save_modules(net: "Net", graphs: Iterable[fx.Graph], path: Path) -> None:
    """Save the modules, parameters and buffers that graphs name, in plain torch containers under their own paths.

    Raises:
        DnifxError: A module that is kept whole cannot be pickled.
    """
    root = nn.Module()
    root.training = net.training
    roots = interface_root(net.original), interface_root(net.original, INPUT_MODELS)
    keys = [boundary.key for boundary in net.boundaries] + [each.key for each in net.program.recurrences]
    written = {f"{root}.{key}" for root in roots for key in keys}
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
    whole = {str(node.target) for node in nodes if node.op == "call_module"} - written
    single = {str(node.target) for node in nodes if node.op == "get_attr"} - written - whole
    single |= {name for partition in net.partitions for name in partition.parameters} - whole
    for target in (*sorted(whole), *sorted(single)):
        put(root, net, target)
    refuse_closed(root)
    try:
        torch.save(root, path)
    except (AttributeError, TypeError, RuntimeError) as error:
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


def put(root: nn.Module, net: nn.Module, target: str) -> None:
    """Put what a path names into a tree of plain containers, unless a module that is already there holds it."""
    holder, source = root, net
    *parents, name = target.split(".")
    for parent in parents:
        source = getattr(source, parent)
        if parent not in holder._modules:
            container = nn.Module()
            container.training = source.training
            holder.add_module(parent, container)
        holder = getattr(holder, parent)
        if holder is source:
            return
    value: Any = getattr(source, name)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(name, value)
    elif isinstance(value, Tensor):
        holder.register_buffer(name, value, persistent=not target.startswith(CONSTANTS))
    else:
        setattr(holder, name, value)
