"""The contracts that every decoupled model holds to, each as a check that property tests and tests of the checks call."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import dnifx
from dnifx.errors import CutError, LegalizeError
from dnifx.estimators.base import BoundarySpec
from dnifx.runtime.module.attach import attach
from dnifx.runtime.module.decoupled import DecoupledModule
from tests.contracts import reference
from tests.random_models.strategies import Cuts, Draw, Model, cut_sets, models, node_names

TARGETS = ("fused", "scheduled")
"""The two ways to run a decoupled model."""


class Bent(nn.Module):
    """An estimator of a user's own that is never zero and smooth: ``tanh(value * slope + offset)`` for each value."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        places = enumerate(spec.values)
        self.slopes = nn.ParameterList([torch.tensor(0.7 + 0.1 * i, dtype=v.dtype, device=v.device) for i, v in places])
        self.offset = nn.Parameter(torch.tensor(0.3, dtype=spec.values[0].dtype, device=spec.values[0].device))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.tanh(value * slope + self.offset) for value, slope in zip(values, self.slopes, strict=True))


class Silent(Bent):
    """The same answers, from an estimator that learns nothing and through which no gradient flows."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__(spec)
        self.requires_grad_(False)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return super().forward(values, context)


@dataclass(frozen=True)
class Case:
    """A model, cuts, and the batch that they are tried on."""

    model: Model
    cuts: Cuts
    batch: int = 3
    training: bool = True
    mean: bool = True
    device: str = "cpu"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in self.model.example(self.batch, seed=self.batch))

    @property
    def target(self) -> Tensor:
        return torch.linspace(-1, 2, self.batch, dtype=torch.float64).to(self.device)

    @property
    def loss(self) -> Callable[[object, Tensor], Tensor]:
        return reference.mean_loss if self.mean else reference.sum_loss

    def module(self) -> nn.Module:
        return self.model.build(seed=1).to(self.device).train(self.training)


@st.composite
def cases(draw: Draw, /, without: Iterable[str] = (), training: bool | None = None) -> Case:
    """Draw a case, in training, in evaluation or in either."""
    model = draw(models(without=frozenset(without)))
    modes = [True, False] if training is None else [training]
    return Case(
        model=model,
        cuts=draw(cut_sets(model)),
        batch=draw(st.integers(2, 4)),
        training=draw(st.sampled_from(modes)),
        mean=draw(st.sampled_from([True, True, False])),
    )


def decoupled(case: Case, gradient: Any) -> DecoupledModule:
    """Decouple a case's model; a case whose cuts are refused for a reason is no example of the property."""
    module = case.module()
    reduction: Literal["mean", "sum"] = "mean" if case.mean else "sum"
    try:
        net = dnifx.decouple(
            module, case.cuts, args=case.inputs, gradient=gradient, loss=case.loss, reduction=reduction
        )
    except (CutError, LegalizeError) as error:
        refused(case, error)
    return net.train(case.training)


def refused(case: Case, error: CutError | LegalizeError) -> NoReturn:
    """Leave the example out, if the refusal is one that the case calls for."""
    text = str(error)
    expected = ("leaves nothing behind", "can be cut at", "does not separate", "chose no node", "finds no block")
    if isinstance(error, CutError) and not any(part in text for part in (*expected, "no cut", "no edge")):
        raise AssertionError(f"an unexpected refusal: {text}") from error
    if isinstance(error, LegalizeError) and not case.model.features & {"in-place", "tuple", "attention"}:
        raise AssertionError(f"nothing in the model calls for this refusal: {text}") from error
    reject()


class Recorder(torch.optim.Optimizer):
    """An optimizer that changes nothing and keeps the gradients that it was asked to apply."""

    def __init__(self, parameters: Iterable[Tensor], kept: dict[int, Tensor | None]) -> None:
        super().__init__(parameters, {})
        self.kept = kept

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in self.kept, "a parameter was updated twice in one step"
                self.kept[id(parameter)] = None if parameter.grad is None else parameter.grad.clone()


@dataclass(frozen=True)
class Result:
    """What a target gave: loss, output, gradients by parameter path, and the estimators' own gradients."""

    loss: Tensor
    output: object
    gradients: dict[str, Tensor | None]
    fits: dict[str, Tensor | None]
    random: Tensor


def estimators(net: DecoupledModule) -> dict[str, nn.Module]:
    """Return each boundary's estimator."""
    return {net.boundaries[item.boundary].name: item.estimator for item in net.program.interfaces}


def estimator_parameters(net: DecoupledModule) -> dict[str, nn.Parameter]:
    found = nn.ModuleList(estimators(net).values())
    return dict(found.named_parameters())


def random_state(case: Case) -> Tensor:
    return torch.get_rng_state() if case.device == "cpu" else torch.cuda.get_rng_state()


def run(case: Case, net: DecoupledModule, target: str, inputs: tuple[Tensor, ...] | None = None) -> Result:
    """Run one step of a net in one of the two targets, from the same random state."""
    given = case.inputs if inputs is None else inputs
    goal = case.target if inputs is None else case.target.repeat(len(inputs[0]) // case.batch)
    return (run_fused if target == "fused" else run_scheduled)(case, net, given, goal)


def loss_of(result: Any) -> Tensor:
    assert isinstance(result.loss, Tensor)
    return result.loss.detach()


def run_fused(case: Case, net: DecoupledModule, inputs: tuple[Tensor, ...], goal: Tensor) -> Result:
    net.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = net(*inputs)
    random = random_state(case)
    loss = case.loss(output, goal)
    torch.autograd.backward(loss)
    gradients = {name: item.grad for name, item in net.original.named_parameters() if item.requires_grad}
    fits = {name: item.grad for name, item in estimator_parameters(net).items()}
    return Result(loss.detach(), output, gradients, fits, random)


def run_scheduled(case: Case, net: DecoupledModule, inputs: tuple[Tensor, ...], goal: Tensor) -> Result:
    kept: dict[int, Tensor | None] = {}
    trainer = net.trainer(lambda parameters: Recorder(parameters, kept))
    torch.manual_seed(0)
    result = trainer.step(*inputs, target=goal)
    left = [name for name, item in net.named_parameters() if item.grad is not None and item.grad.any()]
    assert not left, f"the step leaves gradients behind on {left}"
    gradients = {name: kept.get(id(item)) for name, item in net.original.named_parameters() if item.requires_grad}
    fits = {name: kept.get(id(item)) for name, item in estimator_parameters(net).items()}
    return Result(loss_of(result), result.output, gradients, fits, random_state(case))


def locate(case: Case, net: DecoupledModule) -> dict[str, str]:
    """Return the node of the net's graph that makes each tensor of the drawn model: by what they hold, in their order, and by name."""
    module = case.module()
    usual, snapshots = node_names(module), getattr(module, "snapshots")  # noqa: B009 - written into the drawn class
    torch.manual_seed(0)
    nodes = [(node, seen) for node, seen in node_values(case, net).items() if node in needed_nodes(net)]
    torch.manual_seed(0)
    found: dict[str, str] = {}
    start = 0
    for name, value in snapshots(*case.inputs).items():
        places = [place for place in range(start, len(nodes)) if alike(nodes[place][1], value)]
        if name in case.model.needed and places:
            best = next((place for place in places if nodes[place][0] == usual[name]), places[0])
            found[name], start = nodes[best][0], best + 1
    return found


def needed_nodes(net: DecoupledModule) -> set[str]:
    """Return the nodes that the output is computed from, and those that have to do with writing in place."""
    assert net.program.graph is not None
    needed: set[str] = set()
    for node in reversed(net.program.graph.nodes):
        writes = node.op != "output" and net.program.measures[node.name].writes
        if node.op == "output" or writes or node.name in needed:
            needed |= {node.name, *(source.name for source in node.all_input_nodes)}
    return needed


def node_values(case: Case, net: DecoupledModule) -> dict[str, object]:
    """Return what each node of the net's graph makes, and leave buffers as they were."""
    assert net.program.graph is not None
    graph = attach(net.program.graph, net, "Captured")
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    values: dict[str, object] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op.startswith("call"):
                values[n.name] = value.clone() if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Watcher(graph).run(*case.inputs)
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    return values


def alike(seen: object, value: Tensor) -> bool:
    if not isinstance(seen, Tensor) or seen.shape != value.shape or seen.dtype != value.dtype:
        return False
    return torch.equal(seen, value)


def partition_of(case: Case, net: DecoupledModule) -> dict[str, int]:
    """Return the partition of each value of the drawn model, and of its output."""
    places = {value: net.program.partition_of[node] for value, node in locate(case, net).items()}
    for op in case.model.ops:
        home = next((places[name] for name in op.outputs if name in places), reference.NOWHERE)
        places |= {name: places.get(name, home) for name in op.outputs}
    return places | {"output": net.program.partition_of["output"]}


def estimate_by(case: Case, net: DecoupledModule) -> reference.Estimate:
    """Return the net's own estimators, as the oracle asks for them: from crossing values to estimates, by name."""
    values = {node: value for value, node in locate(case, net).items()}
    modules = estimators(net)

    def estimate(crossing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for boundary in net.boundaries:
            named = [values[name.removesuffix("_clone")] for name in boundary.values]
            assert set(named) <= set(crossing), f"no gradient crosses at {named}, only at {list(crossing)}"
            estimates = modules[boundary.name](tuple(crossing[name] for name in named), None)
            found |= dict(zip(named, estimates, strict=True))
        assert set(found) == set(crossing), f"{set(crossing) - set(found)} crosses without an interface"
        return found

    return estimate


def expected(case: Case, net: DecoupledModule, estimate: reference.Estimate | None = None) -> reference.Step:
    """Return what the oracle says of one step, with the net's partitions and estimators."""
    given, places = estimate_by(case, net) if estimate is None else estimate, partition_of(case, net)
    torch.manual_seed(0)
    return reference.step(case.model, case.module(), case.inputs, case.target, case.loss, places, given, case.mean)


def expected_fits(case: Case, net: DecoupledModule, step: reference.Step) -> dict[str, Tensor | None]:
    """Return the gradient of the fit loss, mean over examples of ||estimate - target||^2, by estimator parameter."""
    parameters = estimator_parameters(net)
    names = step.targets
    losses = [
        ((step.estimates[name] - names[name]) ** 2).sum() / case.batch for name in names if name in step.estimates
    ]
    learning = [item for item in parameters.values() if item.requires_grad]
    if not losses or not learning:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(torch.stack(losses).sum(), learning, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def same(found: object, wanted: object, where: str = "output") -> None:
    """Assert that two structures of tensors are equal bit for bit."""
    assert type(found) is type(wanted), f"{where}: {type(found)} instead of {type(wanted)}"
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert list(found) == list(wanted), f"{where}: keys {list(found)} instead of {list(wanted)}"
        for name in wanted:
            same(found[name], wanted[name], f"{where}[{name!r}]")
    elif isinstance(wanted, tuple):
        assert isinstance(found, tuple)
        assert len(found) == len(wanted), f"{where}: {len(found)} values instead of {len(wanted)}"
        for place, (one, two) in enumerate(zip(found, wanted, strict=True)):
            same(one, two, f"{where}[{place}]")
    else:
        assert isinstance(found, Tensor)
        assert isinstance(wanted, Tensor)
        assert found.dtype == wanted.dtype, f"{where}: {found.dtype} instead of {wanted.dtype}"
        assert torch.equal(found, wanted), f"{where}: {found} instead of {wanted}"


def close(
    found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], rtol: float = 1e-12, atol: float = 1e-13
) -> None:
    """Assert that gradients agree; none at all is the same as zero."""
    for name, gradient in wanted.items():
        left, right = found.get(name), gradient
        shape = left if right is None else right
        if shape is None:
            continue
        filled = [torch.zeros_like(shape) if item is None else item.detach() for item in (left, right)]
        text = f"{name}: {filled[0]} instead of {filled[1]}, off by {(filled[0] - filled[1]).abs().max()}"
        assert torch.allclose(filled[0], filled[1], rtol=rtol, atol=atol), text


def check_forward(case: Case, gradient: Any = Bent) -> None:
    """Contract 1: outputs equal the original's bit for bit, with the same random numbers and the same buffers."""
    original, net = case.module(), decoupled(case, gradient)
    torch.manual_seed(0)
    wanted = original(*case.inputs)
    random = random_state(case)
    torch.manual_seed(0)
    same(net(*case.inputs), wanted)
    assert torch.equal(random_state(case), random), "the fused target drew other random numbers"
    same(dict(net.original.named_buffers()), dict(original.named_buffers()), "buffers")
    other = case.model.example(case.batch + 3)
    if case.device == "cpu":
        torch.manual_seed(0)
        wanted = original(*other)
        torch.manual_seed(0)
        same(net(*other), wanted, "output at another batch size")


def check_scheduled_forward(case: Case, gradient: Any = Bent) -> None:
    """Contract 1 for the scheduled target."""
    original, net = case.module(), decoupled(case, gradient)
    torch.manual_seed(0)
    wanted = original(*case.inputs)
    random = random_state(case)
    found = run(case, net, "scheduled")
    same(found.output, wanted)
    assert torch.equal(found.loss, case.loss(wanted, case.target).detach())
    assert torch.equal(found.random, random), "the scheduled target drew other random numbers"
    same(dict(net.original.named_buffers()), dict(original.named_buffers()), "buffers")


def check_oracle(case: Case, target: str) -> None:
    """Contract 2: with the oracle, every parameter's gradient is that of backprop."""
    net = decoupled(case, "oracle")
    torch.manual_seed(0)
    wanted = reference.step(case.model, case.module(), case.inputs, case.target, case.loss)
    close(run(case, net, target).gradients, wanted.gradients)


def check_detached(case: Case, target: str) -> None:
    """Contract 3: with zero estimates, every gradient is that of detaching at the cut."""
    net = decoupled(case, "zero")
    close(run(case, net, target).gradients, expected(case, net, reference.nothing).gradients)


def check_isolated(case: Case, target: str, gradient: Any = Bent) -> None:
    """Contract 3: a partition's gradient is the product of its Jacobian with the synthetic gradient and nothing else."""
    net = decoupled(case, gradient)
    wanted = expected(case, net)
    close(run(case, net, target).gradients, wanted.gradients)


def check_targets(case: Case, target: str, gradient: Any = Bent) -> None:
    """Contracts 5 and 7: an estimator is fitted to the sum over all consumers, per example, and to nothing else."""
    net = decoupled(case, gradient)
    wanted = expected_fits(case, net, expected(case, net))
    found = run(case, net, target).fits
    assert set(found) == set(wanted)
    close(found, wanted)


def check_per_example(case: Case, target: str) -> None:
    """Contract 6: neither the loss's reduction nor the size of the batch changes estimates and targets."""
    mean, total = replace(case, mean=True), replace(case, mean=False)
    net = decoupled(mean, Bent)
    one, whole = run(mean, net, target), run(total, decoupled(total, Bent), target)
    close(whole.fits, one.fits, rtol=1e-10)
    scaled = {name: None if item is None else item * case.batch for name, item in one.gradients.items()}
    close(whole.gradients, scaled, rtol=1e-10)
    twice = run(mean, net, target, tuple(torch.cat((tensor, tensor)) for tensor in case.inputs))
    close(twice.fits, one.fits, rtol=1e-10, atol=1e-11)
    close(twice.gradients, one.gradients, rtol=1e-10, atol=1e-11)


def check_separate(case: Case, target: str) -> None:
    """Contract 7: no estimator's loss reaches the model, and the model's own learning does not reach an estimator."""
    found, frozen = run(case, decoupled(case, Bent), target), run(case, decoupled(case, Silent), target)
    for name, gradient in found.gradients.items():
        other = frozen.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert torch.equal(gradient, other), f"the fit loss reaches {name}"
    assert all(gradient is None for gradient in frozen.fits.values()), "an estimator that is frozen got a gradient"


def check_first_estimate(case: Case, target: str) -> None:
    """Contract 4: the first synthetic gradient of a zero-initialised estimator is exactly zero."""
    net = decoupled(case, "synthetic")
    close(run(case, net, target).gradients, expected(case, net, reference.nothing).gradients)


def descend(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def steps_fused(case: Case, net: DecoupledModule, steps: int) -> list[dict[str, Tensor]]:
    """Train a fused net in a plain loop and return its state after each step."""
    own = [item for item in net.original.parameters() if item.requires_grad]
    optimizers = [descend(group) for group in (own, list(estimator_parameters(net).values())) if group]
    states = []
    for number in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(number)
        torch.autograd.backward(case.loss(net(*case.inputs), case.target))
        for optimizer in optimizers:
            optimizer.step()
        states.append(state_of(net))
    return states


def steps_scheduled(case: Case, net: DecoupledModule, steps: int) -> list[dict[str, Tensor]]:
    """Train a net by its schedule and return its state after each step."""
    trainer = net.trainer(descend)
    states = []
    for number in range(steps):
        torch.manual_seed(number)
        trainer.step(*case.inputs, target=case.target)
        states.append(state_of(net))
    return states


def state_of(net: DecoupledModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def check_targets_agree(case: Case, steps: int = 3) -> None:
    """Contract 8: both targets give the same weights, buffers and estimators, step after step."""
    fused = steps_fused(case, decoupled(case, Bent), steps)
    scheduled = steps_scheduled(case, decoupled(case, Bent), steps)
    for one, two in zip(fused, scheduled, strict=True):
        assert one.keys() == two.keys()
        close(two, one, rtol=1e-11, atol=1e-12)


def check_cut(case: Case) -> None:
    """Every value that a cut names is taken by later partitions only, and no value flows back."""
    net = decoupled(case, "zero")
    program = net.program
    assert program.graph is not None
    for node in program.graph.nodes:
        for user in node.users:
            if node.op != "placeholder":
                assert program.partition_of[node.name] <= program.partition_of[user.name], (
                    f"{node} flows back to {user}"
                )
    for cut in program.cuts:
        for node in program.graph.nodes:
            crossing = [user for user in node.users if user.name not in cut.nodes and goes_on(user)]
            if node.name in cut.nodes and len(cut.nodes) == 1 and program.measures[node.name].requires_grad:
                homes_of_users = {program.partition_of[user.name] for user in crossing if not is_item(user)}
                assert program.partition_of[node.name] not in homes_of_users, f"{cut.name} was not cut"


def goes_on(node: fx.Node) -> bool:
    """Whether a node is no output, and not dead either."""
    return node.op != "output" and any(user.op == "output" or goes_on(user) for user in node.users)


def is_item(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and "getitem" in str(node.target)


def check_state(case: Case) -> None:
    """Contract 10: the original's keys, the original's tensors, and a resumed run continues bit for bit."""
    net = decoupled(case, Bent)
    original = net.original.state_dict(keep_vars=True)
    state = net.state_dict(keep_vars=True)
    assert set(original) <= set(state)
    assert all(state[name] is original[name] for name in original)
    trainer = net.trainer(descend)
    train(case, trainer, range(2))
    saved = deep_clone({"net": net.state_dict(), "trainer": trainer.state_dict()})
    train(case, trainer, range(2, 4))
    other = decoupled(case, Bent)
    other.load_state_dict(saved["net"])
    resumed = other.trainer(descend)
    resumed.load_state_dict(saved["trainer"])
    train(case, resumed, range(2, 4))
    same(dict(other.state_dict()), dict(net.state_dict()), "state")


def train(case: Case, trainer: Any, numbers: Iterable[int]) -> None:
    for number in numbers:
        torch.manual_seed(number)
        trainer.step(*case.inputs, target=case.target)


def deep_clone(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, value)
