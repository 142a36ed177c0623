"""States in calls of a recurrent model: found in inputs and outputs, put into inputs, zero at first."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, InputError, nearest
from dnifx.ir import Program, Recurrent
from dnifx.runtime.emitted.windows import without_rows
from dnifx.runtime.net.model_states import leave_on, state_on


def steps_of(path: str) -> list[str]:
    """Return the steps of a path: ``batch.state`` is two, the empty path none."""
    return path.split(".") if path else []


def follow(item: Any, path: str) -> Any:
    """Return the part of a structure that a path leads to: keys, positions, attributes.

    Raises:
        KeyError: It leads nowhere; the names at the place where it ends are the error's arguments.
    """
    for step in steps_of(path):
        names = names_in(item)
        if step not in names:
            raise KeyError(step, *names)
        item = names[step]
    return item


def names_in(item: Any) -> dict[str, Any]:
    """Return the parts of a structure by the steps that lead to them."""
    if isinstance(item, Mapping):
        return {str(key): value for key, value in item.items()}
    if isinstance(item, tuple | list):
        fields = getattr(item, "_fields", ())
        return {**{str(place): value for place, value in enumerate(item)}, **dict(zip(fields, item, strict=False))}
    return {} if isinstance(item, Tensor) else dict(getattr(item, "__dict__", {}))


def replaced(item: Any, path: Sequence[str], value: Any) -> Any:
    """Return a structure with another part at a path; containers on the way are copied."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(item, Mapping):
        parts = {key: replaced(part, rest, value) if str(key) == step else part for key, part in item.items()}
        if not rest and step not in map(str, item):
            parts[step] = value
        return parts if type(item) is dict else type(item)(parts)  # type: ignore[call-arg]
    if isinstance(item, tuple | list):
        fields = getattr(item, "_fields", ())
        place = fields.index(step) if step in fields else int(step)
        items = [replaced(part, rest, value) if index == place else part for index, part in enumerate(item)]
        return type(item)(*items) if fields else type(item)(items)
    raise InputError(f"a state inside {type(item).__name__} cannot be replaced; keep it in a tuple, a list or a dict")


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Match arguments to the parameters of the model's forward; some may be missing."""
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__} cannot be called so: {error}") from error


def state_in(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent) -> list[Tensor]:
    """Return the tensors of a state among the arguments.

    Raises:
        CutError: The path leads nowhere, or to something that is not made of tensors.
    """
    if cut.on_model:
        return tensors_of(state_on(model, cut), cut.state, cut, model_name(model))
    return state_tensors(
        bound_arguments(model, args, kwargs).arguments, cut.state, cut, f"the inputs of {model_name(model)}"
    )


def state_out(model: nn.Module, output: Any, cut: Recurrent) -> list[Tensor]:
    """Return the tensors of the next state in an output.

    Raises:
        CutError: The path leads nowhere, or to something that is not made of tensors.
    """
    return state_tensors(output, cut.next_state, cut, f"the output of {model_name(model)}")


def state_tensors(item: Any, path: str, cut: Recurrent, where: str) -> list[Tensor]:
    """Return the tensors at a path, in pytree order."""
    try:
        found = follow(item, path)
    except KeyError as error:
        step, *names = error.args
        raise CutError(
            f"{cut!r}: {where} has nothing at {path!r}: no {step!r} among {nearest(step, names)}; name arguments, keys and "
            "positions with dots between them"
        ) from error
    return tensors_of(found, path, cut, where)


def tensors_of(state: Any, path: str, cut: Recurrent, where: str) -> list[Tensor]:
    """Return the tensors of a state, in pytree order.

    Raises:
        CutError: It is made of something else.
    """
    found = pytree.tree_leaves(state)
    if not found or not all(isinstance(leaf, Tensor) for leaf in found):
        kinds = ", ".join(type(leaf).__name__ for leaf in found) or "nothing"
        raise CutError(f"{cut!r}: at {path!r} {where} has {kinds}; a state is a tensor or a structure of tensors")
    return found


def given_state(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent) -> Any:
    """Return the state that a call begins with: among the arguments, or on the model."""
    if cut.on_model:
        return state_on(model, cut)
    return follow(bound_arguments(model, args, kwargs).arguments, cut.state)


def example_state(program: Program, index: int) -> Any:
    """Return the state of the example inputs."""
    if index in program.kept_states:
        return program.kept_states[index]
    return given_state(program.model, program.args, program.kwargs, program.recurrents[index])


def model_name(model: nn.Module) -> str:
    """Name a model in an error text."""
    return type(model).__name__


def is_none(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent) -> bool:
    """Whether a call begins without a state: None, by default or as given, or nothing but None in a structure."""
    if cut.on_model:
        return all(leaf is None for leaf in pytree.tree_leaves(state_on(model, cut)))
    bound = bound_arguments(model, args, kwargs)
    bound.apply_defaults()
    try:
        leaves = pytree.tree_leaves(follow(bound.arguments, cut.state))
    except KeyError:
        return False
    return bool(leaves) and all(leaf is None for leaf in leaves)


def with_state(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which a state is another one; one that the model keeps on itself is set there."""
    if cut.on_model:
        leave_on(model, cut, value)
        return args, dict(kwargs)
    bound = bound_arguments(model, args, kwargs)
    bound.arguments = replaced({**bound.arguments}, steps_of(cut.state), value)
    return split_arguments(bound)


def split_arguments(bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return bound arguments by position and by keyword, in the order of the parameters."""
    order = [key for key in bound.signature.parameters if key in bound.arguments]
    bound.arguments = {key: bound.arguments[key] for key in order}
    missing = [key for key in bound.signature.parameters if key not in bound.arguments]
    if missing:
        return (), dict(bound.arguments)
    return bound.args, bound.kwargs


def examples_in(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, None]:
    """Return the sizes of a call's inputs, beside the states, where the example's inputs have as many as it has examples.

    One size says how many examples the call has. There are more where another dimension of the example has the same size; the
    last one of a floating-point tensor counts features, if any other dimension may count examples.
    """
    carry = program.carries[0]
    count = pytree.tree_leaves(example_state(program, carry.cut))[0].size(carry.dim)
    now = tensors_beside(program, args, kwargs)
    found: dict[bool, dict[int, None]] = {False: {}, True: {}}
    for path, example in tensors_beside(program, program.args, program.kwargs).items():
        if path in now and now[path].dim() == example.dim():
            for dim, size in enumerate(example.shape):
                features = dim == example.dim() - 1 > 0 and example.is_floating_point()
                if size == count:
                    found[features][now[path].size(dim)] = None
    return found[False] or found[True]


def tensors_beside(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Any, Tensor]:
    """Return the tensors among a call's inputs that belong to no state, by their paths."""
    arguments: Any = bound_arguments(program.model, args, kwargs).arguments
    for cut in program.recurrents:
        if not cut.on_model and steps_of(cut.state)[0] in arguments:
            arguments = replaced(arguments, steps_of(cut.state), None)
    return {path: leaf for path, leaf in pytree.tree_leaves_with_path(arguments) if isinstance(leaf, Tensor)}


def first_state(program: Program, index: int, sizes: Iterable[int] = ()) -> Any:
    """Return a state of zeros in the shapes of the example's, for the examples of a call, whose ``sizes`` ``examples_in`` gives."""
    leaves, spec = pytree.tree_flatten(example_state(program, index))
    dims = [carry.dim for carry in program.carries if carry.cut == index]
    before = leaves[0].size(dims[0]) if dims else -1
    now = before if before in (found := list(sizes)) or not found else found[0]

    def zeros(leaf: Tensor, dim: int) -> Tensor:
        shape = [now if place == dim and size == before else size for place, size in enumerate(leaf.shape)]
        return leaf.detach().new_zeros(shape)

    return pytree.tree_unflatten(
        [zeros(leaf, dim) for leaf, dim in zip(leaves, dims or [0] * len(leaves), strict=True)], spec
    )


def with_first_states(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which a state that is None is what None means to the model: zeros.

    Raises:
        InputError: The example inputs had a state, so that it was not seen what None means.
    """
    arguments, keywords = args, dict(kwargs)
    for index, cut in enumerate(program.recurrents):
        if is_none(program.model, arguments, keywords, cut):
            refuse_unknown_none(program, cut)
            state = first_state(program, index, examples_in(program, arguments, keywords))
            arguments, keywords = with_state(program.model, arguments, keywords, cut, state)
    return arguments, keywords


def refuse_unknown_none(program: Program, cut: Recurrent) -> None:
    """Raise InputError where a state is None, and was not in the example inputs."""
    if cut not in program.zero_first:
        raise InputError(
            f"{cut!r}: the state is None here, and the example inputs have one, so it is not known what None means to "
            f"{model_name(program.model)}; give a state (zeros), or decouple with example inputs in which it is None"
        )


def with_own_tensors(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which no tensor stands for two of a state: one zero may be given for both h and c."""
    arguments, keywords = args, dict(kwargs)
    for cut in program.recurrents:
        state = given_state(program.model, arguments, keywords, cut)
        leaves = pytree.tree_leaves(state)
        if len(set(map(id, leaves))) < len(leaves):
            state = pytree.tree_map_only(Tensor, Tensor.detach, state)
            arguments, keywords = with_state(program.model, arguments, keywords, cut, state)
    return arguments, keywords


def without_episodes(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which the states of the examples that begin an episode are zero."""
    arguments, keywords = args, dict(kwargs)
    for index, cut in enumerate(program.recurrents if mask is not None else ()):
        if is_none(program.model, arguments, keywords, cut):
            continue
        dims = iter([carry.dim for carry in program.carries if carry.cut == index])
        state = given_state(program.model, arguments, keywords, cut)
        leaves, spec = pytree.tree_flatten(state)
        state = pytree.tree_unflatten([without_rows(leaf, mask, next(dims)) for leaf in leaves], spec)
        arguments, keywords = with_state(program.model, arguments, keywords, cut, state)
    return arguments, keywords


def refuse_without_trainer(program: Program) -> None:
    """Raise InputError where a cut in time needs what was kept of the windows before.

    Raises:
        InputError: Some cut in time asks for it.
    """
    for cut in program.recurrents:
        if cut.into_core or cut.auxiliary or cut.trace is not None:
            raise InputError(
                f"{cut!r}: into_core and auxiliary compute the last window again, and trace goes on from it, which a trainer alone "
                "keeps: train with net.trainer(...).step(...), and evaluate under torch.no_grad()"
            )
