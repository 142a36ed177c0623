"""The text of an emitted folder: ``model.py``, with the model, its interfaces and a training step."""

import importlib.metadata
import math
import pathlib
import pprint
import textwrap
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError, DnifxError, PassError
from dnifx.estimators.suffix import SuffixGradient
from dnifx.ir import Program, TensorSpec
from dnifx.passes.capture.symbolic import PathTracer
from dnifx.passes.emit.blocks import local
from dnifx.passes.emit.code import function_code, import_block, note, partition_code
from dnifx.passes.emit.folder_suffixes import ATTRIBUTE, LOSSES, compares, suffix_code, suffixes, thin_graph
from dnifx.passes.emit.fused import INPUT_MODELS, interface_root, provenance
from dnifx.passes.emit.step import StepWriter
from dnifx.passes.graph import flat_output, input_names
from dnifx.passes.measure import data_inputs
from dnifx.runtime.emitted import backward, ends, finite, fitting, loss_scale, ops, windows
from dnifx.runtime.emitted.gradients import own_gradients, predicted_gradients
from dnifx.runtime.emitted.source import Source, source_of
from dnifx.runtime.emitted.text import attribute, docstring, literal
from dnifx.runtime.training.finite import statistics_of
from dnifx.runtime.training.optimizers import fitted_in_time, fitted_parameters

if TYPE_CHECKING:
    from dnifx.runtime.net.net import Net

RUNTIME = "dnifx.runtime.emitted."
GIVEN = "given"
"""In the meta of an input of an estimator that is no value: what it takes, the context or the mask."""

SCALE = "LossScale(self.loss_scale)"

WINDOW = """self.window = types.SimpleNamespace(mask=None)  # mask: which examples begin an episode, [batch]
        """

HEAD = '''"""{title}

Written by dnifx {version}; imports torch and nothing of dnifx. ``Net`` is the model with its interfaces. Train it in any
loop: ``net({inputs}{context})``, then ``loss.backward()``. Or let ``Trainer`` run a training step action by action, with one
optimizer for each partition. An update whose gradient is not finite is not made: it is an error, or, with
``on_nonfinite="skip"``, it is left out and ``trainer.finite.skipped`` names it.

{summary}
"""
'''

BODY = '''

class Net(torch.nn.Module):
    """The model as one graph, with its interfaces; its modules and weights come from ``modules.pt``."""

    def __init__(self):
        super().__init__()
        {suffix_loss}self.loss_scale = 1.0  # what a loop multiplies the loss by: a number, a tensor or a callable
        stored = torch.load(pathlib.Path(__file__).parent / "modules.pt", weights_only=False)
        self.__dict__.update(stored.__dict__)

    def forward(self, {inputs}{context}):
        """Return the model's output; takes its tensors by position."""
        {need_target}return unflatten({fused})

{methods}

def unflatten(values):
    """Return the model's output in its own structure."""
    leaves = [values[leaf] if kind == "value" else leaf for kind, leaf in LEAVES]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(OUTPUT))


class Trainer:
    """Runs training steps; ``optimizer`` makes an optimizer from parameters, ``loss`` compares (output, target)."""

    def __init__(self, net, optimizer, loss, estimator_optimizer=None, on_nonfinite="raise"):
        self.net = net
        self.loss = loss
        {told_loss}self.unflatten = unflatten
        parameters = dict(net.named_parameters(remove_duplicate=False))
        self.parameter = parameters.__getitem__
        {window}for name in (*PARTITIONS, *MODELS):
            setattr(self, name, getattr(net, name))
        self.optimizers = {{
            name: optimizer([parameters[path] for path in paths]) for name, paths in PARTITIONS.items() if paths
        }}
        make = estimator_optimizer or optimizer
        self.estimator_optimizers = {{
            key: make([parameters[path] for path in paths]) for key, paths in ESTIMATORS.items() if paths
        }}
        buffers = dict(net.named_buffers(remove_duplicate=False))
        statistics = {{name: [buffers[path] for path in paths] for name, paths in BUFFERS.items()}}
        self.finite = FiniteUpdates({{**self.optimizers, **self.estimator_optimizers}}, statistics, on_nonfinite)

    def features(self, context):
        """Return the context as the estimators see it."""
        return {features}

    def compute_loss(self, output, target):
        """Return the scalar loss."""
        return example_losses(self.loss(output, target), mean={mean})

    def compute_losses(self, output, target, examples):
        """Return the scalar loss, and the loss of each example."""
        loss = self.loss(output, target)
        return example_losses(loss, mean={mean}), losses_of(loss, examples, mean={mean})

    @watched
{step}'''


def model_text(net: "Net", models: Mapping[str, fx.Graph]) -> str:
    """Return the text of model.py; ``models`` are what ``written_models`` returns."""
    program = net.program
    if program.fused is None or program.schedule is None or program.signature is None:
        raise PassError("the program was not emitted; run all passes first")
    called = [pair for file in (backward, ends, fitting, loss_scale, ops, windows) for pair in vars(file).items()]
    imports = {name: value for name, value in called if getattr(value, "__module__", "").startswith(RUNTIME)}
    imports |= {"FiniteUpdates": finite.FiniteUpdates, "watched": finite.watched}
    imports |= {"pathlib": pathlib, "pytree": pytree, "types": types}
    reached = partial(method, model_roots(program), net.interface_keys())
    methods = [function_code(program.fused, "fused", "the fused program", program, imports, reached)]
    methods += partition_code(program, imports)
    thin, paths = suffixes(program), {id(each): path for path, each in net.named_parameters()}
    for name, graph in models.items():
        if name in thin:
            root, named = model_roots(program)[0], lambda each: paths[id(each)]
            methods.append(suffix_code(program, name, graph, root, net.mean, imports, named))
        else:
            methods.append(interface_code(program, name, graph, imports))
    methods += [LOSSES[compares(program)]] if thin else []
    body = BODY.format(
        inputs=", ".join(map(local, program.signature.inputs)),
        context=(", context" if program.context else "")
        + (", reset=None" if program.recurrences else "")
        + (", target=None" if compares(program) else ""),
        suffix_loss=ATTRIBUTE if thin else "",
        need_target="need_target(target)\n        " if compares(program) else "",
        told_loss="net.suffix_loss = loss\n        " if thin else "",
        fused=fused_call(program, models),
        window=WINDOW if program.recurrences else "",
        methods=textwrap.indent("\n\n".join(methods), "    "),
        features=features_text(program),
        mean=net.mean,
        step=textwrap.indent(StepWriter(program, program.schedule, net.mean).source(), "    "),
    )
    head = HEAD.format(
        title=docstring(f"{type(program.model).__name__}, decoupled into {len(program.partitions)} partitions."),
        version=importlib.metadata.version("dnifx"),
        inputs=", ".join(map(local, program.signature.inputs)),
        context=(", context" if program.context else "") + (", target=target" if compares(program) else ""),
        summary="\n".join(
            docstring(provenance(*each)) for each in zip(program.boundaries, program.interfaces, strict=True)
        ),
    )
    block = import_block(imports, body).replace(f"from {RUNTIME}", "from .")
    return f"{head}\n{block}\n\n\n{tables(net, models)}{body}"


def method(roots: Sequence[str], keys: Sequence[str], path: str) -> str:
    """Return the expression of what ``self`` holds at a path; estimators and input models are methods."""
    root, _, key = path.partition(".")
    if root in roots and key in keys:
        return f"self.{('estimate_', 'imagine_')[roots.index(root)]}{key}"
    return attribute(path)


def model_roots(program: Program) -> tuple[str, str]:
    """Return the paths below which estimators and input models lie in the decoupled module."""
    return interface_root(program.model), interface_root(program.model, INPUT_MODELS)


def fused_call(program: Program, models: Mapping[str, fx.Graph]) -> str:
    """Return the expression of the fused program's flat outputs. If the loss is predicted, a forward refuses to train."""
    context = ("context",) if program.context is not None else ()
    reset = ("reset",) if program.recurrences else ()
    asks = {own_gradients, predicted_gradients}
    inside = any(node.target in asks for graph in models.values() for node in graph.nodes)
    target = ("target",) if compares(program) else ()
    given = ", ".join((*map(local, input_names(program)), *context, *target, *reset, SCALE))
    call = f"differentiating(self.fused, {given})" if inside else f"self.fused({given})"
    critic = next((each.boundary for each in program.interfaces if each.needs_loss), None)
    if critic is None or program.recurrences:
        return call
    return f"scheduled_alone({call}[0], {literal(program.boundaries[critic].name)})"


def tables(net: "Net", models: Mapping[str, fx.Graph]) -> str:
    """Return the constants of the package: output structure, and who owns which parameter."""
    paths = {id(parameter): path for path, parameter in net.named_parameters()}
    fitted = [(b.key, fitted_parameters(i)) for b, i in zip(net.boundaries, net.program.interfaces, strict=True)]
    fitted += [(each.key, fitted_in_time(each)) for each in net.program.recurrences]
    buffers = {id(each): path for path, each in net.named_buffers()}
    spec, leaves = output_structure(net.program)
    shown = {
        "OUTPUT": spec,
        "LEAVES": leaves,
        "PARTITIONS": {partition.name: list(partition.parameters) for partition in net.partitions},
        "ESTIMATORS": {key: [paths[id(each)] for each in parameters] for key, parameters in fitted if parameters},
        "BUFFERS": {
            name: [buffers[id(each)] for each in found if id(each) in buffers]
            for name, found in statistics_of(net.program).items()
            if found
        },
        "MODELS": tuple(models),
    }
    return "".join(f"{name} = {constant(value)}\n" for name, value in shown.items())


def constant(value: Any) -> str:
    """Return a table of strings and numbers as the text of a constant."""
    text = pprint.pformat(value, width=110, sort_dicts=False)
    return text.encode("ascii", "backslashreplace").decode("ascii")  # other letters stand in strings alone


def output_structure(program: Program) -> tuple[str, list[Any]]:
    """Return the output's pytree structure as text, and for each leaf the place of its value, or its constant value.

    Raises:
        DnifxError: Plain torch does not know a type in the output.
    """
    if program.signature is None:
        raise PassError("the program has no signature; run all passes first")
    places = [torch.empty(0) for _ in flat_output(program.submodules[-1])]
    leaves, spec = pytree.tree_flatten(program.signature.unflatten(tuple(places)))
    order = {id(place): index for index, place in enumerate(places)}
    found = [("value", order[id(leaf)]) if id(leaf) in order else ("always", leaf) for leaf in leaves]
    wrong = [leaf for kind, leaf in found if kind == "always" and not is_plain(leaf)]
    named = pytree.treespec_dumps(spec) if not wrong else ""
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
    own = ("builtins", "collections", "torch")
    foreign = [name for name, kind in known if kind.__module__.partition(".")[0] not in own]
    if wrong or any(f'"{name}"' in named for name in foreign):
        raise DnifxError(
            f"the output of {type(program.model).__name__} has a type that torch does not know, and a folder, which imports torch "
            "alone, cannot build it; return tensors in tuples, lists or dicts"
        )
    return named, found


def is_plain(leaf: Any) -> bool:
    """Whether a value can be written and read back as it is."""
    return type(leaf) in (bool, int, str, type(None)) or (type(leaf) is float and math.isfinite(leaf))


def features_text(program: Program) -> str:
    """Return the expression of the context's features."""
    if program.context is None or not program.boundaries:
        return "None"
    dtype = program.boundaries[0].specs[0].dtype
    if program.context.classes is not None:
        return f"torch.nn.functional.one_hot(context, {program.context.classes}).to({dtype})"
    return f"context.to({dtype})"


def written_models(net: "Net") -> dict[str, fx.Graph]:
    """Return estimators and input models as graphs, by the name of the method that they become."""
    program = net.program
    root, imagined = model_roots(program)
    inputs = tuple(program.measures[name].tensors[0] for name in data_inputs(program))
    context, models = program.context is not None, {}
    for boundary, each in zip(program.boundaries, program.interfaces, strict=True):
        key, sees = boundary.key, context or each.needs_error
        if isinstance(each.estimator, SuffixGradient):
            models[f"estimate_{key}"] = thin_graph(each.estimator, f"{root}.{key}")
        elif each.blends or not each.locked:
            masked = each.needs_mask and program.mask is not None
            models[f"estimate_{key}"] = traced_model(each.estimator, f"{root}.{key}", boundary.specs, sees, masked)
        if each.input_model is not None:
            models[f"imagine_{key}"] = traced_model(each.input_model, f"{imagined}.{key}", inputs, context)
    for state in program.recurrences:
        if state.interface is not None and not state.interface.locked:
            path = f"{root}.{state.key}"
            models[f"estimate_{state.key}"] = traced_model(state.interface.estimator, path, state.specs, False)
    return models


def traced_model(
    model: nn.Module, path: str, specs: tuple[TensorSpec, ...], sees: bool, masked: bool = False
) -> fx.Graph:
    """Return an estimator or input model as a graph over the paths that it has in the decoupled module.

    It takes values of the ``specs``, a context if it ``sees`` one, and the mask if ``masked``.

    Raises:
        CaptureError: torch.fx cannot trace it.
    """
    values = tuple(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs)
    features = torch.empty(1, device="meta") if sees else None
    given = (values, features, torch.empty(1, device="meta")) if masked else (values, features)
    try:
        graph = PathTracer(model, given, {}, {}).trace(model)
    except Exception as error:
        raise CaptureError(
            f"{path} ({type(model).__name__}) cannot be written to a folder, since torch.fx cannot trace its forward: "
            f"{type(error).__name__}: {error}"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.{node.target}"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(reversed(inputs), ["mask"] * masked + ["context"] * sees, strict=False):
        node.meta[GIVEN] = name
    return graph


def interface_code(program: Program, name: str, graph: fx.Graph, imports: dict[str, Any]) -> str:
    """Return an estimator or input model as a method of (values, context), and of the mask if it takes one."""
    told = (
        "Return one gradient for each value." if name.startswith("estimate_") else "Predict the values from the inputs."
    )
    source = source_of(graph, note=lambda node: note(node, program))
    imports.update(source.named)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    given = {node.meta[GIVEN]: node.name for node in inputs if GIVEN in node.meta}
    taken = {node.name for node in graph.nodes}
    values, context = ("values_" if "values" in taken else "values"), given.get("context", "_")
    parameters = [values, f"{context}=None", *(f"{given[name]}=None" for name in ("mask",) if name in given)]
    unpacked = "".join(f"{node.name}, " for node in inputs if GIVEN not in node.meta).rstrip()
    return Source(tuple(parameters), (f'"""{told}"""', f"{unpacked} = {values}", *source.body), {}).function(name)
