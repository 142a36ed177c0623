"""What torch's FSDP2 stands around, and how it sends: the parameters of a partition, over the engine's own process group."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.engines.ranks import Ranks


class Owner(nn.Module):
    """Stands for a module of the model, and holds its parameters alone: what FSDP hangs on it does not reach the model.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(module=module, _parameters=module._parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        """Put a parameter where the module keeps it, in the module's own way."""
        if name in self._parameters:
            setattr(self.__dict__["module"], name, value)
        else:
            super().__setattr__(name, value)


class Gathered(nn.Module):
    """Runs something on the parameters of modules. FSDP stands around it, and gathers them.

    Args:
        modules: The modules that hold the parameters.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(map(Owner, modules))

    def forward(self, run: Callable[[], Any]) -> Any:
        """Run it."""
        return run()


class Gathering:
    """How FSDP gathers shards: over the engine's own group, where the loss of a process is an error that names it.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Ranks) -> None:
        self.engine = engine

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a message."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Put the shards of all replicas one after the other."""
        self.engine.gather_shards(output_tensor, input_tensor)


class Reducing(Gathering):
    """How FSDP reduces gradients to those of shards."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Reduce gradients over the replicas, and leave this one's share."""
        self.engine.reduce_shards(output_tensor, input_tensor, op)
