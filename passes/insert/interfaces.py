"""Insert: build and check an estimator for each boundary, and the context that it sees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from dnifx.errors import ContextError, DnifxError, EstimatorError, InputError, nearest
from dnifx.estimators import (
    BY_NAME,
    IN_TIME,
    Auto,
    BoundarySpec,
    Factory,
    GradientEstimator,
    InputSpec,
    Suffix,
    SyntheticInput,
)
from dnifx.ir import Boundary, Context, Interface, Program, TensorSpec
from dnifx.passes.cuts.resolve import glob_matches
from dnifx.passes.graph import captured, flat_output, input_names
from dnifx.passes.insert.answers import check_estimates
from dnifx.passes.insert.contexts import make_context
from dnifx.passes.insert.routed import data_rows, refuse_routed, with_other_rows
from dnifx.passes.insert.suffix import same_suffix, suffix_interface
from dnifx.passes.insert.unbatched import warn_without_batch
from dnifx.passes.insert.weight import warn_of_weight
from dnifx.passes.insert.written import as_written
from dnifx.passes.measure import batch_input, data_inputs
from dnifx.passes.pipeline import Pass
from dnifx.runtime.net.losses import Loss

Choice = str | Factory
Choices = Choice | Mapping[str, Choice]
InputFactory = Callable[[InputSpec], nn.Module]
InputChoice = str | InputFactory
InputChoices = InputChoice | Mapping[str, InputChoice] | None
Chosen = TypeVar("Chosen")
Spec = TypeVar("Spec", BoundarySpec, InputSpec)


@dataclass(frozen=True)
class InsertInterfaces(Pass):
    """Put an interface on every boundary.

    Attributes:
        gradient: An estimator, its name, a factory, or one of these for each boundary by name or glob.
        mask: Name of the input [batch, length] that is non-zero for tokens that count. Padding neither trains an estimator nor
            receives a gradient from it.
        context: None, ``"label"``, or a callable from what is passed as context to features [batch, ..., width].
        num_classes: Number of classes of a label; the width of a callable's features.
        inputs: Synthetic input models: None, ``"synthetic"``, a factory, or one of these for some boundaries.
        existing: Interfaces of an earlier compilation of the same model to use again, by boundary name.
        loss: The loss of the model's output, for suffixes.
        mean: Whether it averages over examples (else it sums).
    """

    gradient: Choices = "synthetic"
    context: str | Callable[[Any], Tensor] | None = None
    num_classes: int | None = None
    inputs: InputChoices = None
    mask: str | None = None
    existing: Mapping[str, Interface] = field(default_factory=dict)
    loss: Loss | None = None
    mean: bool = True
    name: ClassVar[str] = "insert"
    requires: ClassVar[tuple[str, ...]] = ("partitions",)

    def run(self, program: Program) -> Program:
        """Build one interface for each boundary."""
        context = make_context(self.context, self.num_classes)
        check_mask(self.mask, program)
        check_mask_shape(self.mask, program)
        program = replace(program, context=context, mask=self.mask)
        choices = assign(self.gradient, program.boundaries)
        models = assign_inputs(self.inputs, program.boundaries)
        interfaces = tuple(
            with_input_model(
                self.interface(boundary, choices[boundary.name], program), models.get(boundary.name), program, context
            )
            for boundary in program.boundaries
        )
        if not self.existing and (program.recurrences or not all(each.locked for each in interfaces)):
            warn_without_batch(program)
        if not self.existing:
            named = [each for each in interfaces if isinstance(choices[program.boundaries[each.boundary].name], str)]
            warn_of_weight(program, named)
            told = (*(each.detail for each in interfaces if each.detail), *hints(choices, self.loss))
            program = replace(program, notes=(*program.notes, *told))
        return replace(program, interfaces=interfaces)

    def interface(self, boundary: Boundary, choice: Choice, program: Program) -> Interface:
        """Return the interface of one boundary: that of an earlier compilation, a suffix, or one with an estimator of its own."""
        factory, known = find_factory(choice, boundary), self.existing.get(boundary.name)
        thin = factory.suffix if isinstance(factory, Auto) else factory
        if known is not None and isinstance(thin, Suffix) and known.suffix:
            return same_suffix(known, boundary, thin, program)
        if known is not None:
            return replace(known, boundary=boundary.index)
        if isinstance(factory, Auto):
            return self.chosen(boundary, factory, program)
        if isinstance(factory, Suffix):
            return suffix_interface(boundary, factory, program, self.loss, self.mean)
        return make_interface(boundary, choice, program.context, program)

    def chosen(self, boundary: Boundary, options: Auto, program: Program) -> Interface:
        """Return the interface that ``auto`` chooses for a boundary, and say why."""
        try:
            made = suffix_interface(boundary, options.suffix, program, self.loss, self.mean)
        except EstimatorError as error:
            made = make_interface(boundary, options.otherwise, program.context, program)
            return replace(
                made, detail=because(boundary, made, str(error).removeprefix(f"boundary {boundary.name!r}: "))
            )
        return replace(made, detail=f"{because(boundary, made, 'the loss is known')}; {made.detail}")


def because(boundary: Boundary, interface: Interface, reason: str) -> str:
    """Say what ``auto`` chose for a boundary, and why."""
    return f"auto chose {interface.description} for {boundary.name!r}: {reason}"


def hints(choices: Mapping[str, Choice], loss: Loss | None) -> tuple[str, ...]:
    """Return a note where the default stands on a boundary, and ``auto`` could make use of the loss."""
    if loss is None or "synthetic" not in choices.values():
        return ()
    return ("the loss is known: gradient='auto' would make estimators that learn from it",)


def assign(gradient: Choices, boundaries: tuple[Boundary, ...]) -> dict[str, Choice]:
    """Return the choice for each boundary name.

    Raises:
        EstimatorError: A mapping leaves a boundary out, or names one that is not there.
    """
    names = [boundary.name for boundary in boundaries]
    if not isinstance(gradient, Mapping):
        return dict.fromkeys(names, gradient)
    chosen = by_boundary("gradient", gradient, names)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise EstimatorError(
            f"gradient= gives nothing for {nearest('', missing, 10)}; name them, or add a glob such as '**'"
        )
    return chosen


def assign_inputs(inputs: InputChoices, boundaries: tuple[Boundary, ...]) -> dict[str, InputFactory]:
    """Return the input model's factory for each boundary that has one.

    Raises:
        EstimatorError: A choice is not a factory, or names a boundary that is not there.
    """
    if inputs is None:
        return {}
    names = [boundary.name for boundary in boundaries]
    chosen = by_boundary("inputs", inputs if isinstance(inputs, Mapping) else {"**": inputs}, names)
    factories: dict[str, InputFactory] = {}
    for name, choice in chosen.items():
        factory = SyntheticInput() if choice == "synthetic" else choice
        if isinstance(factory, str | nn.Module) or not callable(factory):
            raise EstimatorError(
                f"inputs={choice!r} is not a synthetic input; give None, 'synthetic' or a factory (spec -> nn.Module)"
            )
        factories[name] = factory
    return factories


def by_boundary(option: str, choices: Mapping[str, Chosen], names: Sequence[str]) -> dict[str, Chosen]:
    """Return the first choice whose name or glob matches, for each boundary name that one matches."""
    chosen: dict[str, Chosen] = {}
    for pattern, choice in choices.items():
        matched = [name for name in names if name == pattern or glob_matches(pattern, name)]
        if not matched:
            raise EstimatorError(
                f"{option}= names a boundary {pattern!r} that is not there; the boundaries are {nearest(pattern, names, 10)}"
            )
        chosen.update((name, choice) for name in matched if name not in chosen)
    return chosen


def with_input_model(
    interface: Interface, factory: InputFactory | None, program: Program, context: Context | None
) -> Interface:
    """Add an input model to an interface.

    Raises:
        EstimatorError: The producer waits for the true gradient, which a synthetic input cannot give.
    """
    if factory is None or interface.input_model is not None:
        return interface
    boundary = program.boundaries[interface.boundary]
    if interface.locked:
        raise EstimatorError(
            f"boundary {boundary.name!r} has a synthetic input and {interface.description}, which waits for the true gradient; a "
            "partition that runs on a synthetic input sends none back, so give this boundary another estimator"
        )
    inputs = tuple(program.measures[name].tensors[0] for name in data_inputs(program))
    spec = InputSpec(boundary.name, inputs, boundary.specs, context.width if context else None)
    return replace(interface, input_model=build(factory, spec, "inputs"))


def check_mask(mask: str | None, program: Program) -> None:
    """Raise ContextError where the mask is no input of the model."""
    inputs = input_names(program)
    if mask is not None and mask not in inputs:
        given = repr(mask) if isinstance(mask, str) else f"(a {type(mask).__name__})"
        raise ContextError(
            f"mask={given} is not a tensor input of the model; its inputs are {', '.join(map(repr, inputs))}"
        )


def check_mask_shape(mask: str | None, program: Program) -> None:
    """Raise ContextError where no value on a boundary has one entry for each entry of the mask: it would leave nothing out."""
    if mask is None or not program.boundaries:
        return
    shape = program.measures[mask].tensors[0].shape
    specs = [spec.shape for boundary in program.boundaries for spec in boundary.specs]
    if not any(len(each) > len(shape) and each[: len(shape)] == shape for each in specs):
        raise ContextError(
            f"mask={mask!r} is {list(shape)}, and no value on a boundary begins with these sizes: they are "
            f"{', '.join(str(list(each)) for each in specs[:4])}. Give a mask [batch, length] as long as the values, or leave mask= out "
            "where no boundary has values of tokens"
        )


def make_interface(
    boundary: Boundary, choice: Choice, context: Context | None, program: Program, examples: int | None = None
) -> Interface:
    """Build and check the estimator of one boundary.

    Args:
        boundary: The boundary.
        choice: The estimator.
        context: What the estimator sees beside the values.
        program: The program.
        examples: Number of examples in a value; by default that of the program's inputs.
    """
    spec = boundary_spec(boundary, context, program, examples)
    factory = find_factory(choice, boundary)
    estimator = build(factory, spec)
    fits = any(parameter.requires_grad for parameter in estimator.parameters())
    interface = Interface(boundary.index, estimator, as_written(factory), fits=fits, make=again_on_cpu(factory, spec))
    if isinstance(estimator, GradientEstimator):
        waits = estimator.locked or estimator.mix > 0 or estimator.prop > 0
        interface = replace(
            interface,
            locked=waits,
            fits=fits and not estimator.locked,
            late=estimator.late,
            mix=estimator.mix,
            prop=estimator.prop,
            fit=estimator.fit if estimator.needs_target or estimator.needs_loss else "own",
            fit_weight=estimator.fit_weight,
            needs_target=estimator.needs_target,
            needs_loss=estimator.needs_loss,
            needs_error=estimator.needs_error,
            needs_mask=estimator.needs_mask,
            by_pixel=estimator.by_pixel,
        )
    if interface.blends or not interface.locked:
        try:
            interface = replace(interface, flops=check_estimates(interface, spec, program))
            if spec.routed:
                check_estimates(interface, with_other_rows(spec), program)
        except EstimatorError as error:
            if spec.routed:
                raise refuse_routed(spec, interface.description, data_rows(program), error) from error
            raise
    return interface


def again_on_cpu(factory: Factory, spec: BoundarySpec) -> Callable[[], nn.Module] | None:
    """Return what makes an estimator on the CPU, where the values are on the meta device, and so is what was made."""
    if spec.values[0].device.type != "meta":
        return None
    values = tuple(replace(each, device=torch.device("cpu")) for each in spec.values)
    return partial(build, factory, replace(spec, values=values))


def boundary_spec(boundary: Boundary, context: Context | None, program: Program, examples: int | None) -> BoundarySpec:
    """Return what the estimator of a boundary is built from; see ``make_interface``."""
    batch = batch_input(program)
    flops = producer_flops(boundary, program) if examples is None else None
    if examples is None and batch is not None:
        examples = program.measures[batch].tensors[0].shape[program.batch_dim]
    if examples == 0:
        raise InputError(
            f"the example inputs hold no example: the batch of {batch!r} is empty; give one of two or more"
        )
    width, classes = (context.width, context.classes) if context else (None, None)
    found = data_rows(program) if program.graph is not None else {}
    routed = frozenset(index for index, name in enumerate(boundary.values) if name in found)
    output = output_spec(program)
    return BoundarySpec(boundary.name, boundary.specs, width, classes, output, examples, boundary.values, routed, flops)


def producer_flops(boundary: Boundary, program: Program) -> int | None:
    """Return a boundary's share of the FLOPs of the partition that makes its values; None without partitions."""
    sharing = sum(each.producer == boundary.producer for each in program.boundaries)
    return program.partitions[boundary.producer].flops // max(1, sharing) if program.partitions else None


def output_spec(program: Program) -> TensorSpec | None:
    """Return the spec of the model's output, or None where that is not one tensor."""
    values = flat_output(captured(program)) if program.graph is not None else ()
    if len(values) != 1 or not isinstance(values[0], fx.Node):
        return None
    measure = program.measures[values[0].name]
    return measure.tensors[0] if measure.is_tensor else None


def find_factory(choice: Choice, boundary: Boundary) -> Factory:
    """Return the factory that a choice names."""
    if isinstance(choice, str):
        known = BY_NAME | IN_TIME
        if choice not in known:
            raise EstimatorError(
                f"gradient={choice!r} is not an estimator; the nearest names are {nearest(choice, known)}"
            )
        return known[choice]
    if isinstance(choice, nn.Module) or not callable(choice):
        raise EstimatorError(
            f"gradient= for boundary {boundary.name!r} is {type(choice).__name__}; give a name or a factory (spec -> nn.Module), "
            "for example dnifx.estimators.Synthetic(hidden=1), since each boundary gets a module of its own"
        )
    return choice


def build(factory: Callable[[Spec], nn.Module], spec: Spec, option: str = "gradient") -> nn.Module:
    """Call a factory, and give its module the device and dtype of the values.

    Raises:
        EstimatorError: The factory fails, or returns something that is not a module.
    """
    shown, remedy = as_written(factory), "it must return an nn.Module, made from the spec of the boundary"
    if isinstance(factory, type) and not issubclass(factory, nn.Module):
        remedy = f"give an instance, {shown}(), not the class"
    try:
        made: nn.Module = factory(spec)
    except DnifxError:
        raise
    except Exception as error:
        raise EstimatorError(
            f"{option}=: the factory {shown} failed for boundary {spec.name!r}: {type(error).__name__}: {error}; {remedy}"
        ) from error
    if not isinstance(made, nn.Module):
        raise EstimatorError(
            f"{option}=: the factory {shown} returned {type(made).__name__} for boundary {spec.name!r}; {remedy}"
        )
    if any(map(is_lazy, chain(made.parameters(), made.buffers()))):
        raise EstimatorError(
            f"{option}=: the factory {shown} returned a lazy module for boundary {spec.name!r}, which has no weights before its first "
            "call; make its layers with the sizes in spec.values"
        )
    return made.to(device=spec.values[0].device, dtype=spec.values[0].dtype)
