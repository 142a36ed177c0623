"""The oracle against plain autograd, and against steps written out by hand."""

from copy import deepcopy
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contracts.reference import mean_loss, per_example, step, sum_loss
from tests.random_models.model import Line, Model, Op, Value
from tests.random_models.strategies import models


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@given(models(), st.booleans())
def test_without_cuts_the_oracle_is_backprop(model: Model, training: bool) -> None:
    module, inputs, target = (
        model.build().train(training),
        model.example(3),
        torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
    )
    other = deepcopy(module)
    torch.manual_seed(0)
    loss = mean_loss(module(*inputs), target)
    torch.autograd.backward(loss)
    torch.manual_seed(0)
    found = step(model, other, inputs, target, mean_loss)
    assert torch.equal(found.loss, loss.detach())
    assert not found.targets
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            close(found.gradients[name], parameter.grad)
    assert all(torch.equal(one, two) for one, two in zip(module.buffers(), other.buffers(), strict=True))


def line(name: str, code: str, *inputs: str) -> Line:
    return Line(f"{name} = {code}", (Op((name,), inputs, code),), "written by hand")


DIAMOND = Model(
    (Value("x0", (3,)),),
    ("self.a = nn.Linear(3, 4)", "self.b = nn.Linear(4, 4)", "self.c = nn.Linear(4, 4)"),
    (
        line("h", "self.a(x0)", "x0"),
        line("b", "self.b(h)", "h"),
        line("c", "self.c(h)", "h"),
        line("y", "b * c", "b", "c"),
    ),
    (Value("y", (4,)), Value("h", (4,))),
)
PARTITIONS = {"h": 0, "b": 1, "c": 2, "y": 2, "output": 2}
INPUTS = DIAMOND.example(5)
TARGET = torch.arange(5, dtype=torch.float64)


def layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def by_hand(scale: float, estimates: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients and targets of DIAMOND cut after h and b, step by step."""
    module = layers(DIAMOND.build())
    h = module["a"](INPUTS[0])
    h_b, h_c, h_out = (h.detach().requires_grad_() for _ in range(3))
    b = module["b"](h_b)
    b_c = b.detach().requires_grad_()
    loss = per_example((b_c * module["c"](h_c), h_out), TARGET).sum() * scale
    torch.autograd.backward((loss, b, h), (None, estimates["b"] * scale, estimates["h"] * scale))
    arriving = {"h": gradient(h_b) + gradient(h_c) + gradient(h_out), "b": gradient(b_c)}
    parameters: dict[str, Tensor] = dict(nn.ModuleDict(module).named_parameters())
    return parameters, {name: found / scale for name, found in arriving.items()}


def test_synthetic_gradients_and_targets_are_those_written_out_by_hand() -> None:
    estimates = {
        name: torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) for name in ("h", "b")
    }
    for loss, mean in ((mean_loss, True), (sum_loss, False)):
        found = step(DIAMOND, DIAMOND.build(), INPUTS, TARGET, loss, PARTITIONS, lambda values: estimates, mean)
        parameters, targets = by_hand(1 / 5 if mean else 1.0, estimates)
        assert set(found.values) == {"h", "b"}
        for name, parameter in parameters.items():
            close(found.gradients[name], parameter.grad)
        for name, target in targets.items():
            close(found.targets[name], target)


def test_without_estimates_the_cut_is_a_detach() -> None:
    module = layers(DIAMOND.build())
    h = module["a"](INPUTS[0]).detach()
    torch.autograd.backward(mean_loss((module["b"](h).detach() * module["c"](h), h), TARGET))
    found = step(DIAMOND, DIAMOND.build(), INPUTS, TARGET, mean_loss, PARTITIONS)
    assert found.gradients["a.weight"] is None
    assert found.gradients["b.weight"] is None
    close(found.gradients["c.weight"], module["c"].weight.grad)


def test_a_value_that_the_loss_does_not_depend_on_gets_no_gradient() -> None:
    model = replace(DIAMOND, outputs=DIAMOND.outputs[1:])
    found = step(model, model.build(), INPUTS, TARGET, mean_loss, PARTITIONS, lambda values: values)
    assert set(found.targets) == {"h"}
    assert found.gradients["b.weight"] is None


def test_a_value_rewritten_behind_a_cut_leaves_what_crossed_as_it_was() -> None:
    model = Model(
        (Value("x0", (3,)),),
        ("self.a = nn.Linear(3, 3)",),
        (
            line("h", "self.a(x0)", "x0"),
            Line("w = h.mul_(0.5)", (Op(("w",), ("h",), "h * 0.5", writes=True, views="h", undo="new"),), "in-place"),
        ),
        (Value("w", (3,)),),
    )
    found = step(model, model.build(), INPUTS, TARGET, mean_loss, {"h": 0, "w": 1, "output": 1})
    plain = layers(model.build())["a"](INPUTS[0]).detach()
    close(found.values["h"], plain)
    close(found.targets["h"], plain * 0.5 - TARGET[:, None])
