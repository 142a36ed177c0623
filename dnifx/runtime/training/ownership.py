"""Which partition's optimizer updates which parameter: those of the example, and those that another input kind uses first."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from dnifx.errors import InputError, StateError
from dnifx.ir import Program
from dnifx.runtime.net.input_kinds import owners


class Ownership:
    """Gives parameters that only another input kind trains to the optimizer of the partition that uses them there.

    The input kind that trains a parameter first decides which partition owns it, as the example does for all that it uses. It
    joins the first group of that partition's optimizer, with the group's options and learning rate.

    Args:
        program: The program of the example.
        optimizers: The optimizers by partition name.

    Attributes:
        adopted: The parameters taken in so far, by partition name, in the order in which they came.
    """

    def __init__(self, program: Program, optimizers: Mapping[str, Optimizer]) -> None:
        self.adopted: dict[str, list[str]] = {}
        self._optimizers = optimizers
        self._parameters: dict[str, nn.Parameter] = dict(program.model.named_parameters())
        self._held = owners(program)
        self._indices = {partition.name: partition.index for partition in program.partitions}

    def admit(self, program: Program) -> None:
        """Let every parameter that a input kind trains be updated.

        Raises:
            InputError: Another partition owns it already, or the partition has no optimizer: it would stay as it is.
        """
        moved = sorted(name for name, index in owners(program).items() if self._held.get(name, index) != index)
        if moved:
            raise InputError(
                f"for these inputs another partition trains {', '.join(moved)} than the one that updates them; decouple the model with "
                "an example (args=, kwargs=) for which it uses them, or freeze them"
            )
        for partition in program.partitions:
            self.adopt(partition.name, [name for name in partition.parameters if name not in self._held])

    def adopt(self, partition: str, names: Iterable[str]) -> None:
        """Let the optimizer of a partition update more parameters.

        Raises:
            InputError: The partition has none.
        """
        fresh = list(names)
        if not fresh:
            return
        if partition not in self._optimizers:
            raise InputError(
                f"for these inputs {partition} also trains {', '.join(fresh)}, but it has no optimizer, since it trained nothing for the "
                "example: decouple the model with an example (args=, kwargs=) for which it uses them, or freeze them"
            )
        group = self._optimizers[partition].param_groups[0]
        group["params"] = [*group["params"], *(self._parameters[name] for name in fresh)]
        if "param_names" in group:
            group["param_names"] = [*group["param_names"], *fresh]
        self._held.update(dict.fromkeys(fresh, self._indices[partition]))
        self.adopted.setdefault(partition, []).extend(fresh)

    def give_back(self, state: Mapping[str, Sequence[str]]) -> None:
        """Let go of what was taken in since a state was saved."""
        for partition, names in self.adopted.items():
            fresh = names[len(state.get(partition, ())) :]
            if fresh:
                group = self._optimizers[partition].param_groups[0]
                for longer in (names, group["params"], group.get("param_names", [])):
                    del longer[-len(fresh) :]
            for name in fresh:
                del self._held[name]
        self.adopted = {partition: names for partition, names in self.adopted.items() if names}

    def state_dict(self) -> dict[str, list[str]]:
        """Return what was taken in, by partition name."""
        return {partition: list(names) for partition, names in self.adopted.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]]) -> None:
        """Take in what a saved run had taken in, in its order, in which the optimizers' states are kept.

        Raises:
            StateError: This run took in others before.
        """
        for partition, own in self.adopted.items():
            if list(state.get(partition, ()))[: len(own)] != own:
                raise StateError(
                    f"this trainer has met inputs that train {', '.join(own)}, which the saved one had not; load the state into a new "
                    "trainer"
                )
        for partition, names in state.items():
            self.adopt(partition, names[len(self.adopted.get(partition, ())) :])
