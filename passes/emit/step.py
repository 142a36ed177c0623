"""The scheduled target as Python: one training step, written out action by action."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dnifx.errors import PassError
from dnifx.ir import Action, Boundary, Interface, Kind, Partition, Program, Schedule
from dnifx.passes.emit.fused import CONTEXT, provenance
from dnifx.passes.emit.window_lines import WindowLines
from dnifx.passes.measure import data_inputs, examples_of, node_parameters
from dnifx.schedules import Answer, answers, with_time

RESERVED = {
    "self",
    "target",
    "context",
    "loss",
    "losses",
    "error",
    "output",
    "outputs",
    "examples",
    "features",
    "scale",
    "diagnostics",
    "reset",
    "again",
    "torch",
}
PREFIXES = (
    "leaf_",
    "estimate_",
    "target_",
    "imagined_",
    "seen_",
    "predicted_",
    "propagated",
    "output_error",
    "submod_",
    "apply_gradients",
    "arrived",
    "backpropagate",
    "fit_gradient",
    "per_example",
    "compare",
    "end_",
    "by_example",
    "without_rows",
    "auxiliary_fit",
    "window_",
    "jacobian_",
    "trace_",
    "extend_trace",
    "fit_by_trace",
    "pass_on",
)


@dataclass(frozen=True)
class Block:
    """The lines of one action, and the local names that they define."""

    title: str
    lines: tuple[str, ...]
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepWriter:
    """Writes a training step.

    Attributes:
        program: A program with interfaces and partition graphs.
        schedule: A validated schedule.
        mean: Whether the loss averages over examples.
        diagnose: Compare estimates with targets where both are there.
    """

    program: Program
    schedule: Schedule
    mean: bool = True
    diagnose: bool = False

    def source(self) -> str:
        """Return the source of ``def step(self, <inputs>, target, context=None)``."""
        return replace(self, schedule=with_time(self.schedule, self.program)).written()

    def written(self) -> str:
        """Write the schedule as it stands: what it does not name in time is left out."""
        blocks = [self.prelude(), *self.window_start(), *map(self.block, self.schedule.actions)]
        inputs = self.program.signature.inputs if self.program.signature else ()
        head = f"def step(self, {''.join(f'{local(name)}, ' for name in inputs)}target, context=None):"
        body = [f'"""One training step: {self.schedule.name}."""']
        for block, dead in zip(blocks, dead_after(blocks), strict=True):
            body.append(f"# {block.title}")
            body += block.lines
            if dead:
                body.append(f"del {', '.join(dead)}")
        body.append("return loss, output, diagnostics")
        return "\n".join([head, *(f"    {line}" if line else "" for line in body)]) + "\n"

    def prelude(self) -> Block:
        """Count the examples, and turn the context into features."""
        counted = examples_of(self.program)
        lines = [
            f"examples = {local(counted[0])}.size({counted[1]})" if counted else "examples = 1",
            "loss = output = None",
            "diagnostics = {}",
        ]
        lines.append(f"scale = {'1.0 / examples' if self.mean else '1.0'}")
        lines.append(f"features = {f'self.features({CONTEXT})' if self.program.context else 'None'}")
        per = "mean" if self.mean else "sum"
        return Block(f"estimates are per example; the loss is a {per} over examples", tuple(lines))

    @property
    def windows(self) -> WindowLines:
        """What writes the ends of a recurrent model's window."""
        return WindowLines(self.program, self.schedule, self.mean, self.diagnose, local)

    def window_start(self) -> list[Block]:
        """Write the start of a window, where states are cut in time."""
        found = self.windows.start()
        return [Block(found.title, found.lines, found.defines)] if found is not None else []

    def block(self, action: Action) -> Block:
        """Write one action."""
        in_time = self.windows.writes(action)
        if in_time is not None:
            lines = self.windows.block(action, in_time, fit_lines)
            return Block(lines.title, lines.lines, lines.defines)
        writers = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.UPDATE: self.update,
            Kind.SYNTHESISE: self.synthesise,
            Kind.INPUT: self.imagine,
            Kind.TARGET: self.arrive,
            Kind.FIT: self.fit,
        }
        if action.kind not in writers:
            raise PassError(f"no code is known for action {action}; remove it from the schedule")
        return writers[action.kind](action)

    def forward(self, action: Action) -> Block:
        """Run a partition on detached values of earlier ones; give its boundary values leaves for their consumers."""
        partition = self.program.partitions[action.index]
        imagined = Action(Kind.INPUT, action.index) in self.plain_actions()
        call = f"self.{partition.name}({', '.join(self.reads(name, imagined) for name in partition.inputs)})"
        title = f"{action}: forward of {partition.name} ({span(partition)})"
        if action.index == len(self.program.partitions) - 1:
            return self.end(title, call)
        names = [local(name) for name in partition.outputs]
        lines = [f"{''.join(f'{name}, ' for name in names)[:-1]} = {call}" + self.types(partition) if names else call]
        leaves = []
        for boundary in self.produced(action.index):
            arrives = Action(Kind.TARGET, boundary.index) in self.plain_actions()
            for name in boundary.values:
                leaves.append(f"leaf_{name}")
                lines.append(f"leaf_{name} = {local(name)}.detach(){'.requires_grad_()' if arrives else ''}")
        return Block(title, tuple(lines), (*names, *leaves))

    def end(self, title: str, call: str) -> Block:
        """Run the last partition and compute the loss, and what estimators need of the end."""
        made = f"outputs = {call}; output = self.unflatten(outputs)" if self.program.recurrences else ""
        lines = [made or f"output = self.unflatten({call})", "loss = self.compute_loss(output, target)"]
        defines = ["outputs"] if self.program.recurrences else []
        plain, interfaces = self.plain_actions(), self.program.interfaces
        if any(each.needs_loss and each.fits and Action(Kind.FIT, each.boundary) in plain for each in interfaces):
            lines[1] = "loss, losses = self.compute_losses(output, target, examples)"
            defines.append("losses")
        if any(each.needs_error and Action(Kind.SYNTHESISE, each.boundary) in plain for each in interfaces):
            lines.insert(1, "output.requires_grad_()  # the error is asked for whatever learns behind the last cut")
            lines.append("error = output_error(loss, output, scale)")
            defines.append("error")
        return Block(title, tuple(lines), tuple(defines))

    def imagine(self, action: Action) -> Block:
        """Predict what a partition would take from earlier ones, from the data; models that ran already are not run again."""
        lines: list[str] = []
        defines: list[str] = []
        inputs = self.counted(f"({''.join(f'{local(name)}, ' for name in data_inputs(self.program)).rstrip()})")
        for boundary in self.imagined(action.index):
            if self.imagined_first(boundary, action.index):
                imagined = self.counted(f"self.imagine_{boundary.key}({inputs}, features)")
                lines.append(f"imagined_{boundary.key} = {imagined}")
                defines.append(f"imagined_{boundary.key}")
                for position, name in enumerate(boundary.values):
                    defines.append(f"leaf_imagined_{name}")
                    lines.append(
                        f"leaf_imagined_{name} = imagined_{boundary.key}[{position}].detach().requires_grad_()"
                    )
        title = f"{action}: synthetic inputs of {self.program.partitions[action.index].name}"
        return Block(title, tuple(lines) or ("pass",), tuple(defines))

    def imagined(self, partition: int) -> list[Boundary]:
        """Return the boundaries with an input model that a partition consumes."""
        return [
            boundary
            for boundary in self.program.boundaries
            if partition in boundary.consumers and self.program.interfaces[boundary.index].input_model is not None
        ]

    def imagined_first(self, boundary: Boundary, partition: int) -> bool:
        """Whether this partition is the first of the schedule to imagine a boundary's values."""
        order = [action.index for action in self.schedule.actions if action.kind is Kind.INPUT]
        return next(index for index in order if index in boundary.consumers) == partition

    def synthesise(self, action: Action) -> Block:
        """Ask the estimator; its graph is kept where it is fitted."""
        boundary = self.program.boundaries[action.index]
        interface, key = self.program.interfaces[action.index], boundary.key
        leaves = ".detach().requires_grad_()" if interface.prop else ".detach()"
        seen = f"({''.join(f'{local(name)}{leaves}, ' for name in boundary.values)[:-1]})"
        lines, defines = [], [f"estimate_{key}"]
        if interface.prop:
            lines.append(f"seen_{key} = {seen}")
            defines.append(f"seen_{key}")
            seen = f"seen_{key}"
        asked = [self.counted(seen), "error" if interface.needs_error else "features"]
        if self.program.mask is not None and interface.needs_mask:
            asked.append(local(self.program.mask))
        made = f"*estimate_{key}, predicted_{key}" if interface.needs_loss else f"estimate_{key}"
        defines += [f"predicted_{key}"] if interface.needs_loss else []
        lines.append(f"{made} = self.estimate_{key}({', '.join(asked)})")
        if self.program.mask is not None:
            lines.append(f"estimate_{key} = {self.counted(f'estimate_{key}', 'estimate')}")
        title = f"{action}: {provenance(boundary, interface)}"
        return Block(title, (*lines, *self.both(action)), (*defines, *self.both_define(action)))

    def counted(self, tensors: str, each: str = "value") -> str:
        """Return the expression of a tuple of tensors without padding, where there is a mask."""
        if self.program.mask is None:
            return tensors
        return f"tuple(count_only({each}, {local(self.program.mask)}) for {each} in {tensors})"

    def backward(self, action: Action) -> Block:
        """Backpropagate inside a partition, from synthetic or arrived gradients and, at the end, from the loss."""
        tensors: list[str] = []
        gradients: list[str] = []
        if action.index == len(self.program.partitions) - 1:
            tensors, gradients = ["loss"], ["None"]
        for boundary in self.produced(action.index):
            for position, name in enumerate(boundary.values):
                tensors.append(local(name))
                gradients.append(self.gradient(boundary, position))
        title = f"{action}: backward of {self.program.partitions[action.index].name}"
        values, synthetic = self.windows.gradients(action.index)
        tensors, gradients = tensors + values, gradients + synthetic
        if not tensors:
            return Block(title, ("pass",))
        asked = [f"({', '.join(tensors)},)", f"({', '.join(gradients)},)"]
        shared = self.shared(action.index)
        asked += [f"({', '.join(shared)},)"] if shared else []
        sure = not shared and self.carries_surely(action.index)
        return Block(title, (f"{'torch.autograd.backward' if sure else 'backpropagate'}({', '.join(asked)})",))

    def shared(self, partition: int) -> list[str]:
        """Return the leaves and parameters that this partition's backward pass reaches, and another's too."""
        imagined = Action(Kind.INPUT, partition) in self.plain_actions()
        here, others = self.program.partitions[partition], [*self.program.partitions]
        others.remove(here)
        read = {name for other in others for name in other.inputs}
        leaves = [self.reads(name, imagined) for name in here.inputs if name in read]
        used = {name for other in others for name in other.uses}
        parameters = [f"self.parameter({name!r})" for name in here.uses if name in used]
        return [leaf for leaf in leaves if leaf.startswith("leaf_")] + parameters

    def carries_surely(self, partition: int) -> bool:
        """Whether every boundary value of a partition hangs on a parameter or on a leaf that is differentiated.

        A value that is only passed on hangs on neither where its leaf gets no target; a module that was kept whole may give
        what it was given.
        """
        kept = {each.path for each in self.program.capture.kept} if self.program.capture is not None else set()
        nodes = set(self.program.partitions[partition].nodes)
        flowing = {name for name, measure in self.program.measures.items() if measure.requires_grad}
        arriving = {
            name
            for boundary in self.program.boundaries
            if Action(Kind.TARGET, boundary.index) in self.plain_actions()
            for name in boundary.values
        }
        sure: set[str] = set()
        for node in self.program.graph.nodes if self.program.graph is not None else ():
            if node.name not in nodes:
                sure |= {node.name} & arriving
            elif node.name in flowing and not (node.op == "call_module" and node.target in kept):
                trained = any(
                    each.requires_grad
                    for each in node_parameters(self.program.model, node, self.program.constants).values()
                )
                if trained or any(source.name in sure for source in node.all_input_nodes):
                    sure.add(node.name)
        return all(name in sure for boundary in self.produced(partition) for name in boundary.values)

    def gradient(self, boundary: Boundary, position: int) -> str:
        """Return the expression of the gradient that a boundary value receives."""
        name, interface = boundary.values[position], self.program.interfaces[boundary.index]
        answer, arriving = answers(self.schedule, self.program)[boundary.index], f"arrived({self.leaf(boundary)}{name})"
        if answer is Answer.TARGET or interface.mix == 1:
            return arriving
        synthetic = f"estimate_{boundary.key}[{position}].detach() * scale"
        if interface.prop:
            synthetic = f"({synthetic} + {interface.prop} * scale * propagated_{boundary.key}[{position}])"
        if interface.mix:
            synthetic = f"{1 - interface.mix} * {synthetic} + {interface.mix} * {arriving}"
        return f"({synthetic}).to({local(name)}.dtype)"

    def arrive(self, action: Action) -> Block:
        """Take the gradients that all consumers sent, per example."""
        boundary = self.program.boundaries[action.index]
        title = f"{action}: the target of {boundary.name} has arrived from {consumers(boundary)}"
        if Action(Kind.SYNTHESISE, action.index) not in self.plain_actions():
            return Block(title, ("pass",))
        leaf = self.leaf(boundary)
        items = [f"per_example(arrived({leaf}{name}), scale)" for name in boundary.values]
        if self.program.mask is not None:
            items = [f"count_only({item}, {local(self.program.mask)})" for item in items]
        lines = (f"target_{boundary.key} = ({', '.join(items)},)", *self.both(action))
        return Block(title, lines, (f"target_{boundary.key}", *self.both_define(action)))

    def both(self, action: Action) -> tuple[str, ...]:
        """Write what takes an estimate and its target, once both are there: after the later of the two actions."""
        if not self.is_later(action):
            return ()
        boundary = self.program.boundaries[action.index]
        key, pair = boundary.key, f"estimate_{boundary.key}, target_{boundary.key}"
        lines = [f"diagnostics[{boundary.name!r}] = compare({pair})"] if self.diagnose else []
        lines += [f"propagated_{key} = propagated({pair}, seen_{key}, examples)"] if self.both_define(action) else []
        return tuple(lines)

    def both_define(self, action: Action) -> tuple[str, ...]:
        """Return the names that ``both`` defines: the gradient of the estimator's own loss, where the producer takes it."""
        boundary = self.program.boundaries[action.index]
        taken = self.program.interfaces[action.index].prop and self.is_later(action)
        found = answers(self.schedule, self.program).get(boundary.index) if taken else None
        return (f"propagated_{boundary.key}",) if found is Answer.BOTH else ()

    def is_later(self, action: Action) -> bool:
        """Whether, of a boundary's estimate and target, this action gives the one that comes later."""
        order = [Action(each.kind, each.index) for each in self.schedule.actions]
        both = [Action(kind, action.index) for kind in (Kind.SYNTHESISE, Kind.TARGET)]
        return set(both) <= set(order) and max(both, key=order.index).kind is action.kind

    def fit(self, action: Action) -> Block:
        """Fit the estimator to the target."""
        boundary = self.program.boundaries[action.index]
        key = boundary.key
        actions = self.plain_actions()
        lines: list[str] = []
        interface = self.program.interfaces[action.index]
        lessons = {Action(Kind.SYNTHESISE, action.index)}
        lessons |= {Action(Kind.TARGET, action.index)} if interface.needs_target else set()
        lessons |= {Action(Kind.FORWARD, len(self.program.partitions) - 1)} if interface.needs_loss else set()
        if interface.fits and lessons <= actions:
            lines += lesson_lines(key, interface)
        if any(Action(Kind.INPUT, index) in actions for index in boundary.consumers) and self.imagines(boundary):
            values = "".join(f"leaf_{name}.detach(), " for name in boundary.values).rstrip()
            lines += fit_lines(f"imagined_{key}", f"({values})")
        lines.append(f"apply_gradients(self.estimator_optimizers[{key!r}])")
        return Block(f"{action}: fit what stands on {boundary.name}", tuple(lines))

    def update(self, action: Action) -> Block:
        """Update a partition's own parameters."""
        name = self.program.partitions[action.index].name
        return Block(f"{action}: update {name}", (f"apply_gradients(self.optimizers[{name!r}])",))

    def reads(self, name: str, imagined: bool) -> str:
        """Return what a partition reads for a value: the leaf of a boundary value, anything else as it is."""
        boundary = next((boundary for boundary in self.program.boundaries if name in boundary.values), None)
        state = self.windows.reads(name)
        if state is not None:
            return state
        if boundary is None:
            carries = self.program.measures[name].requires_grad and name in self.program.partition_of
            return f"{local(name)}.detach()" if carries and self.program.measures[name].is_tensor else local(name)
        return f"leaf_imagined_{name}" if imagined and self.imagines(boundary) else f"leaf_{name}"

    def imagines(self, boundary: Boundary) -> bool:
        """Whether a boundary has an input model."""
        return self.program.interfaces[boundary.index].input_model is not None

    def leaf(self, boundary: Boundary) -> str:
        """Return the prefix of the leaves that a boundary's consumers read."""
        actions = self.plain_actions()
        imagined = self.imagines(boundary) and any(Action(Kind.INPUT, index) in actions for index in boundary.consumers)
        return "leaf_imagined_" if imagined else "leaf_"

    def produced(self, partition: int) -> list[Boundary]:
        """Return the boundaries that a partition produces."""
        return [boundary for boundary in self.program.boundaries if boundary.producer == partition]

    def plain_actions(self) -> set[Action]:
        """Return the schedule's actions without their places."""
        return {Action(action.kind, action.index) for action in self.schedule.actions}

    def types(self, partition: Partition) -> str:
        """Return a comment with the types of a partition's outputs."""
        tensors = [tensor for name in partition.outputs for tensor in self.program.measures[name].tensors]
        return f"  # {', '.join(map(str, tensors))}" if tensors else ""


def lesson_lines(key: str, interface: Interface) -> list[str]:
    """Write the fit of an estimator: to the target, to the losses that it predicts, to both, or to what it knows itself."""
    made, fits = [], []
    if interface.needs_target:
        made.append(f"*estimate_{key}")
        fits.append(
            f"*(fit_gradient(made.detach(), target, examples) for made, target in zip(estimate_{key}, target_{key}))"
        )
    if interface.needs_loss:
        made.append(f"predicted_{key}")
        fits.append(f"fit_gradient(predicted_{key}.detach(), losses, examples)")
    if not made:
        made.append(f"*estimate_{key}")
        fits.append(f"*(torch.zeros_like(made) for made in estimate_{key})")
    return ["torch.autograd.backward(", f"    ({', '.join(made)},),", f"    ({', '.join(fits)},),", ")"]


def fit_lines(made: str, target: str) -> list[str]:
    """Write the fit of what an estimator or input model made to its target."""
    return [
        "torch.autograd.backward(",
        f"    {made}, tuple(fit_gradient(made.detach(), target, examples) for made, target in zip({made}, {target}))",
        ")",
    ]


def local(name: str) -> str:
    """Return the name of a value in the step, apart from the step's own names."""
    return f"{name}_" if name in RESERVED or name.startswith(PREFIXES) else name


def span(partition: Partition) -> str:
    """Name a partition's first and last node."""
    nodes = [name for name in partition.nodes if name != "output"]
    return " .. ".join(dict.fromkeys((nodes[0], nodes[-1]))) if nodes else "the loss alone"


def consumers(boundary: Boundary) -> str:
    """List the partitions that consume a boundary."""
    return ", ".join(f"submod_{index}" for index in boundary.consumers)


def dead_after(blocks: list[Block]) -> Iterable[list[str]]:
    """Return, for each block, the names that no later block reads; what stands in quotes is no name."""
    last: dict[str, int] = {}
    defined = {name for block in blocks for name in block.defines}
    for index, block in enumerate(blocks):
        for name in defined & set(re.findall(r"\w+", re.sub(r"'[^']*'", "", " ".join(block.lines)))):
            last[name] = index
    dead: Mapping[int, list[str]] = {index: [] for index in range(len(blocks))}
    for name, index in last.items():
        dead[index].append(name)
    return [sorted(names) for _, names in sorted(dead.items())]
