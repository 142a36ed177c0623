"""Lines that compute without parameters: one function for each kind."""

import torch
from hypothesis import strategies as st

from tests.random_models.draft import Draft, is_float, is_image, is_sequence, is_vector, is_wide
from tests.random_models.model import Op, Value


def activation(draft: Draft) -> None:
    source, function = (
        draft.pick(is_float),
        draft.draw(st.sampled_from(["torch.tanh", "torch.relu", "F.gelu", "torch.sigmoid"])),
    )
    output = Value(draft.fresh("v"), source.shape, grad=source.grad, contiguous=source.contiguous)
    draft.keep(source.name, output.name)
    draft.add("activation", f"{function}({source.name})", [source], output)


def inplace(draft: Draft) -> None:
    source = draft.pick(draft.can_write)
    others = draft.some(
        lambda value: is_float(value) and value.shape == source.shape and not shares(draft, value, source)
    )
    name, output = source.name, Value(draft.fresh("v"), source.shape, grad=source.grad, contiguous=source.contiguous)
    forms = {f"{name}.mul_(0.5)": f"{name} * 0.5", f"F.relu({name}, inplace=True)": f"torch.relu({name})"}
    forms |= {
        f"{name}.add_({other.name})": f"{name} + {other.name}" for other in others if source.grad or not other.grad
    }
    written = draft.draw(st.sampled_from([*forms, "module"]))
    if written == "module":
        module = draft.fresh("m")
        draft.parts.append(f"self.{module} = nn.ReLU(inplace=True)")
        written, forms = f"self.{module}({name})", {f"self.{module}({name})": f"torch.relu({name})"}
    other = [value for value in others if f"add_({value.name})" in written]
    op = Op(
        (output.name,), (name, *(value.name for value in other)), forms[written], writes=True, views=name, undo="new"
    )
    draft.roots[output.name] = name
    draft.append("in-place", written, (op,), [output])
    if "add_" not in written and "mul_" not in written:
        draft.keep(name)


def shares(draft: Draft, one: Value, two: Value) -> bool:
    return draft.root(one.name) == draft.root(two.name)


def pairs(draft: Draft) -> list[tuple[Value, Value]]:
    floats = draft.some(is_float)
    return [(one, two) for one in floats for two in floats if one.shape == two.shape]


def join(draft: Draft) -> None:
    one, two = draft.draw(st.sampled_from(pairs(draft)))
    sign = draft.draw(st.sampled_from(["+", "-", "*"]))
    if sign == "*":
        draft.keep(one.name, two.name)
    output = Value(draft.fresh("v"), one.shape, grad=one.grad or two.grad, contiguous=one.contiguous and two.contiguous)
    draft.add("join", f"{one.name} {sign} {two.name}", [one, two], output)


def concatenate(draft: Draft) -> None:
    one, two = draft.draw(st.sampled_from([pair for pair in pairs(draft) if pair[0].rank]))
    output = Value(draft.fresh("v"), (one.shape[0] + two.shape[0], *one.shape[1:]), grad=one.grad or two.grad)
    draft.add("concatenate", f"torch.cat(({one.name}, {two.name}), 1)", [one, two], output)


def mean(draft: Draft) -> None:
    source = draft.pick(lambda value: is_sequence(value) or is_image(value))
    dims, shape = ("1", source.shape[1:]) if source.rank == 2 else ("(2, 3)", source.shape[:1])
    draft.add("mean", f"{source.name}.mean({dims})", [source], Value(draft.fresh("v"), shape, grad=source.grad))


def can_flatten(value: Value) -> bool:
    return is_float(value) and value.rank > 1


def flat(value: Value) -> tuple[int]:
    return (torch.Size(value.shape).numel(),)


def view(draft: Draft) -> None:
    source = draft.pick(lambda value: can_flatten(value) and value.contiguous)
    name, output = source.name, Value(draft.fresh("v"), flat(source), grad=source.grad, writable=source.writable)
    draft.add("view", f"{name}.view({name}.size(0), -1)", [source], output, view="new.reshape(base.shape)")


def transpose(draft: Draft) -> None:
    source = draft.pick(is_sequence)
    shape = (source.shape[1], source.shape[0])
    output = Value(draft.fresh("v"), shape, grad=source.grad, writable=source.writable)
    draft.add("view", f"{source.name}.transpose(1, 2)", [source], output, view="new.transpose(1, 2)")


def slice_view(draft: Draft) -> None:
    source = draft.pick(is_wide)
    width = draft.draw(st.integers(1, source.shape[0] - 1))
    output = Value(draft.fresh("v"), (width, *source.shape[1:]), grad=source.grad, writable=source.writable)
    undo = f"torch.cat((new, base[:, {width}:]), 1)"
    draft.add("view", f"{source.name}[:, :{width}]", [source], output, view=undo)


def unsqueeze(draft: Draft) -> None:
    source = draft.pick(is_vector)
    output = Value(
        draft.fresh("v"), (1, *source.shape), grad=source.grad, contiguous=source.contiguous, writable=source.writable
    )
    draft.add("view", f"{source.name}.unsqueeze(1)", [source], output, view="new.squeeze(1)")


def chunk(draft: Draft) -> None:
    source = draft.pick(is_wide)
    total = source.shape[0]
    first = (total + 1) // 2
    code = draft.draw(
        st.sampled_from([f"{source.name}.chunk(2, 1)", f"torch.split({source.name}, [{first}, {total - first}], 1)"])
    )
    rest = source.shape[1:]
    pieces = [
        Value(draft.fresh("v"), (size, *rest), grad=source.grad, writable=False) for size in (first, total - first)
    ]
    draft.keep(source.name, *(piece.name for piece in pieces))
    draft.add("tuple", code, [source], *pieces)


def topk(draft: Draft) -> None:
    source = draft.pick(lambda value: is_vector(value) and is_wide(value))
    best = Value(draft.fresh("v"), (2,), grad=source.grad)
    index = Value(draft.fresh("i"), (2,), "i", limit=source.shape[0])
    draft.add("tuple with integers", f"{source.name}.topk(2, 1)", [source], best, index)


def argmax(draft: Draft) -> None:
    source = draft.pick(is_vector)
    draft.add("integer", f"{source.name}.argmax(1)", [source], Value(draft.fresh("i"), (), "i", limit=source.shape[0]))


def mask(draft: Draft) -> None:
    source = draft.pick(is_float)
    draft.add("mask", f"{source.name} > 0", [source], Value(draft.fresh("b"), source.shape, "b"))


def masked(draft: Draft) -> list[tuple[Value, Value]]:
    return [
        (one, two)
        for one in draft.some(lambda value: value.kind == "b")
        for two in draft.some(is_float)
        if one.shape == two.shape
    ]


def masked_fill(draft: Draft) -> None:
    where, source = draft.draw(st.sampled_from(masked(draft)))
    output = Value(draft.fresh("v"), source.shape, grad=source.grad)
    draft.add("mask", f"{source.name}.masked_fill({where.name}, 0.25)", [source, where], output)


def size(draft: Draft) -> None:
    source = draft.pick(is_float)
    draft.add("size", f"{source.name}.size(0)", [source], Value(draft.fresh("n"), (), "n"))


def is_size(value: Value) -> bool:
    return value.kind == "n"


def reshape(draft: Draft) -> None:
    source, batch = draft.pick(can_flatten), draft.pick(is_size)
    output = Value(draft.fresh("v"), flat(source), grad=source.grad, writable=False)
    draft.keep(source.name, output.name)
    draft.add("reshape by size", f"{source.name}.reshape({batch.name}, -1)", [source, batch], output)


def detach(draft: Draft) -> None:
    source = draft.pick(lambda value: is_float(value) and value.grad)
    draft.keep(source.name)
    draft.add("detach", f"{source.name}.detach()", [source], Value(draft.fresh("v"), source.shape, writable=False))
