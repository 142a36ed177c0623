"""Checks of decoupled real models: each is a contract of the compiler, compared with plain autograd."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import CutError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.loss_scale import tell_factor
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.net.attach import attach
from tests.contracts.cases import estimator_parameters
from tests.contracts.running import Recorder
from tests.real_models.families import Example, Factory

PARTS = 4
SMALL = dnifx.estimators.Synthetic(hidden=1, width=8, kernel=3, batch_norm=False)
"""An estimator that costs little beside the widest of the models."""

FLOAT64, FLOAT32 = 1e-9, 1e-4
"""How far a gradient may be from backprop's, relative to the largest element of any parameter's gradient: sums are taken in
another order. The first holds where the model runs in double precision."""

Values = dict[str, Tensor | None]
Cuts = int | list[str]


@dataclass
class Report:
    """What became of a model with one kind of cuts.

    Attributes:
        passed: Checks that hold.
        failed: Checks that do not, each with the reason.
        unasked: Checks that the model does not admit, each with the reason.
        seconds: Processor time that all of it took.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unasked: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def seed(number: int) -> None:
    """Seed every generator."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def built(factory: Factory, number: int = 0, double: bool = False) -> Example:
    """Return the model and inputs of a factory, the same ones for the same seed."""
    seed(number)
    model, args, kwargs = factory()
    if double:
        model = model.double()
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
        )
    return model, args, kwargs


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in an output, those in dataclasses and plain objects too."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(dict(value) if isinstance(value, Mapping) else value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping) or (type(leaf) is not type and type(leaf).__module__ != "builtins"):
            held = dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            for item in held.values():
                found += tensors_of(item)
    return found


def spread_loss(output: Any, target: Any) -> Tensor:
    """A mean over every floating-point tensor of the output, weighted by position within an example; the target is not used."""
    del target
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.numel():
            width = max(tensor[0].numel() if tensor.dim() > 1 else 1, 1)
            weight = torch.cos(torch.arange(width, dtype=torch.float64) * 0.7 + 1).reshape(
                tensor.shape[1:] if tensor.dim() > 1 else ()
            )
            total = total + (tensor.double() * weight).mean()
    return total


def named_blocks(model: nn.Module) -> list[list[str]]:
    """Return cuts by name, best first: after blocks of the container that holds the most parameters, else after children."""
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in model.named_modules()}
    containers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    found = []
    for path in sorted(containers, key=lambda path: (-sizes[path], path.count("."))):
        children = [f"{path}.{name}".lstrip(".") for name, _ in model.get_submodule(path).named_children()]
        found.append(spaced([child for child in children if sizes[child]] or children))
    children = [name for name, _ in model.named_children()]
    return [*found, *([name] for name in children)]


def spaced(names: list[str], count: int = PARTS - 1) -> list[str]:
    """Return up to ``count`` of the names, evenly spaced, the last one left out."""
    places = {round((index + 1) * len(names) / (count + 1)) - 1 for index in range(count)}
    return [names[place] for place in sorted(places) if 0 <= place < len(names) - 1] or names[:1]


def loss_of_output(output: Any, target: Any) -> Tensor:
    """The loss that a model computes itself; where it is multiplied, a net knows by what. The target is not used."""
    del target
    return next(tensor for tensor in tensors_of(output) if tensor.is_floating_point() and not tensor.dim())


def decoupled(
    example: Example, cuts: Cuts, gradient: Any, verify: bool = False, loss: Any = spread_loss
) -> DecoupledModule:
    """Decouple a model of the sweep."""
    model, args, kwargs = example
    return dnifx.decouple(model, cuts, args=args, kwargs=kwargs, gradient=gradient, loss=loss, verify=verify)


def chosen_cuts(example: Example) -> list[str]:
    """Return the first of the cuts by name that the model admits.

    Raises:
        CutError: None does.
    """
    errors = []
    for names in named_blocks(example[0])[:6]:
        try:
            decoupled(example, names, "zero")
        except CutError as error:
            errors.append(error)
            continue
        return names
    raise errors[0]


def examine(factory: Factory, cuts: Cuts) -> Report:
    """Run every check on a model with some cuts; None stands for cuts by name.

    Raises:
        DnifxError: The model is refused.
    """
    net = decoupled(built(factory), cuts, SMALL, verify=True)
    report = Report()
    for name, check in CHECKS.items():
        try:
            reason = check(factory, cuts, net)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the sweep is there to tell
            report.failed[name] = f"{type(error).__name__}: {error}"
            continue
        if reason is None:
            report.passed.append(name)
        else:
            report.unasked[name] = reason
    return report


def same_outputs(found: Any, wanted: Any) -> None:
    """Assert that two outputs have one structure and equal tensors, bit for bit."""
    assert type(found) is type(wanted), f"the output is {type(found).__name__}, not {type(wanted).__name__}"
    left, right = tensors_of(found), tensors_of(wanted)
    assert len(left) == len(right), f"the output has {len(left)} tensors, not {len(right)}"
    for place, (one, two) in enumerate(zip(left, right, strict=True)):
        assert one.shape == two.shape, f"output tensor {place} is {tuple(one.shape)}, not {tuple(two.shape)}"
        assert one.dtype == two.dtype, f"output tensor {place} is {one.dtype}, not {two.dtype}"
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7)), f"output tensor {place} is not the same"


def same_buffers(net: DecoupledModule, model: nn.Module) -> None:
    """Assert that buffers are equal bit for bit."""
    buffers = dict(net.original.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name].nan_to_num(7), buffer.nan_to_num(7)), f"buffer {name} is not the same"


def check_train(factory: Factory, cuts: Cuts, net: DecoupledModule) -> None:
    """Training: outputs, buffers and random state afterwards are the original's, bit for bit."""
    compare_forward(built(factory), decoupled(built(factory), cuts, "zero"))


def check_eval(factory: Factory, cuts: Cuts, net: DecoupledModule) -> None:
    """Evaluation: the same, with gradients and without."""
    model, args, kwargs = built(factory)
    own = decoupled(built(factory), cuts, "zero")
    model.eval()
    own.eval()
    compare_forward((model, args, kwargs), own)
    with torch.no_grad():
        compare_forward((model, args, kwargs), own)


def compare_forward(example: Example, net: DecoupledModule) -> None:
    """Assert that a net gives what a model gives."""
    model, args, kwargs = example
    seed(1)
    wanted = model(*args, **kwargs)
    random_after, python_after = torch.get_rng_state(), random.getstate()
    seed(1)
    found = net(*args, **kwargs)
    same_outputs(found, wanted)
    assert torch.equal(torch.get_rng_state(), random_after), "other random numbers were drawn"
    assert random.getstate() == python_after, "other random numbers were drawn from Python's generator"
    same_buffers(net, model)


def fused_gradients(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Values:
    """Return the gradients of the model's parameters by the fused target, after one backward pass."""
    net.zero_grad(set_to_none=True)
    seed(1)
    torch.autograd.backward(spread_loss(net(*args, **kwargs), None))
    return own_gradients(net.original)


def own_gradients(model: nn.Module) -> Values:
    """Return the gradients that stand on a model's trainable parameters."""
    return {name: item.grad for name, item in model.named_parameters() if item.requires_grad}


def scheduled_gradients(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Values:
    """Return the gradients that the scheduled target's optimizers are given, each once."""
    kept: dict[int, Tensor | None] = {}
    trainer = net.trainer(lambda parameters: Recorder(parameters, kept))
    seed(1)
    trainer.step(*args, target=None, **kwargs)
    return {name: kept.get(id(item)) for name, item in net.original.named_parameters() if item.requires_grad}


def same_gradients(found: Values, wanted: Values, tolerance: float) -> None:
    """Assert that gradients agree to a share of the largest element among them; none at all is the same as zero."""
    largest = max(
        (float(item.abs().max()) for item in wanted.values() if item is not None and item.numel()), default=0.0
    )
    for name, item in wanted.items():
        other = found.get(name)
        shape = item if item is not None else other
        if shape is None:
            continue
        left, right = (torch.zeros_like(shape) if each is None else each.to_dense() for each in (other, item))
        assert torch.isfinite(right).all(), f"backprop's own gradient of {name} is not finite"
        off = float((left - right).abs().max()) if left.numel() else 0.0
        assert off <= tolerance * largest, (
            f"the gradient of {name} is off by {off:.3g}; the largest of all is {largest:.3g}"
        )


def check_oracle(factory: Factory, cuts: Cuts, net: DecoupledModule) -> None:
    """With the oracle every parameter's gradient is backprop's, in both targets; in double precision where the model has it."""
    double = runs_in_double(factory)
    model, args, kwargs = built(factory, double=double)
    seed(1)
    torch.autograd.backward(spread_loss(model(*args, **kwargs), None))
    wanted, tolerance = own_gradients(model), FLOAT64 if double else FLOAT32
    own = decoupled(built(factory, double=double), cuts, "oracle")
    same_gradients(fused_gradients(own, args, kwargs), wanted, tolerance)
    own = decoupled(built(factory, double=double), cuts, "oracle")
    same_gradients(scheduled_gradients(own, args, kwargs), wanted, tolerance)


def runs_in_double(factory: Factory) -> bool:
    """Whether a model's every gradient can be had in double precision."""
    model, args, kwargs = built(factory, double=True)
    try:
        loss = spread_loss(model(*args, **kwargs), None)
        torch.autograd.backward(loss)
    except (RuntimeError, ValueError, TypeError):
        return False
    return all(item.dtype == torch.float64 for item in model.parameters())


class Detached(fx.Interpreter):
    """Runs a captured graph with every value detached on its way from one partition to another.

    What is detached gets a gradient that nobody reads: torch's group norm ends the process without, in channels last.
    """

    def __init__(self, net: DecoupledModule) -> None:
        graph = net.program.graph
        assert graph is not None
        super().__init__(attach(graph, net, "Captured"))
        self.partition_of = net.program.partition_of

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what it reads of another partition comes detached."""
        self.reader = n
        return super().run_node(n)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Return the values of arguments."""

        def value(node: fx.Node) -> Any:
            held = self.env[node]
            crosses = node.op != "placeholder" and self.partition_of[node.name] != self.partition_of[n.name]
            cut = crosses and isinstance(held, Tensor) and held.requires_grad
            return held.detach().requires_grad_() if cut else held

        return fx.node.map_arg(args, value)


def check_zero(factory: Factory, cuts: Cuts, net: DecoupledModule) -> str | None:
    """With zero estimates gradients are, bit for bit, those of detaching at the cuts, in both targets."""
    example = built(factory)
    model, args, kwargs = example
    own = decoupled(example, cuts, "zero")
    buffers = [buffer.clone() for buffer in model.buffers()]
    seed(1)
    program = own.program
    assert program.signature is not None
    try:
        flat = Detached(own).run(*program.signature.flatten(args, kwargs))
    except GuardError as error:
        return f"what is drawn here leads to another graph than the first: {error}"
    loss = spread_loss(program.signature.unflatten(flat), None)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    wanted = {name: None if item is None else item.clone() for name, item in own_gradients(model).items()}
    for buffer, held in zip(model.buffers(), buffers, strict=True):
        with torch.no_grad():
            buffer.copy_(held)
    behind = any(item is not None and item.any() for item in wanted.values())
    assert behind or not own.partitions[-1].uses, "no gradient behind the last cut"
    fused = fused_gradients(own, args, kwargs)
    same_gradients(fused, wanted, 1e-7)
    other = decoupled(built(factory), cuts, "zero")
    same_gradients(scheduled_gradients(other, args, kwargs), wanted, 1e-7)
    return None


def descend(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of two short steps."""
    return torch.optim.SGD(parameters, lr=1e-3)


def check_steps(factory: Factory, cuts: Cuts, net: DecoupledModule) -> None:
    """Two training steps with synthetic gradients are finite and the same in both targets."""
    states = []
    assert net.program.fused is not None
    told = any(node.target is tell_factor for node in net.program.fused.nodes)
    loss = loss_of_output if told else spread_loss
    for run in (steps_fused, steps_scheduled):
        example = built(factory)
        seed(2)
        own = decoupled(example, cuts, SMALL, loss=loss)
        assert own.boundaries, "no gradient crosses any cut"
        run(own, example[1], example[2], loss)
        states.append(
            {name: tensor.detach() for name, tensor in own.state_dict().items() if tensor.is_floating_point()}
        )
    one, two = states
    for name, tensor in one.items():
        assert torch.isfinite(tensor).all() or name.endswith("mask"), f"{name} is not finite"
        assert torch.allclose(two[name], tensor, rtol=1e-4, atol=1e-6), f"{name} is another in the scheduled target"


def steps_fused(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Any) -> None:
    """Train in a plain loop."""
    groups = [
        [item for item in net.original.parameters() if item.requires_grad],
        list(estimator_parameters(net).values()),
    ]
    optimizers = [descend(group) for group in groups if group]
    for number in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        seed(number)
        torch.autograd.backward(loss(net(*args, **kwargs), None))
        for optimizer in optimizers:
            optimizer.step()


def steps_scheduled(net: DecoupledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Any) -> None:
    """Train by the schedule, on the loss that the net was decoupled with."""
    del loss
    trainer = net.trainer(descend)
    for number in range(2):
        seed(number)
        trainer.step(*args, target=None, **kwargs)


def check_batch(factory: Factory, cuts: Cuts, net: DecoupledModule) -> str | None:
    """With one more example in the batch (a graph: one more node) outputs are the original's, bit for bit."""
    refused = ""
    for grow in (larger, longer):
        model, args, kwargs = built(factory)
        more = grow(args), grow(kwargs)
        try:
            seed(1)
            model(*more[0], **more[1])
        except Exception as error:  # noqa: BLE001 - whatever a model says to another batch size
            refused = f"the model itself does not take it: {type(error).__name__}: {error}"
            continue
        compare_forward((built(factory)[0], *more), decoupled(built(factory), cuts, "zero"))
        return None
    return refused


def larger(value: Any) -> Any:
    """Return inputs with the first example there once more; pairs of node numbers (int64 [2, edges]) stay as they are."""
    if isinstance(value, Tensor):
        edges = value.dim() == 2 and value.shape[0] == 2 and value.dtype == torch.int64 and value.shape[1] > 20
        return torch.cat([value, value[:1]]) if value.dim() and value.shape[0] > 1 and not edges else value
    if isinstance(value, list | tuple):
        return type(value)(map(larger, value))
    return {name: larger(item) for name, item in value.items()} if isinstance(value, dict) else value


def longer(value: Any) -> Any:
    """Return inputs with lists that are one longer."""
    if isinstance(value, tuple):
        return tuple(map(longer, value))
    return [*value, value[0]] if isinstance(value, list) else value


def check_state(factory: Factory, cuts: Cuts, net: DecoupledModule) -> None:
    """The state holds the original's tensors under the original's names; loaded into another net, it gives the same outputs."""
    original, state = net.original.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert all(state.get(name) is tensor for name, tensor in original.items() if isinstance(tensor, Tensor))
    _, args, kwargs = built(factory)
    other_model, _, _ = built(factory, number=5)
    other = decoupled((other_model, args, kwargs), cuts, SMALL)
    other.load_state_dict(net.state_dict())
    net.eval()
    other.eval()
    with restored_training(net):
        seed(1)
        wanted = net(*args, **kwargs)
        seed(1)
        same_outputs(other(*args, **kwargs), wanted)


@contextmanager
def restored_training(net: DecoupledModule) -> Iterator[None]:
    """Put a net back into training mode afterwards."""
    try:
        yield
    finally:
        net.train()


CHECKS: Mapping[str, Callable[[Factory, Cuts, DecoupledModule], str | None]] = {
    "train": check_train,
    "eval": check_eval,
    "oracle": check_oracle,
    "zero": check_zero,
    "steps": check_steps,
    "batch": check_batch,
    "state": check_state,
}
"""The checks by name; each returns why the model does not admit it, or None."""
