"""Several optimizers that update the parameters of one partition together, such as one for matrices and one for the rest."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class OptimizerSet(Optimizer):
    """Optimizers of disjoint parameters, as one: it steps all of them, and has the groups of all.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self.defaults = dict(self.optimizers[0].defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in order."""
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The states of all parameters."""
        return {parameter: state for each in self.optimizers for parameter, state in each.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every optimizer."""
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of each optimizer."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the optimizers."""
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what was pickled."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.optimizers))})"
