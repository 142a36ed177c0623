"""Runs a captured graph beside the model that it was captured from, and compares them bit for bit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.record.hazards import error_line
from dnifx.passes.capture.record.state import Snapshot, generators, seed
from dnifx.passes.capture.record.structure import copied_arguments, path_name, tensors_in
from dnifx.runtime.emitted.checkpoints import with_checkpoints
from dnifx.runtime.emitted.ops import GuardError


def runnable(model: nn.Module, captured: CapturedGraph) -> fx.GraphModule:
    """Return a module that runs the graph with the model's own submodules, parameters and buffers."""
    root = nn.Module()
    root._modules, root._parameters, root._buffers = model._modules, model._parameters, model._buffers
    vars(root).update(captured.constants)
    module = fx.GraphModule(root, with_checkpoints(captured.graph), class_name=f"Captured{type(model).__name__}")
    captured.graph.owning_module = None  # or lint asks this module for what later passes put into the graph
    return module


def replay(model: nn.Module, captured: CapturedGraph) -> Callable[..., Any]:
    """Return a function that is called as the model is and runs the graph."""
    module, signature = runnable(model, captured), captured.signature
    return lambda *args, **kwargs: signature.unflatten(module(*signature.flatten(args, kwargs)))


@dataclass(frozen=True)
class Outcome:
    """The result of one run: named values, each a tensor or something with ``==``, and the output's structure."""

    values: Mapping[str, Any]
    structure: str


class Comparison:
    """Runs a model and a captured graph under the same seeds; the model is left as it was after every run.

    Outputs, gradients of parameters and inputs, buffers, and the states of the random number generators afterwards are
    compared. What the model itself does not repeat is not counted as a difference.

    Args:
        model: The model.
        captured: The graph.
    """

    def __init__(self, model: nn.Module, captured: CapturedGraph) -> None:
        self._model = model
        self._replay = replay(model, captured)
        self._parameters = dict(model.named_parameters())
        self._snapshot = Snapshot(model)

    def expected(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Outcome:
        """Return what the model does under a seed; errors of the model are raised."""
        return self._outcome(self._model, args, kwargs, number)

    def differences(
        self, expected: Outcome, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int
    ) -> list[str]:
        """Return in words how the graph differs from the model under a seed.

        Raises:
            GuardError: A guard fires: the graph does not hold for these inputs.
        """
        try:
            got = self._outcome(self._replay, args, kwargs, number)
        except GuardError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure of the captured graph is a difference to report
            return [f"seed {number}: the captured graph raises {type(error).__name__}: {error} at {error_line(error)}"]
        found = compare(expected, got)
        if found:
            unsteady = compare(expected, self.expected(args, kwargs, number))
            found = [text for text in found if text not in unsteady]
        return [f"seed {number}: {text}" for text in found]

    def under_seeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeds: Iterable[int] = (0, 1)) -> list[str]:
        """Return the differences under several seeds. A guard that fires counts only if one fires under every seed."""
        fired, found, chosen = [], [], tuple(seeds)
        for number in chosen:
            expected = self.expected(args, kwargs, number)
            try:
                found += self.differences(expected, args, kwargs, number)
            except GuardError as error:
                fired.append(f"seed {number}: a guard fires: {error}")
        return found + (fired if len(fired) == len(chosen) else [])

    def _outcome(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int
    ) -> Outcome:
        """Run forward and backward under a seed."""
        arguments = copied_arguments(args, kwargs)
        gradients = [parameter.grad for parameter in self._parameters.values()]
        with self._snapshot.watching():
            try:
                for parameter in self._parameters.values():
                    parameter.grad = None
                seed(number)
                with torch.enable_grad():
                    result = run(*arguments[0], **arguments[1])
                    _backward(result)
                return Outcome(self._values(arguments, result), _structure(result))
            finally:
                for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
                    parameter.grad = gradient
                self._snapshot.restore()

    def _values(self, arguments: Any, result: Any) -> dict[str, Any]:
        """Return all that is compared after a run, by name."""
        cpu, cuda, python, numpy_state = generators()
        inputs = enumerate(tensor for _, tensor in tensors_in(arguments))
        return {
            **{f"output {path_name(path)}": tensor.detach().clone() for path, tensor in tensors_in(result)},
            **{f"gradient of {path}": parameter.grad for path, parameter in self._parameters.items()},
            **{f"gradient of input {index}": tensor.grad for index, tensor in inputs if tensor.is_leaf},
            **{f"buffer {path}": buffer.detach().clone() for path, buffer in self._model.named_buffers()},
            "torch's random state": cpu,
            **{f"random state of cuda:{index}": state for index, state in enumerate(cuda)},
            "Python's random state": python,
            "NumPy's random state": (numpy_state[1].tobytes(), *numpy_state[2:]),
        }


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
    """Return in words how two outcomes differ."""
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
