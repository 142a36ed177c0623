"""One check for each contract. Property tests call them, and so do the tests that break the compiler."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tests.contracts import reference
from tests.contracts.cases import Bent, Case, Silent, decoupled, random_state
from tests.contracts.expectations import expected, expected_fits
from tests.contracts.running import deep_clone, descend, run, steps_fused, steps_scheduled, train


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
        one, two = (torch.zeros_like(shape) if item is None else item.detach() for item in (left, right))
        assert torch.allclose(one, two, rtol=rtol, atol=atol), (
            f"{name}: {one} instead of {two}, off by {(one - two).abs().max()}"
        )


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
                partitions_of_users = {program.partition_of[user.name] for user in crossing if not is_item(user)}
                assert program.partition_of[node.name] not in partitions_of_users, f"{cut.name} was not cut"


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
