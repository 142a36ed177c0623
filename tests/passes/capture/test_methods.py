"""The capture methods: which is taken, what is verified, what is refused, and input kinds that are captured anew."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError, InputError, InputKindWarning
from dnifx.ir import Program
from dnifx.passes.capture import methods
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.methods import recorded, try_methods
from dnifx.passes.graph import captured
from dnifx.passes.pipeline import run_passes
from dnifx.runtime.net import captured as captured_parts
from dnifx.runtime.net.input_kinds import InputKind


class Block(nn.Module):
    """A residual block with batch norm and dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolution says."""
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


class Model(nn.Module):
    """Blocks under options: a mask that may be there, a mode that changes the forward, a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3), Block(3))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Return scores, the batch size and nothing."""
        with torch.no_grad():
            centre = x.mean()
        h = self.blocks(x) + centre
        if mask is not None:
            h = h * mask
        if self.training:
            h = nn.functional.dropout(h, 0.5)
        return {"scores": self.head(h.mean((2, 3))), "batch": x.size(0), "nothing": None}


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["record", "record_cuts", "export"])
def test_each_method_captures_the_model_bit_for_bit(method: str) -> None:
    capture = CaptureGraph(methods=(method,), open_paths=("blocks",))
    program = run_passes(Program(Model(), (X,)), (capture,))
    assert program.capture is not None
    assert program.capture.method == method
    assert program.capture.verified


def test_only_what_the_cuts_need_is_opened() -> None:
    program = run_passes(Program(Model(), (X,)), (CaptureGraph(methods=("record_cuts",), open_paths=("blocks",)),))
    called = {node.target for node in captured(program).nodes if node.op == "call_module"}
    assert called == {"blocks.0", "blocks.1", "head"}


def test_a_method_that_differs_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Program) -> CapturedGraph:
        found = recorded(program)
        node = next(node for node in found.graph.nodes if node.target == "head")
        with found.graph.inserting_after(node):
            doubled = found.graph.call_method("mul", (node, 2.0))
        node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
        return found

    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "record": wrong})
    _, capture = try_methods(Program(Model(), (X,)), ("record", "export"), None, check=True)
    assert capture.method == "export"
    ((method, reason),) = capture.tried
    assert method == "record"
    assert "output scores differs" in reason
    with pytest.raises(CaptureError, match="cannot be captured: its graph differs from the model"):
        try_methods(Program(Model(), (X,)), ("record",), None, check=True)
    assert not try_methods(Program(Model(), (X,)), ("record",), None, check=False)[1].verified


def test_a_graph_that_holds_for_one_batch_size_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reshape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(x.size(0), 12))

    def frozen(program: Program) -> CapturedGraph:
        found = recorded(program)
        for node in found.graph.nodes:
            if node.op == "call_method" and node.target == "reshape":
                node.args = (node.args[0], 2, 12)
        return found

    monkeypatch.setattr(methods, "METHODS", {"record": frozen})
    with pytest.raises(CaptureError, match="at twice the batch size"):
        try_methods(Program(Reshape(), (torch.randn(2, 3, 4),)), ("record",), None, check=True)


def test_meta_models_are_captured_unverified() -> None:
    with torch.device("meta"):
        model, x = Model().eval(), torch.empty(2, 3, 4, 4)
    program = run_passes(Program(model, (x,)), (CaptureGraph(methods=("record",)),))
    assert program.capture is not None
    assert not program.capture.verified
    assert any("meta" in note for note in program.notes)


def loss(output: dict[str, Any], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["scores"], target)


def test_other_modes_and_inputs_are_input_kinds_with_the_same_interfaces() -> None:
    torch.manual_seed(0)
    model = Model()
    net = dnifx.decouple(model, "blocks.*", args=(X,), loss=loss)
    assert len(net.input_kinds) == 1
    for train in (True, False, True):
        for mask in (None, torch.ones(1, 1, 4, 4)):
            net.train(train)
            torch.manual_seed(1)
            got = net(X, mask)
            torch.manual_seed(1)
            expected = model(X, mask)
            assert torch.equal(got["scores"], expected["scores"])
            assert (got["batch"], got["nothing"]) == (expected["batch"], expected["nothing"])
    assert len(net.input_kinds) == 4
    first, *others = net.input_kinds
    for other in others:
        for mine, its in zip(first.program.interfaces, other.program.interfaces, strict=True):
            assert mine.estimator is its.estimator


def test_a_trainer_steps_through_input_kinds() -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(Model(), "blocks.*", args=(X,), loss=loss)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    before = [parameter.clone() for parameter in net.original.parameters()]
    for mask in (None, torch.ones(1, 1, 4, 4), None):
        trainer.step(X, mask=mask, target=torch.tensor([1, 2]))
    assert len(net.input_kinds) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, net.original.parameters(), strict=True))


def test_the_example_and_what_was_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_parts, "MOST_INPUT_KINDS", 3)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, scale: int = 1) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(x)) * scale)
            return out

    x = torch.randn(3, 4)
    net = dnifx.decouple(Scaled(), ["first"], args=(x,))
    for scale in (2, 3, 2, 1):
        net(x, scale)
    with pytest.warns(InputKindWarning, match="3 kinds of inputs"):
        net(x, 4)
    assert [each.number for each in net.input_kinds] == [0, 1, 3], "the one for 3 was used before the one for 2"
    net(x, 1)
    net(x, 2)
    assert net.whole.captures == 4, "nothing is captured anew"


def test_constants_of_every_input_kind_have_names_that_code_can_write() -> None:
    offset = torch.ones(3)

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) + offset)

    model = Offset()
    net = dnifx.decouple(model, "body", args=(torch.randn(2, 3),))
    net.eval()
    assert torch.equal(net(X[..., 0, :3]), model(X[..., 0, :3]))
    names = [name for kind in net.input_kinds for name in kind.program.constants]
    assert len(names) == len(set(names)) == 2
    assert all(part.isidentifier() for name in names for part in name.split("."))


def test_of_values_that_change_from_call_to_call_the_user_is_warned() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.head(self.body(x) * scale)

    net = dnifx.decouple(Scaled(), "body", args=(torch.randn(2, 3), 0.0))
    for step in range(1, 16):
        net(torch.randn(2, 3), float(step))
    with pytest.warns(InputKindWarning, match=r"What changes: scale\. Pass it as a tensor"):
        net(torch.randn(2, 3), 16.0)
    x = torch.randn(2, 3)
    assert torch.equal(net(x, 17.0), net.original(x, 17.0))
    assert len(net.input_kinds) == 16


def test_numbers_that_python_reads_from_tensors_are_named_where_they_change_with_every_call() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h * 2 if float(x.sum()) > 0 else h)

    net = dnifx.decouple(Read(), "body", args=(torch.zeros(2, 3),), verify=False)
    for step in range(1, 16):
        net(torch.full((2, 3), float(step)))
    with pytest.warns(
        InputKindWarning, match=r"it reads:\n.*test_methods.py:\d+: return self.head.*float\(x.sum\(\)\) > 0"
    ):
        net(torch.full((2, 3), 16.0))


def test_a_guard_that_fires_has_the_model_captured_anew() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.body(x)
            if mask.all():
                return self.head(h)
            return self.head(h * mask.unsqueeze(-1))

    torch.manual_seed(0)
    model = Guarded()
    x, full, half = torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, False])
    net = dnifx.decouple(model, "body", args=(x, full), loss=nn.CrossEntropyLoss())
    assert torch.equal(net(x, full), model(x, full))
    assert torch.equal(net(x, half), model(x, half))
    assert len(net.input_kinds) == 2
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for mask in (full, half, full):
        assert trainer.step(x, mask, target=torch.tensor([0, 1, 0, 1])).loss is not None
    assert len(net.input_kinds) == 2


def test_a_guard_that_fires_at_twice_the_batch_does_not_refuse_the_method() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h * 2 if x.shape[0] > 3 else h)

    model = Sized()
    net = dnifx.decouple(model, "body", args=(torch.randn(2, 3),))
    assert net.program.capture is not None
    assert net.program.capture.method == "record"
    for size in (4, 2):
        x = torch.randn(size, 3)
        assert torch.equal(net(x), model(x))


class Late(nn.Module):
    """Branches on a value that stands behind the cut, and counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.other = (
            nn.Linear(3, 3),
            nn.BatchNorm1d(3),
            nn.Linear(3, 2),
            nn.Linear(3, 2),
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of one head or the other."""
        self.calls += 1
        h = torch.relu(self.norm(self.body(x)) + x.mean())
        scores: Tensor = self.head(h) if h.sum() > 9 else self.head(h) + self.other(h)
        return scores


def test_a_guard_behind_the_cut_is_asked_before_anything_is_updated() -> None:
    def decoupled(model: nn.Module, x: Tensor) -> dnifx.DecoupledModule:
        return dnifx.decouple(model, "norm", args=(x,), loss=nn.CrossEntropyLoss(), gradient="zero")

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    torch.manual_seed(0)
    model, x, target = Late(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    single = copy.deepcopy(model)
    trainer = decoupled(model, x).trainer(sgd)
    for batch in (x, x + 5, x - 3, x + 5):
        given = trainer.step(batch, target=target)
        alone = decoupled(single, batch).trainer(sgd).step(batch, target=target)
        assert torch.equal(given.output, alone.output)
    assert len(trainer.net.input_kinds) == 2
    assert any(input_kind.late_guards for input_kind in trainer.net.input_kinds)
    for (name, one), other in zip(model.state_dict().items(), single.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


class Scale(nn.Module):
    """Multiplies by a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return self.factor * x


class AnyWidth(nn.Module):
    """Takes [batch, ..., any width], and another layer where that is 6."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.extra, self.head = Scale(), Scale(), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        h = self.scale(x)
        if x.shape[1] == 6:
            h = h * self.extra(x).tanh().mean(-1, keepdim=True)
        scores: Tensor = self.head(h.flatten(1).mean(1, keepdim=True))
        return scores


def test_values_of_sizes_that_an_estimator_does_not_take_are_refused() -> None:
    net = dnifx.decouple(AnyWidth(), "scale", args=(torch.randn(3, 5),))
    net(torch.randn(7, 5))
    with pytest.raises(InputError, match=r"\[3, 6\].*'scale'.*\[3, 5\]: Affine.*torch.no_grad"):
        net(torch.randn(3, 6))
    x, oracle = torch.randn(3, 6), dnifx.decouple(AnyWidth(), "scale", args=(torch.randn(3, 5),), gradient="oracle")
    assert torch.equal(oracle(x), oracle.original(x))
    tokens = dnifx.decouple(AnyWidth(), "scale", args=(torch.randn(3, 5, 2),))
    for length in (4, 6):
        assert tokens(torch.randn(3, length, 2)).shape == (3, 2)


def test_what_crosses_elsewhere_is_named() -> None:
    for cuts, text in ((["scale", "extra"], "no cut 'extra'"), ("each", "nothing crosses at 'extra'")):
        net = dnifx.decouple(AnyWidth(), cuts, args=(torch.randn(3, 6),))
        with pytest.raises(InputError, match=rf"{text}(.|\n)*example of this call.*torch.no_grad"):
            net(torch.randn(3, 5))


class ManyRows(nn.Module):
    """Branches behind the cut, on the number of examples or, where ``values``, on what they hold."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.body, self.head, self.values = nn.Linear(3, 3), nn.Linear(3, 2), values

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        h = torch.relu(self.body(x))
        large = h.sum() > -1 if self.values else h.shape[0] > 2
        scores: Tensor = self.head(h * 2 if large else h)
        return scores


def test_a_guard_on_sizes_is_asked_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    holds = InputKind.holds

    def counted(input_kind: InputKind, inputs: tuple[Any, ...]) -> bool:
        asked.append(len(inputs[0]))
        return holds(input_kind, inputs)

    monkeypatch.setattr(InputKind, "holds", counted)
    for values, expected in ((False, [4, 5, 2, 2]), (True, [4, 4, 5, 5, 4, 2])):
        asked.clear()
        net = dnifx.decouple(ManyRows(values), "body", args=(torch.randn(3, 3),), loss=nn.CrossEntropyLoss())
        trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        for size in (4, 4, 5, 5, 4, 2):
            trainer.step(torch.randn(size, 3), target=torch.zeros(size, dtype=torch.long))
        assert asked == expected
