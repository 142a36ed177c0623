"""Each check of a contract fails where the compiler breaks the contract: wrong builds, with one fault each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dnifx.ir import Program
from dnifx.passes.cuts import partition
from dnifx.passes.emit import fused as emit
from dnifx.passes.emit import interface_lines
from dnifx.passes.emit import step as stepcode
from dnifx.passes.emit.blocks import Block
from dnifx.passes.legalize import legalize
from dnifx.runtime.emitted import fitting, interface
from dnifx.runtime.training import steps, trainer
from tests.contracts import checks
from tests.contracts.cases import Case
from tests.contracts.running import TARGETS
from tests.random_models.model import Line, Model, Op, Value

Patch = pytest.MonkeyPatch
Check = Callable[[Case], None]


def line(name: str, code: str, *inputs: str, ordered: bool = False) -> Line:
    return Line(f"{name} = {code}", (Op((name,), inputs, code, ordered=ordered),), "written by hand")


FAN = Model(
    (Value("x0", (3,)),),
    ("self.a = nn.Linear(3, 4)", "self.b = nn.Linear(4, 4)", "self.c = nn.Linear(4, 4)"),
    (
        line("h", "self.a(x0)", "x0"),
        line("b", "self.b(h)", "h"),
        line("c", "self.c(b)", "b"),
        line("r", "h + c", "h", "c"),
        line("y", "r * c", "r", "c"),
    ),
    (Value("y", (4,)), Value("h", (4,))),
)
"""Fan-out, a residual round a cut, two outputs."""
NOISY = Model(
    (Value("x0", (3,)),),
    ("self.a = nn.Linear(3, 4)", "self.n = nn.BatchNorm1d(4)", "self.d = nn.Dropout(0.4)", "self.b = nn.Linear(4, 2)"),
    (
        line("h", "self.a(x0)", "x0"),
        line("n", "self.n(h)", "h", ordered=True),
        line("d", "self.d(n)", "n", ordered=True),
        line("y", "self.b(d)", "d"),
    ),
    (Value("y", (2,)),),
)
"""Random numbers and running statistics."""
CASES = (Case(FAN, ["a", "b"]), Case(FAN, ["a", "b"], mean=False), Case(NOISY, ["n"], batch=4))


def on(check: Callable[[Case, str], None], target: str) -> Check:
    """Bind a check to a target, and give it that name."""

    def bound(case: Case) -> None:
        check(case, target)

    bound.__name__ = f"{check.__name__}:{target}"
    return bound


def steady(check: Check) -> Check:
    """Leave out the case in which examples see each other."""

    def bound(case: Case) -> None:
        if case.model is FAN:
            check(case)

    bound.__name__ = check.__name__
    return bound


BOTH = (
    checks.check_oracle,
    checks.check_detached,
    checks.check_isolated,
    checks.check_targets,
    checks.check_separate,
    checks.check_first_estimate,
)
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        checks.check_forward,
        checks.check_scheduled_forward,
        checks.check_targets_agree,
        checks.check_cut,
        checks.check_state,
        *(on(check, target) for check in BOTH for target in TARGETS),
        *(steady(on(checks.check_per_example, target)) for target in TARGETS),
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_build_as_it_is_passes(name: str) -> None:
    for case in CASES:
        CHECKS[name](case)


def swap_with(patch: Patch, change: Callable[[Any, tuple[Tensor, ...], list[Any]], list[Any]]) -> None:
    """Change what the fused interface node answers: context, arriving gradients, and (synthetic..., fits...)."""
    original = interface.GradientSwap.backward

    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        answers = list(original(ctx, *arriving))
        options = len(answers) - 2 * len(arriving)
        return (*answers[:options], *change(ctx, arriving, answers[options:]))

    patch.setattr(interface.GradientSwap, "backward", staticmethod(backward))


def rewrite_step(patch: Patch, old: str, new: str) -> None:
    """Change the text of every generated step."""
    original = stepcode.StepWriter.source

    def source(self: stepcode.StepWriter) -> str:
        text = original(self)
        assert old in text, f"the fault has nowhere to go: no {old!r} in\n{text}"
        return text.replace(old, new)

    patch.setattr(stepcode.StepWriter, "source", source)


def rewrite_fused(patch: Patch, change: Callable[[fx.Graph], None]) -> None:
    """Change every fused graph."""
    original = emit.fuse

    def fuse(program: Program, mean: bool) -> fx.Graph:
        graph = original(program, mean)
        change(graph)
        return graph

    patch.setattr(emit, "fuse", fuse)


def leak_fused(patch: Patch) -> None:
    swap_with(patch, lambda ctx, arriving, answers: [answers[0] + arriving[0], *answers[1:]])


def leak_scheduled(patch: Patch) -> None:
    rewrite_step(patch, ".detach() * scale)", ".detach() * scale + 0.1)")


def batch_mean_target(patch: Patch) -> None:
    wrong = {"per_example": lambda gradient, scale: gradient}
    patch.setattr(fitting, "per_example", wrong["per_example"])
    patch.setattr(steps, "STEP_GLOBALS", {**steps.STEP_GLOBALS, **wrong})


def unscaled_estimate_fused(patch: Patch) -> None:
    def change(ctx: Any, arriving: tuple[Tensor, ...], answers: list[Any]) -> list[Any]:
        return [answers[0] * ctx.examples if ctx.mean else answers[0], *answers[1:]]

    swap_with(patch, change)


def unscaled_estimate_scheduled(patch: Patch) -> None:
    rewrite_step(patch, ".detach() * scale)", ".detach())")


def drop_a_consumer_fused(patch: Patch) -> None:
    def change(graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.name.endswith("_crossing") and len(node.users) > 1:
                with graph.inserting_after(node):
                    blind = graph.call_method("detach", (node,))
                next(iter(node.users)).replace_input_with(node, blind)

    rewrite_fused(patch, change)


def drop_a_consumer_scheduled(patch: Patch) -> None:
    original = stepcode.StepWriter.forward

    def forward(self: stepcode.StepWriter, action: Any) -> Block:
        block = original(self, action)
        if action.index != len(self.program.partitions) - 1:
            return block
        lines = tuple(
            line.replace("(leaf_", "(0 * leaf_", 1).replace("0 * leaf_a", "leaf_a.detach()") for line in block.lines
        )
        return replace(block, lines=lines)

    patch.setattr(stepcode.StepWriter, "forward", forward)


def fit_reaches_the_value_fused(patch: Patch) -> None:
    def change(graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.name.endswith("_detached"):
                node.replace_all_uses_with(node.args[0])

    rewrite_fused(patch, change)


def fit_reaches_the_value_scheduled(patch: Patch) -> None:
    original = interface_lines.InterfaceLines.synthesise

    def synthesise(self: interface_lines.InterfaceLines, action: Any) -> Block:
        block = original(self, action)
        return replace(block, lines=tuple(line.replace(".detach()", "") for line in block.lines))

    patch.setattr(interface_lines.InterfaceLines, "synthesise", synthesise)
    rewrite_step(patch, ",))", ",), retain_graph=True)")

    def backpropagate(tensors: Any, gradients: Any, shared: Any = (), retain_graph: bool = True) -> None:
        torch.autograd.backward(tensors, gradients, retain_graph=retain_graph)

    patch.setitem(steps.STEP_GLOBALS, "backpropagate", backpropagate)


def task_reaches_the_estimator_fused(patch: Patch) -> None:
    swap_with(patch, lambda ctx, arriving, answers: [*answers[:-1], add(answers[-1], arriving[-1])])


def add(one: Tensor | None, two: Tensor) -> Tensor | None:
    return None if one is None else one + two


def task_reaches_the_estimator_scheduled(patch: Patch) -> None:
    wrong = {
        "fit_gradient": lambda estimate, target, examples: fitting.fit_gradient(estimate, target, examples) + target
    }
    patch.setattr(steps, "STEP_GLOBALS", {**steps.STEP_GLOBALS, **wrong})


def perturbed_forward(patch: Patch) -> None:
    original = interface.GradientSwap.forward

    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        return tuple(value * (1 + 1e-15) + 1e-15 for value in original(ctx, *given))

    patch.setattr(interface.GradientSwap, "forward", staticmethod(forward))


def perturbed_forward_scheduled(patch: Patch) -> None:
    rewrite_step(patch, ".detach().requires_grad_()", ".detach().add(1e-15).requires_grad_()")


def random_numbers_fused(patch: Patch) -> None:
    original = interface.GradientSwap.forward

    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        torch.rand(1)
        return original(ctx, *given)

    patch.setattr(interface.GradientSwap, "forward", staticmethod(forward))


def random_numbers_scheduled(patch: Patch) -> None:
    rewrite_step(patch, "diagnostics = {}", "diagnostics = {}; torch.rand(1)")


def oracle_that_detaches_fused(patch: Patch) -> None:
    original = emit.FusedWriter.interface

    def interface_nodes(self: emit.FusedWriter, boundary: Any, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        if self.program.interfaces[boundary.index].locked:
            return tuple(self.graph.call_method("detach", (value,)) for value in values)
        return original(self, boundary, values)

    patch.setattr(emit.FusedWriter, "interface", interface_nodes)


def oracle_that_scales_scheduled(patch: Patch) -> None:
    wrong = {"arrived": lambda leaf: fitting.arrived(leaf) * 1.001}
    patch.setattr(steps, "STEP_GLOBALS", {**steps.STEP_GLOBALS, **wrong})


def update_twice(patch: Patch) -> None:
    rewrite_step(
        patch,
        "self.optimizers['submod_0'].step()",
        "self.optimizers['submod_0'].step(); self.optimizers['submod_0'].step()",
    )


def estimate_from_the_start(patch: Patch) -> None:
    def change(ctx: Any, arriving: tuple[Tensor, ...], answers: list[Any]) -> list[Any]:
        return [answers[0] + 1e-6, *answers[1:]]

    swap_with(patch, change)


def partitions_merged(patch: Patch) -> None:
    original = partition.FormPartitions.run

    def run(self: partition.FormPartitions, program: Program) -> Program:
        found = original(self, program)
        return replace(found, partition_of={name: max(index - 1, 0) for name, index in found.partition_of.items()})

    patch.setattr(partition.FormPartitions, "run", run)


def optimizers_forgotten(patch: Patch) -> None:
    patch.setattr(trainer.Trainer, "load_state_dict", lambda self, state: None)


def values_forgotten(patch: Patch) -> None:
    original = legalize.form_boundaries
    patch.setattr(legalize, "form_boundaries", lambda program: original(program)[:1])


@dataclass(frozen=True)
class Fault:
    """A wrong build, and the checks that have to notice it."""

    inject: Callable[[Patch], None]
    noticed_by: tuple[str, ...]


FAULTS = (
    Fault(
        leak_fused,
        ("check_isolated:fused", "check_detached:fused", "check_first_estimate:fused", "check_targets_agree"),
    ),
    Fault(leak_scheduled, ("check_isolated:scheduled", "check_detached:scheduled", "check_first_estimate:scheduled")),
    Fault(leak_scheduled, ("check_targets_agree",)),
    Fault(batch_mean_target, ("check_targets:fused", "check_targets:scheduled", "check_per_example:fused")),
    Fault(batch_mean_target, ("check_per_example:scheduled",)),
    Fault(unscaled_estimate_fused, ("check_isolated:fused", "check_per_example:fused")),
    Fault(unscaled_estimate_scheduled, ("check_isolated:scheduled", "check_per_example:scheduled")),
    Fault(drop_a_consumer_fused, ("check_targets:fused",)),
    Fault(drop_a_consumer_scheduled, ("check_targets:scheduled",)),
    Fault(fit_reaches_the_value_fused, ("check_separate:fused", "check_isolated:fused")),
    Fault(fit_reaches_the_value_scheduled, ("check_separate:scheduled",)),
    Fault(task_reaches_the_estimator_fused, ("check_targets:fused",)),
    Fault(task_reaches_the_estimator_scheduled, ("check_targets:scheduled",)),
    Fault(perturbed_forward, ("check_forward",)),
    Fault(perturbed_forward_scheduled, ("check_scheduled_forward",)),
    Fault(random_numbers_fused, ("check_forward",)),
    Fault(random_numbers_scheduled, ("check_scheduled_forward",)),
    Fault(oracle_that_detaches_fused, ("check_oracle:fused",)),
    Fault(oracle_that_scales_scheduled, ("check_oracle:scheduled", "check_targets:scheduled")),
    Fault(update_twice, ("check_isolated:scheduled", "check_targets_agree")),
    Fault(estimate_from_the_start, ("check_first_estimate:fused", "check_detached:fused")),
    Fault(partitions_merged, ("check_cut",)),
    Fault(optimizers_forgotten, ("check_state",)),
    Fault(values_forgotten, ("check_isolated:fused", "check_detached:fused")),
)


@pytest.mark.parametrize(
    ("fault", "name"),
    [pytest.param(fault, name, id=f"{fault.inject.__name__}-{name}") for fault in FAULTS for name in fault.noticed_by],
)
def test_a_wrong_build_is_noticed(fault: Fault, name: str, monkeypatch: Patch) -> None:
    fault.inject(monkeypatch)
    failures = 0
    for case in CASES:
        try:
            CHECKS[name](case)
        except AssertionError:
            failures += 1
    assert failures, f"{name} did not notice {fault.inject.__name__}"


def test_every_check_is_known_to_fail_on_some_fault() -> None:
    noticed = {name for fault in FAULTS for name in fault.noticed_by}
    assert set(CHECKS) - noticed == set()
