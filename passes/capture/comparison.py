"""Runs a captured graph beside the model that it was captured from, and compares them bit for bit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import CaptureError
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.model_state import Read, fixed, held_at
from dnifx.passes.capture.record.generators import generators, seed, set_generators
from dnifx.passes.capture.record.hazards import error_line
from dnifx.passes.capture.record.state import Snapshot
from dnifx.passes.capture.record.structure import copied_arguments, dense_parts, path_name, tensors_in, walk
from dnifx.passes.capture.said import said
from dnifx.passes.capture.saved_tensors import Kept, needs_what_is_kept
from dnifx.runtime.emitted.ops import STREAMS, GuardError
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.input_kinds import hold_constants

UNSTEADY = (
    "the model does not repeat itself under one seed, and the graph does: its forward takes the time, or what no seed decides (os.urandom, "
    "uuid, an iterator)"
)
"""What a graph lacks that repeats itself where the model does not."""


SAID = "what it prints and logs"


def runnable(model: nn.Module, captured: CapturedGraph) -> fx.GraphModule:
    """Return a module that runs the graph with the model's own submodules, parameters and buffers."""
    module = attach(captured.graph, model, f"Captured{type(model).__name__}")
    constants = nn.Module()
    hold_constants(constants, captured.constants)
    vars(module).update(constants._modules)
    return module


def replay(model: nn.Module, captured: CapturedGraph) -> Callable[..., Any]:
    """Return a function that is called as the model is and runs the graph."""
    module, signature = runnable(model, captured), captured.signature

    def run(*args: Any, **kwargs: Any) -> Any:
        values = module(*signature.flatten(args, kwargs))
        signature.write_back(values)
        return signature.unflatten(values)

    return run


@dataclass(frozen=True)
class Outcome:
    """The result of one run: named values, each a tensor or something with ``==``, and the output's structure.

    Attributes:
        values: The values.
        structure: The types of the output's containers, as text.
        backward: Whether there was a backward pass.
    """

    values: Mapping[str, Any]
    structure: str
    backward: bool = True


class Comparison:
    """Runs a model and a captured graph under the same seeds; the model is left as it was after every run.

    Outputs, gradients of parameters and inputs, buffers, and the states of the random number generators afterwards are
    compared. What the model itself does not repeat is not counted as a difference.

    Args:
        model: The model.
        captured: The graph.

    Attributes:
        steered: Whether draws decide what the model does, so that the graph holds for one outcome.
        unsteady: Whether the model does not repeat itself, and the graph does.
        replayed: Whether the last comparison under seeds only held in the random state of the capture.
        changed: The attributes that a run changed.
        hooks: The modules on which a run installed hooks.
        doing: Which pass runs now, or ran when an error was raised.
    """

    def __init__(self, model: nn.Module, captured: CapturedGraph) -> None:
        self._model = model
        self._replay = replay(model, captured)
        self._signature = captured.signature
        self._parameters = dict(model.named_parameters())
        self._snapshot = Snapshot(model, captured.signature.outside)
        self.steered = bool(captured.steered)
        self.unsteady = False
        self.replayed = False
        self.changed: dict[str, None] = {}
        self.hooks: dict[str, None] = {}
        self.doing: str | None = None

    def expected(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int | None, most: int | None = None
    ) -> Outcome:
        """Return what the model does under a seed; errors of the model are raised.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            number: The seed; None for the random state of the capture.
            most: The bytes that forward may keep for a backward pass; beyond that there is none. None for any number of bytes.
        """
        try:
            return self._outcome(self._model, args, kwargs, number, most)
        except Exception as error:
            if most is None or not needs_what_is_kept(error):
                raise
        return self._outcome(self._model, args, kwargs, number)

    def differences(
        self, expected: Outcome, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int | None
    ) -> list[str]:
        """Return in words how the graph differs from the model under a seed.

        Raises:
            GuardError: A guard fires: the graph does not hold for these inputs.
        """
        got = self._got(args, kwargs, number, None if expected.backward else 0)
        return self._compared(expected, got, args, kwargs, number)

    def _got(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int | None, most: int | None = None
    ) -> Outcome | str:
        """Return what the graph does, or what it raises."""
        try:
            return self._outcome(self._replay, args, kwargs, number, most)
        except GuardError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure of the captured graph is a difference to report
            return f"the captured graph raises {type(error).__name__}: {error} at {error_line(error)}"

    def _compared(
        self,
        expected: Outcome,
        got: Outcome | str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        number: int | None,
    ) -> list[str]:
        """Return in words how an outcome of the graph differs from that of the model.

        What the model itself does not repeat under one seed is a difference where the graph repeats it: the graph holds fixed
        what the time, or a source of random numbers without a seed, gave when it was captured.
        """
        found = {"": got} if isinstance(got, str) else compare(expected, got)
        most = None if expected.backward else 0
        unsteady = compare(expected, self.expected(args, kwargs, number, most)) if found else {}
        if (
            unsteady.keys() - {SAID}
            and not isinstance(got, str)
            and not compare(got, self._outcome(self._replay, args, kwargs, number, most))
        ):
            self.unsteady = True
            return [f"{UNSTEADY}; {next(iter(unsteady.values()))}"]
        place = "in the random state of the capture" if number is None else f"seed {number}"
        return [f"{place}: {text}" for name, text in found.items() if name not in unsteady]

    def under_seeds(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeds: Iterable[int | None] = (0, 1)
    ) -> list[str]:
        """Return the differences under the first two seeds for which no guard fires; what fires counts if it does under all."""
        fired, held = [], 0
        self.replayed = True
        for number in seeds:
            try:
                got = self._got(args, kwargs, number)
            except GuardError as error:
                fired.append(f"seed {number}: a guard fires: {error}")
                continue
            held += 1
            self.replayed = self.replayed and number is None
            found = self._compared(self.expected(args, kwargs, number), got, args, kwargs, number)
            if found or held == 2:
                return found
        return [] if held else fired

    def with_other_numbers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the differences where an attribute whose number is an input holds another one, by attribute.

        Python may take a number in a way that nothing shows, and the graph would then hold it fixed.
        """
        found: dict[str, list[str]] = {}
        for each in self._signature.numbers:
            other = each.value + 1
            runs = [partial(self._with_number, each, other, run) for run in (self._model, self._replay)]
            try:
                expected = self._outcome(runs[0], args, kwargs, None if self.steered else 0)
            except Exception:  # noqa: BLE001 - any failure of the model means that it does not take this number
                continue
            try:
                got = self._outcome(runs[1], args, kwargs, None if self.steered else 0)
                found[each.path] = [f"with {each.path} = {other}: {text}" for text in compare(expected, got).values()]
            except GuardError:
                continue
        return found

    def _with_number(self, each: Read, number: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        setattr(each.holder, each.name, number)
        return run(*args, **kwargs)

    def in_sequence(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], calls: int = 3) -> list[str]:
        """Return the differences over several calls, in which attributes stay as the call before left them.

        A call that is of another input kind than the first, or for which a guard fires, ends the comparison.
        """
        key = self._signature.key(args, kwargs)
        got = self._sequence(self._replay, args, kwargs, calls, lambda: self._signature.key(args, kwargs) == key)
        expected = self._sequence(self._model, args, kwargs, len(got), lambda: True)
        return [
            f"call {number + 1} in a row: {text}"
            for number, pair in enumerate(zip(expected, got, strict=True))
            for text in compare(*pair).values()
        ]

    def _sequence(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        calls: int,
        holds: Callable[[], bool],
    ) -> list[Outcome]:
        """Run forward passes, one after the other, as long as they hold."""
        outcomes: list[Outcome] = []
        start = generators()
        with self._snapshot.watching():
            try:
                while len(outcomes) < calls and holds():
                    arguments = copied_arguments(args, kwargs)
                    set_generators(start) if self.steered else seed(len(outcomes))
                    with torch.enable_grad(), said() as texts:
                        result = run(*arguments[0], **arguments[1])
                    values = {**self._values(arguments, result), SAID: tuple(texts)}
                    outcomes.append(Outcome(values, _structure(result)))
                    del result  # or two calls keep their activations at once
            except GuardError:
                pass
            finally:
                self._snapshot.restore()
        return outcomes

    def _outcome(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        number: int | None,
        most: int | None = None,
    ) -> Outcome:
        """Run forward under a seed, and backward unless forward would keep more than so many bytes for it."""
        kept = Kept(most)
        arguments = copied_arguments(args, kwargs)
        gradients = [parameter.grad for parameter in self._parameters.values()]
        with self._snapshot.watching():
            try:
                for parameter in self._parameters.values():
                    parameter.grad = None
                if number is not None:
                    seed(number)
                with torch.enable_grad(), kept.watching(), said() as texts:
                    self.doing = "the forward pass"
                    result = run(*arguments[0], **arguments[1])
                    refuse_streams(self._model, result)
                    self.doing = "the backward pass"
                    if kept.is_whole:
                        _backward(result)
                    self.doing = None
                values = {**self._values(arguments, result), SAID: tuple(texts)}
                return Outcome(values, _structure(result), kept.is_whole)
            finally:
                for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
                    parameter.grad = gradient
                self._snapshot.restore()

    def _values(self, arguments: Any, result: Any) -> dict[str, Any]:
        """Return all that is compared after a run, by name."""
        cpu, cuda, python, numpy_state = generators()
        inputs = enumerate(tensor for _, tensor in tensors_in(arguments))
        return {
            **{
                f"output {path_name(path)}" if path else "the output": tensor.detach().clone()
                for path, tensor in tensors_in(result)
            },
            **{f"gradient of {path}": parameter.grad for path, parameter in self._parameters.items()},
            **{f"gradient of input {index}": tensor.grad for index, tensor in inputs if tensor.is_leaf},
            **{f"buffer {path}": buffer.detach().clone() for path, buffer in self._model.named_buffers()},
            **{
                f"parameter {path}": each.detach().clone() for path, each in self._snapshot.written_of(self._parameters)
            },
            **self._attributes(),
            "torch's random state": cpu,
            **{f"random state of cuda:{index}": state for index, state in enumerate(cuda)},
            "Python's random state": python,
            "NumPy's random state": (numpy_state[1].tobytes(), *numpy_state[2:]),
        }

    def _attributes(self) -> dict[str, Any]:
        """Return what the attributes that changed hold now, by name."""
        found: dict[str, Any] = {}
        hooks = self._snapshot.new_hooks()
        self.hooks.update(dict.fromkeys(hooks))
        for (holder, name), text in self._snapshot.changes().items():
            self.changed[text] = None
            for path, leaf in walk(held_at(holder, name), whole=True):
                place = f"attribute {text}" + (f" {path_name(path)}" if path else "")
                if isinstance(leaf, Tensor):
                    found[place] = leaf.detach().clone()
                elif not hooks:  # else it may be a flag that says that the hooks are installed
                    found[place] = fixed(leaf)
        return found


def _backward(result: Any) -> None:
    """Backpropagate a fixed random projection of every differentiable output."""
    draws = torch.Generator().manual_seed(1234)
    total: Tensor | None = None
    given = (tensor for _, tensor in tensors_in(result) if tensor.requires_grad)
    for dense in [part for tensor in given for part in dense_parts(tensor)]:
        weight = torch.randn(dense.shape, generator=draws, dtype=torch.float64).to(dense.device, dense.dtype)
        part = (dense * weight).sum().abs()
        total = part if total is None else total + part.to(total)
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]


def refuse_streams(model: nn.Module, result: Any) -> None:
    """Raise CaptureError where an output holds something that is used up by reading it, such as a generator."""
    for path, leaf in walk(result):
        if isinstance(leaf, STREAMS):
            where = f" at {path_name(path)!r}" if path else ""
            raise CaptureError(
                f"{type(model).__name__} returns a {type(leaf).__name__}{where}, whose tensors are not known before it is read. "
                "Return a list or a tuple of them"
            )


def _structure(result: Any) -> str:
    """Return the types of an output's containers as text."""
    if isinstance(result, Tensor):
        return f"Tensor[{result.dtype}, requires_grad={result.requires_grad}]"
    if isinstance(result, dict):
        return f"{type(result).__qualname__}({', '.join(f'{key}: {_structure(result[key])}' for key in result)})"
    if isinstance(result, tuple | list):
        return f"{type(result).__qualname__}({', '.join(map(_structure, result))})"
    return f"{result!r}" if isinstance(result, bool | int | float | str | type(None)) else type(result).__qualname__


def compare(expected: Outcome, got: Outcome) -> dict[str, str]:
    """Return in words how two outcomes differ, by the name of what differs."""
    found = {}
    if expected.structure != got.structure:
        found["the output"] = f"the output is {got.structure}, expected {expected.structure}"
    for name in dict.fromkeys((*expected.values, *got.values)):
        left, right = expected.values.get(name), got.values.get(name)
        if not same(left, right):
            found[name] = f"{name} differs{_by_how_much(left, right)}"
    return found


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal bit for bit; NaN equals NaN."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and bool(left == right)
    if left.dtype != right.dtype or left.layout != right.layout or left.is_nested != right.is_nested:
        return False
    if left.is_nested or left.layout is not torch.strided:
        pairs = dense_parts(left), dense_parts(right)
        return len(pairs[0]) == len(pairs[1]) and all(map(same, *pairs))
    if left.shape != right.shape:
        return False
    return torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all())


def _by_how_much(left: Any, right: Any) -> str:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return f": expected {_short(left)}, got {_short(right)}"
    if left.is_nested or right.is_nested:
        return ""
    if left.shape != right.shape or left.dtype != right.dtype:
        return f": expected {left.dtype}{list(left.shape)}, got {right.dtype}{list(right.shape)}"
    if not left.is_floating_point() or left.numel() == 0:
        return ""
    return f" by at most {(left - right).abs().max().item():.3g} of {left.abs().max().item():.3g}"


def _short(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:60]
