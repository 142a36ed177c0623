"""Contract 15: no name can change what emitted code does, and none runs."""

import ast
import copy
import importlib.util
import json
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.passes.capture.record import writer
from dnifx.passes.emit import folder_text, step
from dnifx.report import html, svg, terminal
from dnifx.report.dot import to_dot
from dnifx.report.explorer import graph_collection
from dnifx.report.facts import as_dict
from dnifx.report.html import to_html
from dnifx.report.svg import to_svg
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted import source, text
from tests.contracts.hostile import BREAKOUTS, FORBIDDEN, RESERVED, RUN, Hostile, Names, all_names, hostile, watched
from tests.report.page_reader import Page, check_data
from tests.report.report_programs import chain

PLAIN_PAGE = Page(to_html(chain()))
"""A page without strange names: its elements, its script and its style are those of every page."""

ALL_BREAKOUTS = [text.format(RUN).replace(".", "") for text in BREAKOUTS]
NAMED = [name for name in (*ALL_BREAKOUTS, *RESERVED) if name not in FORBIDDEN]


def loss_of(output: dict[str, Tensor], target: Tensor) -> Tensor:
    """Return a loss of all that a model returns."""
    return sum((value - target).square().mean() for value in output.values())  # type: ignore[return-value]


def decoupled(model: Hostile, batch: dict[str, Tensor], gradient: Any = "oracle") -> DecoupledModule:
    """Cut a model after its first two modules."""
    first, second, _ = model.names_.modules
    return dnifx.decouple(model, [first, second], args=(batch,), loss=loss_of, gradient=gradient)


def imported(folder: Path, name: str) -> ModuleType:
    """Import an emitted package."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    try:
        spec.loader.exec_module(package)
    finally:
        for each in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[each]
    return package


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two outputs are the same."""
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def clean(written: str) -> bool:
    """Whether a text is Python of printable ASCII."""
    ast.parse(written)
    return all(" " <= letter <= "~" or letter == "\n" for letter in written)


def check_graphs(model: Hostile, batch: dict[str, Tensor]) -> None:
    """The net computes what the model does, with its gradients, also as a copy; a step trains it, and a probe looks."""
    net, twin, target = decoupled(model, batch), copy.deepcopy(model), torch.zeros(3, 4)
    assert same(net(batch), model(batch))
    assert same(copy.deepcopy(net)(batch), model(batch))
    loss_of(net(batch), target).backward()  # type: ignore[no-untyped-call]
    loss_of(twin(batch), target).backward()  # type: ignore[no-untyped-call]
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer.step(batch, target=target, diagnose=True)
    trainer.probe(batch, target=target)
    assert clean(net.code)
    assert clean(decoupled(model, batch, "suffix").code)


def check_folder(model: Hostile, batch: dict[str, Tensor]) -> None:
    """An emitted folder computes what the model does, trains, and its state and the net's load into each other."""
    net = decoupled(model, batch, "synthetic")
    with tempfile.TemporaryDirectory() as scratch:
        net.to_folder(Path(scratch) / "package")
        assert clean((Path(scratch) / "package" / "model.py").read_text(encoding="ascii"))
        package = imported(Path(scratch) / "package", "emitted_package")
        made = package.Net()
    inputs = net.program.signature.flatten((batch,), {})  # type: ignore[union-attr]
    assert same(made(*inputs), model(batch))
    assert set(made.state_dict()) == set(net.state_dict())
    made.load_state_dict(net.state_dict())
    net.load_state_dict(made.state_dict())
    assert set(model.state_dict()) <= set(made.state_dict())
    trainer = package.Trainer(made, lambda parameters: torch.optim.SGD(parameters, lr=0.1), loss_of)
    mine = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer.step(*inputs, torch.zeros(3, 4))
    mine.step(batch, target=torch.zeros(3, 4))
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in net.state_dict().items())


def check_reports(model: Hostile, batch: dict[str, Tensor]) -> None:
    """Pictures and reports can be opened; nothing in them acts on a terminal."""
    net = decoupled(model, batch, "synthetic")
    ElementTree.fromstring(to_svg(net.program))
    assert json.loads(json.dumps(as_dict(net.program)))
    texts = pytree.tree_leaves(graph_collection(net.program))
    assert all(letter.isprintable() or letter == "\n" for text in texts for letter in text)
    check_dot(to_dot(net.program))
    check_page(net.to_html())
    assert all(letter.isprintable() or letter == "\n" for letter in str(net))


def check_page(written: str) -> None:
    """A page is ASCII, no name makes an element or reaches its script, and its data are text that can be seen."""
    read = Page(written)
    assert written.isascii()
    assert read.elements == PLAIN_PAGE.elements
    assert read.texts["script"][1:] == PLAIN_PAGE.texts["script"][1:]
    assert read.texts["style"] == PLAIN_PAGE.texts["style"]
    assert "<" not in read.texts["script"][0]
    check_data(read.data)
    assert all(letter.isprintable() or letter in "\n\t" for text in texts_in(read.data) for letter in text)


def texts_in(data: Any) -> Iterator[str]:
    """Return all texts in data."""
    if isinstance(data, str):
        yield data
    for each in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from texts_in(each)


def check_dot(written: str) -> None:
    """Every line of a DOT text has whole strings and nothing that acts on a terminal."""
    for line in written.splitlines():
        assert line.isprintable()
        inside, escaped = False, False
        for letter in line:
            inside ^= letter == '"' and not escaped
            escaped = letter == "\\" and not escaped
        assert not inside, line


@settings(max_examples=6)
@given(all_names())
def test_graphs_and_steps(names: Names) -> None:
    with watched() as ran:
        check_graphs(*hostile(names))
        assert not ran


@settings(max_examples=4)
@given(all_names())
def test_folders(names: Names) -> None:
    with watched() as ran:
        check_folder(*hostile(names))
        assert not ran


@settings(max_examples=4)
@given(all_names())
def test_reports(names: Names) -> None:
    with watched() as ran:
        check_reports(*hostile(names))
        assert not ran


class Many(nn.Module):
    """A chain of layers, each scaled by a buffer and shifted by a parameter, under many names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.order_ = list(names)
        for name in names:
            self.add_module(name, nn.Linear(3, 3))
            self.register_buffer(f"{name}b", torch.rand(3))
            self.register_parameter(f"{name}p", nn.Parameter(torch.rand(3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of the input."""
        for name in self.order_:
            held: Any = self._modules[name], self._buffers[f"{name}b"], self._parameters[f"{name}p"]
            x = torch.tanh(held[0](x)) * held[1] + held[2]
        return x


class Tensors(nn.Module):
    """Adds many parameters and buffers to its input; the names are theirs as they are."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.first_, self.last_ = nn.Linear(3, 3), nn.Linear(3, 3)
        for place, name in enumerate(names):
            if place % 2:
                self.register_buffer(name, torch.rand(3))
            else:
                self.register_parameter(name, nn.Parameter(torch.rand(3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum behind two layers."""
        x = torch.relu(self.first_(x))
        held: Any = [*self._parameters.values(), *self._buffers.values()]
        for each in held:
            x = x * each
        result: Tensor = self.last_(x)
        return result


@pytest.mark.parametrize("kind", [Many, Tensors])
@pytest.mark.parametrize("start", range(0, len(NAMED), 60))
def test_every_name_that_means_something(kind: type[nn.Module], start: int) -> None:
    torch.manual_seed(0)
    model, x, y = kind(NAMED[start : start + 60]), torch.randn(2, 3), torch.zeros(2, 3)  # type: ignore[call-arg]
    with watched() as ran:
        net = dnifx.decouple(model, 2, args=(x,), loss=nn.functional.mse_loss)
        assert torch.equal(net(x), model(x))
        with tempfile.TemporaryDirectory() as scratch:
            net.to_folder(Path(scratch) / "package")
            package = imported(Path(scratch) / "package", "emitted_package")
            made = package.Net()
        assert torch.equal(made(x), model(x))
        assert set(made.state_dict()) == set(net.state_dict())
        made.load_state_dict(net.state_dict())
        package.Trainer(made, lambda parameters: torch.optim.SGD(parameters, lr=0.1), nn.functional.mse_loss).step(x, y)
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(x, target=y)
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in net.state_dict().items())
        assert clean(net.code)
        assert not ran


WORDS = Names(
    ("loss", "examples", "scale"), "torch", "held", "self", ("target", "context"), ("output", "x"), "Net", "a"
)
"""Names of generated code's own."""
CONTROL = Names(("a", "b", "c"), "d", "e", "f", ("x", "y"), ("x", "y"), "a\x1b\u2028b", "a")
"""A class that is called by characters that XML forbids."""
BROKEN = [
    Names((first, second, "a"), "b", "c", first, (first, second), (second, first), third, first)
    for first, second, third in zip(ALL_BREAKOUTS[::3], ALL_BREAKOUTS[1::3], ALL_BREAKOUTS[2::3], strict=False)
]
"""Names that break out of what they are written in."""
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], Sequence[Names]]] = {
    "strings as they are": (source, "literal", lambda each: f"'{each}'", BROKEN),
    "attributes as torch.fx writes them": (text, "literal", lambda each: f'"{each}"', BROKEN),
    "comments as they are": (step, "comment", str, BROKEN),
    "docstrings as they are": (folder_text, "docstring", str, BROKEN),
    "values of a step as they are": (step, "local", str, [WORDS]),
    "any node name": (writer, "reserve_names", lambda graph: None, [WORDS]),
    "markup as it is": (terminal, "shown", lambda each, style="": each, BROKEN),
    "characters as they are": (svg, "visible", str, [CONTROL]),
    "data of a page as they are": (html, "embedded", json.dumps, BROKEN),
    "characters of a page as they are": (html, "visible", str, [CONTROL]),
}
"""Ways to write names that let them act: what is replaced in which module, by what, and the names that show it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_name_that_is_written_otherwise_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, replacement, tried = FAULTS[fault]
    monkeypatch.setattr(module, name, replacement)
    assert any(map(acts, tried)), "no check saw the fault"


def acts(names: Names) -> bool:
    """Whether names ran, or broke a text or what is computed."""
    with watched() as ran:
        try:
            for check in (check_graphs, check_folder, check_reports):
                check(*hostile(names))
        except Exception:  # noqa: BLE001 - whatever a broken text raises, the fault was found
            return True
        return bool(ran)
