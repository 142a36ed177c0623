"""Suffix: what stands behind a boundary, made thin, as the boundary's estimator."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dnifx.errors import EstimatorError
from dnifx.estimators.suffix import Suffix, SuffixGradient
from dnifx.ir import Boundary, Interface, Program, TensorSpec
from dnifx.passes.flops import OperationCounter
from dnifx.passes.graph import captured, flat_output, listed
from dnifx.passes.insert.suffix_graph import Thin, dependent, pooled, thin_suffix
from dnifx.passes.insert.written import as_written
from dnifx.passes.measure import NEEDS_VALUES, node_parameters
from dnifx.runtime.emitted.ops import held
from dnifx.runtime.emitted.suffixes import Mirror
from dnifx.runtime.net.attach import attach_values
from dnifx.runtime.net.losses import Loss

POOLS = (2, 4)
"""By how many pixels a side images on a boundary are averaged, where the thin suffix would cost too much."""


def suffix_interface(boundary: Boundary, options: Suffix, program: Program, loss: Loss | None, mean: bool) -> Interface:
    """Return the interface of a boundary whose estimator is a thin suffix.

    Args:
        boundary: The boundary.
        options: How thin.
        program: A program with partitions and boundaries.
        loss: (output, target) to a scalar or one loss an example; None where the model's first output is its loss.
        mean: Whether the loss averages over examples (else it sums).

    Raises:
        EstimatorError: No suffix can be made, or there is no loss.
    """
    if program.carries:
        raise EstimatorError(
            f"boundary {boundary.name!r}: a suffix sees one window alone, and this model is cut in time; give dnifx.estimators.Synthetic()"
        )
    compute, outside = suffix_loss(boundary, program, loss)
    thin = within_budget(boundary, options, program)
    holder, copies = own_modules(program, thin.graph)
    mirrors = mirrored(program, thin, options, copies)
    for mirror in mirrors:
        mirror.copy.requires_grad_(False)
    names = {id(each): name for name, each in program.model.named_parameters()}
    module = attach_values(thin.graph, holder, "ThinSuffix")
    estimator = SuffixGradient(module, compute, mean, mirrors, options.refresh, thin.draws)
    estimator.train(program.model.training)
    fits = any(parameter.requires_grad for parameter in estimator.parameters())
    return Interface(
        boundary.index,
        estimator,
        as_written(options),
        fits=fits,
        detail=described(boundary, thin),
        fit="own",
        needs_target=False,
        reads=thin.reads,
        suffix=thin.text,
        needs_answer=outside,
        flops=round(thin.share * suffix_flops(boundary, program)),
        mirrors=tuple(names[id(mirror.source)] for mirror in mirrors),
        refresh=estimator.period,
    )


def same_suffix(interface: Interface, boundary: Boundary, options: Suffix, program: Program) -> Interface:
    """Return the interface of an earlier compilation for a boundary of another input kind: the same suffix, read elsewhere.

    Raises:
        EstimatorError: Another suffix stands behind the boundary there.
    """
    thin = within_budget(boundary, options, program)
    if thin.text != interface.suffix:
        raise EstimatorError(
            f"boundary {boundary.name!r}: for these inputs the model computes something else behind the boundary, and its suffix was made "
            "for the first kind of inputs. Decouple with an example of this call, or give another estimator"
        )
    return replace(interface, boundary=boundary.index, reads=thin.reads)


def described(boundary: Boundary, thin: Thin) -> str:
    """Return a suffix in words: what it keeps, and what it costs."""
    keeps = f"keeps {listed(thin.kept)}" if thin.kept else "keeps no block"
    leaves = f", leaves out {listed(thin.removed)}" if thin.removed else ""
    images = f", averages images over {thin.pool} x {thin.pool} pixels" if thin.pool > 1 else ""
    return f"the suffix of {boundary.name!r} {keeps}{leaves}{images}: {thin.share:.0%} of the FLOPs behind the cut"


@dataclass(frozen=True)
class FlatLoss:
    """The user's loss, from a model's flat outputs.

    Attributes:
        unflatten: From the flat outputs to the output.
        loss: (output, target) to a scalar or one loss an example; None: the first of the flat outputs is the loss.
    """

    unflatten: Callable[[tuple[Any, ...]], Any]
    loss: Loss | None

    def __call__(self, outputs: tuple[Any, ...], target: Any) -> Tensor:
        """Return the loss."""
        if self.loss is not None:
            return self.loss(self.unflatten(outputs), target)
        first: Tensor = outputs[0]
        return first


def suffix_loss(boundary: Boundary, program: Program, loss: Loss | None) -> tuple[FlatLoss, bool]:
    """Return the loss of the flat outputs, and whether it compares them with a target.

    Raises:
        EstimatorError: There is none.
    """
    if program.signature is None:
        raise EstimatorError("the program has no signature; run capture first")
    if loss is not None:
        return FlatLoss(program.signature.unflatten, loss), True
    first = flat_output(captured(program))[0]
    measure = program.measures[first.name] if isinstance(first, fx.Node) else None
    if measure is None or not measure.is_tensor or not measure.requires_grad or measure.tensors[0].elements != 1:
        raise EstimatorError(
            f"boundary {boundary.name!r}: a suffix gives the gradient of the loss, and none is known. Give dnifx.decouple(..., loss=...), "
            "or let the model return its loss first"
        )
    return FlatLoss(program.signature.unflatten, None), False


def within_budget(boundary: Boundary, options: Suffix, program: Program) -> Thin:
    """Return the thin suffix, with its images averaged as far as the budget needs it and the output allows.

    Raises:
        EstimatorError: It does not run.
    """
    thin, whole = thin_suffix(boundary, options, program), max(suffix_flops(boundary, program), 1)
    thin = replace(thin, share=thin.flops / whole)
    specs = [program.measures[name].tensors for name in (*boundary.values, *thin.reads)]
    if any(
        len(each) != 1 for each in specs
    ):  # it reads a size or another plain value, which fake tensors do not stand for
        return thin
    try:
        plain = run_on_fakes(program, thin.graph, specs)
    except Exception as error:
        raise EstimatorError(
            f"boundary {boundary.name!r}: its suffix does not run without the blocks that were left out ({type(error).__name__}: {error}). "
            "Keep them with dnifx.estimators.Suffix(blocks=...), or give dnifx.estimators.Synthetic()"
        ) from error
    whole_images = thin.graph
    for pool in POOLS if plain is not None and any(spec.is_image for spec in boundary.specs) else ():
        if thin.share <= options.budget:
            break
        graph = pooled(whole_images, boundary, pool)
        with suppress(Exception):  # smaller images do not go through it
            found = run_on_fakes(program, graph, specs)
            if found is not None and plain is not None and found.shapes == plain.shapes:
                thin = replace(thin, graph=graph, pool=pool, share=found.flops / whole)
    return thin


def suffix_flops(boundary: Boundary, program: Program) -> int:
    """Return the FLOPs of all that depends on a boundary's values."""
    behind = dependent(captured(program), set(boundary.values))
    return sum(program.measures[node.name].flops for node in behind if node.op != "output")


@dataclass(frozen=True)
class Trial:
    """What a run on fake tensors gave: its FLOPs, and the shapes of its outputs."""

    flops: int
    shapes: tuple[Any, ...]


def run_on_fakes(program: Program, graph: fx.Graph, specs: Sequence[tuple[TensorSpec, ...]]) -> Trial | None:
    """Run a thin suffix on fake tensors; None where it needs the values of its tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    holder, _ = own_modules(program, graph, mode)
    counter = OperationCounter()
    try:
        with mode, torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            given = [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for (spec,) in specs]
            outputs = attach_values(graph, holder, "ThinSuffix")(*given)
    except NEEDS_VALUES:
        return None
    return Trial(counter.flops, tuple(tuple(each.shape) if isinstance(each, Tensor) else None for each in outputs))


def own_modules(
    program: Program, graph: fx.Graph, mode: FakeTensorMode | None = None
) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Return copies of what a graph names of the model, by path, and the copies of parameters and buffers by the id of their source.

    Args:
        program: The program.
        graph: The graph.
        mode: If given, copies are fake.
    """
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    found = {target: named(program, target) for target in sorted(targets)}
    sources = {
        id(each): each
        for value in found.values()
        for each in ([*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value])
        if isinstance(each, Tensor)
    }
    memo: dict[int, Any] = {}
    for key, source in sources.items():
        made: Any = source.detach().clone() if mode is None else mode.from_tensor(source.detach())
        memo[key] = nn.Parameter(made, source.requires_grad) if isinstance(source, nn.Parameter) else made
    copies = copy.deepcopy(found, memo)
    for value in copies.values():
        for module in value.modules() if isinstance(value, nn.Module) else ():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
    return copies, {key: memo[key] for key in sources}


def named(program: Program, target: str) -> Any:
    """Return what a path names: a constant of the graph, or what the model holds there."""
    if target in program.constants:
        return program.constants[target]
    return held(program.model, *target.split("."))


def mirrored(program: Program, thin: Thin, options: Suffix, copies: Mapping[int, Tensor]) -> list[Mirror]:
    """Return what of a thin suffix is copied from the model: a shared readout, and averages of the kept blocks. Buffers are its own."""
    found: dict[int, Mirror] = {}
    for node in thin.graph.nodes:
        shared = node.name in thin.readout and options.readout == "shared"
        if not shared and (options.decay is None or node.name in thin.readout):
            continue
        for source in node_parameters(program, node).values():
            decay = None if shared else options.decay
            found[id(source)] = Mirror(copies[id(source)], source, decay)
    return list(found.values())
