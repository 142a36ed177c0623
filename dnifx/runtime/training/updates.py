"""How a step updates: gradients of several steps added up, averaged over replicas, clipped, and given to the optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnifx.errors import LossError, OptimizerError, StateError
from dnifx.ir import Boundary, Recurrence
from dnifx.runtime.emitted.backward import added
from dnifx.runtime.emitted.finite import Flag, changed, clear_where, not_finite, put_back, step_unless, why_not_updated
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.replicas import Total, average
from dnifx.runtime.training.scaling import Scaling
from dnifx.runtime.training.shard_states import load_sums
from dnifx.runtime.training.shards import Shards, own_part, refuse_mixed, refused_by
from dnifx.runtime.training.turns import Turn

Clip = float | Callable[[list[nn.Parameter]], object]
Penalty = Callable[[Mapping[str, nn.Parameter]], Tensor]


@dataclass(frozen=True)
class UpdateOptions:
    """What is done with gradients before an optimizer takes them.

    Attributes:
        clip: The largest norm of a partition's gradient, or a callable that is given the partition's parameters; None for neither.
        accumulate: How many steps make one update.
        total: Adds gradients up over replicas, so that they are averaged; None where they are not.
        on_nonfinite: What a gradient that is not finite does to a step, beside that its update is not made: ``"raise"`` breaks the
            step off, where the host knows of it; ``"skip"`` lets it go on.
        penalty: From a partition's parameters, by name, to a scalar whose gradient is added.
        scaling: What multiplies the loss, so that gradients are divided.
        autocast: What partitions, estimators and the loss are cast to; None for no autocast.
        shards: The weights that are sharded over replicas; None where each replica has all.
    """

    clip: Clip | None = None
    accumulate: int = 1
    total: Total | None = None
    on_nonfinite: str = "raise"
    penalty: Penalty | None = None
    scaling: Scaling | None = None
    autocast: torch.dtype | None = None
    shards: Shards | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.accumulate, int) and not isinstance(self.accumulate, bool)
        if not whole or self.accumulate < 1:
            raise OptimizerError(
                f"accumulate={self.accumulate!r}: give the number of steps that make one update, 1 or more"
            )
        if self.on_nonfinite not in ("raise", "skip"):
            raise OptimizerError(f"on_nonfinite={self.on_nonfinite!r}: give 'raise' or 'skip'")
        if self.penalty is not None and not callable(self.penalty):
            raise OptimizerError(
                f"penalty={self.penalty!r}: give a callable from a partition's parameters, by name, to a scalar, such as lambda "
                "parameters: 0.01 * sum(each.square().sum() for each in parameters.values())"
            )
        if self.autocast not in (None, torch.float16, torch.bfloat16):
            raise OptimizerError(f"autocast={self.autocast!r}: give torch.bfloat16, torch.float16 or None")
        number = isinstance(self.clip, int | float) and not isinstance(self.clip, bool)
        if self.clip is not None and not callable(self.clip) and not (number and self.clip > 0):
            raise OptimizerError(
                f"clip={self.clip!r}: give the largest norm that a partition's gradient may have, a number above 0, or a callable "
                "that is given the partition's parameters"
            )


class Update:
    """One optimizer, as the training steps of a trainer call it.

    Args:
        name: What it updates, for a note.
        optimizer: The optimizer.
        options: What is done with the gradients before.
        turn: Is told of every update.
        names: The names of parameters, for a penalty.

    Attributes:
        count: How many steps were added up since the last update.
        refused: Whether the update of the last step was not made, since a gradient was not finite.
    """

    def __init__(
        self, name: str, optimizer: Optimizer, options: UpdateOptions, turn: Turn, names: Mapping[nn.Parameter, str]
    ) -> None:
        self.name, self.optimizer, self.options, self.turn, self.count = name, optimizer, options, turn, 0
        self.names = names
        self.refused: Flag = False
        self._sums: dict[nn.Parameter, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self) -> None:
        """Take the gradients of a step: add them up, or, where enough were added up, update.

        Raises:
            LossError: A gradient is not finite.
        """
        if self.ready():
            self.make()

    def ready(self) -> bool:
        """Do all of ``step`` before the optimizer is called; return whether it is to be called.

        Raises:
            LossError: A gradient is not finite.
        """
        several = self.options.accumulate > 1
        if self.options.total is not None and not several:
            average(self.parameters, self.options.total)  # before the look at them, so that all processes see the same
        if self.options.scaling is not None:
            self.options.scaling.unscale(self.optimizer)
        if self.options.penalty is not None:
            self.penalise(self.options.penalty)
        shards = self.options.shards
        bad = not_finite([own_part(each.grad) for each in self.parameters if each.grad is not None])
        if shards is not None:
            bad = shards.agree(self.parameters, bool(bad))
        self.refused = bad
        if bad is True:
            if self.options.on_nonfinite == "raise" and not self.overflows:
                raise LossError(why_not_updated(self.name, "net.trainer"))
            for parameter in self.parameters:
                parameter.grad = None
            if not several:
                return False
        elif isinstance(bad, Tensor) and several:
            clear_where(bad, self.parameters)
        if several and not self.complete():
            return False
        if self.options.total is not None and several:
            average(self.parameters, self.options.total)
        if self.options.clip is not None:
            self.limit(self.options.clip)
        return True

    def limit(self, clip: Clip) -> None:
        """Clip the gradients."""
        shards = self.options.shards
        if callable(clip):
            clip(self.parameters) if shards is None else shards.clip_by(clip, self.parameters)
        elif shards is None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        else:
            shards.clip(self.parameters, clip)

    @property
    def flag(self) -> Tensor | None:
        """Says on a device whether the update that is ready is to change nothing; None where it is to be made."""
        return self.refused if isinstance(self.refused, Tensor) and self.options.accumulate == 1 else None

    def kept(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return what an update may change, and copies of it, where a flag says on a device whether it does."""
        if self.flag is None:
            return None
        tensors = changed(self.optimizer, self.flag)
        return tensors, [each.detach().clone() for each in tensors]

    def put_back(self, kept: tuple[list[Tensor], list[Tensor]] | None) -> None:
        """Put back what was kept, where the flag says so."""
        if kept is not None and self.flag is not None:
            put_back(*kept, self.flag)

    def make(self) -> None:
        """Call the optimizer."""
        self.turn.begin(self.name)
        if self.options.shards is not None:
            with refused_by(self.name, self.optimizer):
                self.optimizer.step()
        elif self.flag is None:
            self.optimizer.step()
        else:
            step_unless(self.optimizer, self.flag)
        self.turn.end(self.name)
        torch.clear_autocast_cache()  # or the next step, under the same autocast, runs on copies of the old weights

    @property
    def overflows(self) -> bool:
        """Whether a gradient that is not finite may be so since the loss was multiplied: then the update is left out, without an error."""
        return self.options.scaling is not None and self.options.scaling.enlarges

    def penalise(self, penalty: Penalty) -> None:
        """Add the gradient of a penalty of the parameters.

        Raises:
            LossError: It is no scalar with a gradient.
        """
        given = {self.names[each]: each for each in self.parameters}
        shards = self.options.shards
        value = penalty(given) if shards is None else shards.penalty(penalty, given)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            raise LossError(
                f"penalty= gave {value!r} for {self.name}; give a scalar tensor that is computed from the parameters it is given"
            )
        torch.autograd.backward(value)
        if shards is not None:
            shards.align(self.parameters)

    def complete(self) -> bool:
        """Add the gradients up. Where these were the last ones of an update, put their mean in their place and return True."""
        self.count += 1
        for parameter in self.parameters:
            if parameter.grad is not None:
                before = self._sums.get(parameter)
                self._sums[parameter] = parameter.grad if before is None else added(before, parameter.grad)
        if self.count < self.options.accumulate:
            return False
        for parameter, total in self._sums.items():
            parameter.grad = total / self.options.accumulate
        self._sums, self.count = {}, 0
        return True

    def drop(self) -> None:
        """Drop the gradients of the step, without the profiling of ``zero_grad``."""
        for parameter in self.parameters:
            parameter.grad = None

    def zero_grad(self) -> None:
        """Drop the gradients of the step."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what was added up since the last update, by the parameters' places in the optimizer."""
        places = {parameter: place for place, parameter in enumerate(self.parameters)}
        return {"count": self.count, "sums": {places[each]: total for each, total in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was added up.

        Raises:
            StateError: The saved trainer added up other numbers of steps.
        """
        if state["count"] >= self.options.accumulate:
            raise StateError(
                f"the saved state is of a trainer that adds up more steps than accumulate={self.options.accumulate}; make this one with "
                "the same accumulate="
            )
        parameters = self.parameters
        self.count = state["count"]
        self._sums = load_sums(parameters, state["sums"])


def make_updates(
    net: Net,
    optimizers: Mapping[str, Optimizer],
    estimator_optimizers: Mapping[str, Optimizer],
    options: UpdateOptions,
    turn: Turn,
) -> tuple[dict[str, Update], dict[str, Update]]:
    """Return the updates of partitions, by name, and of estimators, by boundary key; these are neither clipped nor penalised."""
    named = {parameter: name for name, parameter in net.named_parameters()}
    places: list[Boundary | Recurrence] = [*net.boundaries, *net.recurrences]
    called = {each.key: f"the estimator of {each.name!r}" for each in places}
    plain = replace(options, clip=None, penalty=None)
    for name, each in optimizers.items():
        refuse_mixed(name, each)
    updates = {name: Update(name, each, options, turn, named) for name, each in optimizers.items()}
    fits = {key: Update(called[key], each, plain, turn, named) for key, each in estimator_optimizers.items()}
    return updates, fits
