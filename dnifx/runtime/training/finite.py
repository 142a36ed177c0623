"""Updates that are not made because a gradient is not finite, and the buffers that go back with them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dnifx.ir import Program

Flag = bool | Tensor
"""Whether something was not finite; a tensor on a device that the host does not wait for."""


def not_finite(gradients: Sequence[Tensor]) -> Flag:
    """Whether a gradient is not finite: at once on the CPU, and as a tensor elsewhere."""
    sums = [each.sum(dtype=torch.float32) if each.itemsize < 4 else each.sum() for each in gradients]
    if all(each.is_cpu for each in sums):
        return not math.isfinite(abs(sum([each.item() for each in sums])))
    device = next(each.device for each in sums if each.device.type != "cpu")
    return ~torch.stack([each.isfinite().to(device) for each in sums]).all()


def clear_where(bad: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to zero where a flag on the device says so."""
    for each in parameters:
        if each.grad is not None:
            each.grad = torch.where(bad, torch.zeros_like(each.grad), each.grad)


def step_unless(optimizer: Optimizer, bad: Tensor) -> None:
    """Step an optimizer, and leave parameters and state as they were where a flag on the device says so.

    An optimizer that knows of a gradient scaler's flag (``fused=True``) is given it. Any other steps on zeros, and then goes back;
    the number of its steps, which it counts on the host, goes on.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    clear_where(bad, parameters)
    tensors = [
        *parameters,
        *(value for each in parameters for value in tensors_of(optimizer.state.get(each, {}), bad.device)),
    ]
    before = [each.detach().clone() for each in tensors]
    optimizer.step()
    put_back(tensors, before, bad)


def tensors_of(state: Mapping[str, Any], device: torch.device) -> list[Tensor]:
    """Return the tensors of a parameter's state that lie on a device."""
    return [each for each in state.values() if isinstance(each, Tensor) and each.device.type == device.type]


def put_back(tensors: Sequence[Tensor], before: Sequence[Tensor], bad: Flag) -> None:
    """Put back what tensors held before, where a flag says so."""
    with torch.no_grad():
        for each, value in zip(tensors, before, strict=True):
            each.copy_(value if isinstance(bad, bool) else torch.where(bad.to(each.device), value, each))


def either(flags: Iterable[Flag]) -> Flag:
    """Whether any flag is set."""
    found: Flag = False
    for flag in flags:
        found = found | flag
    return found


class Statistics:
    """The buffers that a step writes, such as running averages: they go back where what they belong to is not updated.

    Args:
        owners: The buffers of each partition or estimator, by the name of what is updated.
    """

    def __init__(self, owners: Mapping[str, Sequence[Tensor]]) -> None:
        self.owners = {name: list(buffers) for name, buffers in owners.items() if buffers}
        self._before: dict[str, list[Tensor]] = {}

    def begin(self) -> None:
        """Keep what they hold before a step."""
        self._before = {name: [each.clone() for each in buffers] for name, buffers in self.owners.items()}

    def end(self, refused: Mapping[str, Flag], otherwise: Flag) -> None:
        """Put back those of what was refused; ``otherwise`` is for what has nothing to update."""
        for name, before in self._before.items():
            bad = refused.get(name, otherwise)
            if bad is not False:
                put_back(self.owners[name], before, bad)
        self._before = {}


def written_buffers(program: Program) -> dict[str, list[Tensor]]:
    """Return the buffers that each partition writes, by the partition's name."""
    if program.graph is None:
        return {}
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, list[Tensor]] = {}
    for partition in program.partitions:
        own: dict[int, Tensor] = {}
        for name in partition.nodes:
            node = nodes.get(name)
            if node is None:
                continue
            if node.op == "call_module":
                own.update((id(each), each) for each in running(program.model.get_submodule(str(node.target))))
            for written in program.measures[name].writes if name in program.measures else ():
                source = nodes.get(written)
                if source is not None and source.op == "get_attr":
                    own.update((id(each), each) for each in buffer_at(program.model, str(source.target)))
        found[partition.name] = list(own.values())
    return found


def running(module: nn.Module) -> list[Tensor]:
    """Return the running statistics of normalisations in a module."""
    layers = [each for each in module.modules() if isinstance(each, _NormBase)]
    return [each for layer in layers for each in layer.buffers(recurse=False)]


def buffer_at(model: nn.Module, path: str) -> list[Tensor]:
    """Return the buffer at a path; none where something else is there."""
    return [each for name, each in model.named_buffers(remove_duplicate=False) if name == path]
