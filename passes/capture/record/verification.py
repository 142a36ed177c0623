"""Compares a captured program with the model it was captured from, bit for bit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.ir import Signature
from dnifx.passes.capture.record.hazards import close_to_line
from dnifx.passes.capture.record.rounds import copied
from dnifx.passes.capture.record.run_graph import replay
from dnifx.passes.capture.record.state import Snapshot, generators, seed
from dnifx.passes.capture.record.structure import path_name, tensors_in
from dnifx.runtime.emitted.ops import GuardError


@dataclass(frozen=True)
class Outcome:
    """What one run of a program shows: named values, each a tensor or something with ``==``."""

    values: Mapping[str, Any]
    structure: str


class SideBySide:
    """Runs a model and a graph that was captured from it side by side; the model is left as it was after every run.

    Args:
        model: The model.
        graph: The graph.
        constants: Values that the graph reads beside the model's own.
        signature: How the graph is called.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, constants: Mapping[str, object], signature: Signature
    ) -> None:
        self._model = model
        self._replay = replay(model, graph, constants, signature)
        named = list(model.named_parameters())
        self._parameters = [parameter for _, parameter in named]
        self._titles = [f"gradient of {path}" for path, _ in named]
        self._snapshot = Snapshot(model)

    def expected(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Outcome:
        """Return what the model itself does from a seed; what it raises is its own."""
        return self._outcome(self._model, args, kwargs, number)

    def differences(
        self, expected: Outcome, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int
    ) -> list[str]:
        """Return in words what the graph does otherwise than the model did; what the model does not repeat is not counted.

        Raises:
            GuardError: A guard fires: the graph does not claim to hold.
        """
        try:
            got = self._outcome(self._replay, args, kwargs, number)
        except GuardError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure of the captured program is a difference to report
            return [
                f"seed {number}: the captured graph raises {type(error).__name__}: {error} at {close_to_line(error)}"
            ]
        found = compare(expected, got)
        if found:
            unsteady = compare(expected, self.expected(args, kwargs, number))
            found = [text for text in found if text not in unsteady]
        return [f"seed {number}: {text}" for text in found]

    def _outcome(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int
    ) -> Outcome:
        """Run a program forward and backward from a seed and return what it shows."""
        own_args, own_kwargs = copied(args, kwargs)
        gradients = [parameter.grad for parameter in self._parameters]
        with self._snapshot.watching():
            try:
                for parameter in self._parameters:
                    parameter.grad = None
                seed(number)
                with torch.enable_grad():
                    result = run(*own_args, **own_kwargs)
                    _backward(result)
                values = {
                    **_outputs(result),
                    **dict(zip(self._titles, [parameter.grad for parameter in self._parameters], strict=True)),
                    **_input_gradients((own_args, own_kwargs)),
                    **_buffers(self._model),
                    **_generators(),
                }
                return Outcome(values, _structure(result))
            finally:
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
                self._snapshot.restore()


def verify(
    model: nn.Module,
    graph: fx.Graph,
    constants: Mapping[str, object],
    signature: Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seeds: Iterable[int] = (0, 1),
) -> list[str]:
    """Return the differences between a captured graph and its model; the model is left as it was.

    Outputs, gradients of parameters and inputs, buffers, and the states of the random number generators afterwards are
    compared bit for bit. What the model itself does not repeat is not counted. A guard that fires is no difference,
    unless it fires under every seed.

    Args:
        model: The model.
        graph: The graph.
        constants: Values that the graph reads beside the model's own.
        signature: How the graph is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        seeds: Seeds under which both are run.
    """
    return under_seeds(SideBySide(model, graph, constants, signature), args, kwargs, seeds)


def under_seeds(both: SideBySide, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeds: Iterable[int]) -> list[str]:
    """Return the differences under several seeds; see ``verify``."""
    fired, found = [], []
    chosen = tuple(seeds)
    for number in chosen:
        expected = both.expected(args, kwargs, number)
        try:
            found += both.differences(expected, args, kwargs, number)
        except GuardError as error:
            fired.append(f"seed {number}: a guard fires: {error}")
    return found + (fired if len(fired) == len(chosen) else [])


def _backward(result: Any) -> None:
    """Backpropagate a fixed random projection of every differentiable output."""
    draws = torch.Generator().manual_seed(1234)
    total: Tensor | None = None
    for _, tensor in tensors_in(result):
        if tensor.requires_grad:
            weight = torch.randn(tensor.shape, generator=draws, dtype=torch.float64).to(tensor.device, tensor.dtype)
            part = (tensor * weight).sum().abs()
            total = part if total is None else total + part.to(total)
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]


def _outputs(result: Any) -> dict[str, Any]:
    return {f"output {path_name(path)}": tensor.detach().clone() for path, tensor in tensors_in(result)}


def _input_gradients(arguments: Any) -> dict[str, Any]:
    return {
        f"gradient of input {index}": tensor.grad
        for index, (_, tensor) in enumerate(tensors_in(arguments))
        if tensor.is_leaf
    }


def _buffers(model: nn.Module) -> dict[str, Any]:
    return {f"buffer {path}": buffer.detach().clone() for path, buffer in model.named_buffers()}


def _generators() -> dict[str, Any]:
    cpu, cuda, python, numpy_state = generators()
    return {
        "torch's random state": cpu,
        **{f"random state of cuda:{index}": state for index, state in enumerate(cuda)},
        "Python's random state": python,
        "NumPy's random state": (numpy_state[1].tobytes(), *numpy_state[2:]),
    }


def _structure(result: Any) -> str:
    """Return the types of an output's containers as text."""
    if isinstance(result, Tensor):
        return f"Tensor[{result.dtype}, requires_grad={result.requires_grad}]"
    if isinstance(result, dict):
        return f"{type(result).__qualname__}({', '.join(f'{key}: {_structure(result[key])}' for key in result)})"
    if isinstance(result, tuple | list):
        return f"{type(result).__qualname__}({', '.join(map(_structure, result))})"
    return f"{result!r}" if isinstance(result, bool | int | float | str | type(None)) else type(result).__qualname__


def compare(expected: Outcome, got: Outcome) -> list[str]:
    """Return in words what differs between two outcomes."""
    found = (
        [] if expected.structure == got.structure else [f"the output is {got.structure}, expected {expected.structure}"]
    )
    for name in dict.fromkeys((*expected.values, *got.values)):
        left, right = expected.values.get(name), got.values.get(name)
        if not same(left, right):
            found.append(f"{name} differs{_by_how_much(left, right)}")
    return found


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal bit for bit; NaN equals NaN."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and bool(left == right)
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    if left.layout is not torch.strided:
        return same(left.to_dense(), right.to_dense())
    return torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all())


def _by_how_much(left: Any, right: Any) -> str:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return f": expected {_short(left)}, got {_short(right)}"
    if left.shape != right.shape or left.dtype != right.dtype:
        return f": expected {left.dtype}{list(left.shape)}, got {right.dtype}{list(right.shape)}"
    if not left.is_floating_point() or left.numel() == 0:
        return ""
    return f" by at most {(left - right).abs().max().item():.3g} of {left.abs().max().item():.3g}"


def _short(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:60]
