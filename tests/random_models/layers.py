"""Lines that call modules or use parameters and buffers: one function for each kind."""

from dataclasses import replace

from hypothesis import strategies as st

from tests.random_models.draft import Draft, is_dense, is_float, is_image, is_sequence, is_vector
from tests.random_models.model import Op, Value


def apply_module(
    draft: Draft, feature: str, source: Value, maker: str, shape: tuple[int, ...], ordered: bool = False
) -> None:
    """Make a module, sometimes frozen, and call it, sometimes under no_grad."""
    name = draft.fresh("m")
    draft.parts.append(f"self.{name} = {maker}")
    frozen = ("nn.Linear" in maker or "nn.Conv" in maker) and draft.frozen
    if frozen:
        draft.parts.append(f"self.{name}.requires_grad_(False)")
    draft.modules[name] = (source.shape, shape, maker)
    call_module(draft, feature, name, source, shape, grad=source.grad or is_trained(draft, name), ordered=ordered)


def is_trained(draft: Draft, name: str) -> bool:
    return "Dropout" not in draft.modules[name][2] and f"self.{name}.requires_grad_(False)" not in draft.parts


def call_module(
    draft: Draft, feature: str, name: str, source: Value, shape: tuple[int, ...], grad: bool, ordered: bool
) -> None:
    output = Value(draft.fresh("v"), shape, grad=grad, contiguous="Dropout" not in draft.modules[name][2])
    draft.keep(source.name)
    draft.add(feature, f"self.{name}({source.name})", [source], output, ordered=ordered)
    if draft.no_grad:
        line = draft.lines[-1]
        draft.lines[-1] = replace(line, no_grad=True, ops=tuple(replace(op, no_grad=True) for op in line.ops))
        draft.values[-1] = replace(output, grad=False)


def linear(draft: Draft) -> None:
    source, width = draft.pick(is_dense), draft.width
    apply_module(draft, "linear", source, f"nn.Linear({source.shape[-1]}, {width})", (*source.shape[:-1], width))


def convolution(draft: Draft) -> None:
    source, width = draft.pick(is_image), draft.width
    apply_module(
        draft, "convolution", source, f"nn.Conv2d({source.shape[0]}, {width}, 3, padding=1)", (width, *source.shape[1:])
    )


def batch_norm(draft: Draft) -> None:
    source = draft.pick(lambda value: is_vector(value) or is_image(value))
    maker = f"nn.BatchNorm{'1d' if source.rank == 1 else '2d'}({source.shape[0]})"
    apply_module(draft, "batch norm", source, maker, source.shape, ordered=True)


def layer_norm(draft: Draft) -> None:
    source = draft.pick(is_dense)
    apply_module(draft, "layer norm", source, f"nn.LayerNorm({source.shape[-1]})", source.shape)


def dropout(draft: Draft) -> None:
    source = draft.pick(is_float)
    apply_module(draft, "dropout", source, "nn.Dropout(0.4)", source.shape, ordered=True)
    draft.keep(draft.values[-1].name)


def attention(draft: Draft) -> None:
    source, name = draft.pick(is_sequence), draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.MultiheadAttention({source.shape[1]}, 1, batch_first=True)")
    output, weights = (
        Value(draft.fresh("v"), source.shape, grad=True),
        Value(draft.fresh("v"), (source.shape[0],) * 2, grad=True),
    )
    read = source.name
    draft.keep(read, output.name, weights.name)
    draft.add("attention", f"self.{name}({read}, {read}, {read})", [source], output, weights)


def sequential(draft: Draft) -> None:
    source, width, name = draft.pick(is_dense), draft.width, draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.Sequential(nn.Linear({source.shape[-1]}, {width}), nn.Tanh())")
    inner, output = f"{name}_inner", Value(draft.fresh("v"), (*source.shape[:-1], width), grad=True)
    draft.keep(source.name, output.name)
    ops = (
        Op((inner,), (source.name,), f"self.{name}[0]({source.name})"),
        Op((output.name,), (inner,), f"self.{name}[1]({inner})"),
    )
    draft.append("sequential", f"self.{name}({source.name})", ops, [output])


def residual(draft: Draft) -> None:
    source, name = draft.pick(is_dense), draft.fresh("m")
    draft.parts.append(f"self.{name} = Residual({source.shape[-1]})")
    inner, bent, output = f"{name}_inner", f"{name}_bent", Value(draft.fresh("v"), source.shape, grad=True)
    draft.keep(source.name)
    ops = (
        Op((inner,), (source.name,), f"self.{name}.inner({source.name})"),
        Op((bent,), (inner,), f"torch.tanh({inner})"),
        Op((output.name,), (source.name, bent), f"{source.name} + {bent}"),
    )
    draft.append("residual", f"self.{name}({source.name})", ops, [output])


def callable_again(draft: Draft) -> list[tuple[str, Value]]:
    return [
        (name, value)
        for name, (shape, _, _) in draft.modules.items()
        for value in draft.some(is_float)
        if value.shape == shape
    ]


def shared_module(draft: Draft) -> None:
    name, source = draft.draw(st.sampled_from(callable_again(draft)))
    _, shape, maker = draft.modules[name]
    ordered = "Dropout" in maker or "BatchNorm" in maker
    call_module(
        draft, "shared module", name, source, shape, grad=source.grad or is_trained(draft, name), ordered=ordered
    )
    draft.keep(draft.values[-1].name)


def linears(draft: Draft, width: int | None = None) -> list[tuple[str, int, int]]:
    found = [
        (name, (shape[-1], out[-1])) for name, (shape, out, maker) in draft.modules.items() if "nn.Linear" in maker
    ]
    return [(name, *sizes) for name, sizes in found if width in (None, sizes[0])]


def tied_modules(draft: Draft) -> None:
    choices = [(name, out, value) for value in draft.some(is_dense) for name, _, out in linears(draft, value.shape[-1])]
    owner, width, source = draft.draw(st.sampled_from(choices))
    name = draft.fresh("m")
    draft.parts += [
        f"self.{name} = nn.Linear({source.shape[-1]}, {width})",
        f"self.{name}.weight = self.{owner}.weight",
    ]
    draft.modules[name] = (source.shape, (*source.shape[:-1], width), f"nn.Linear({source.shape[-1]}, {width})")
    call_module(draft, "tied modules", name, source, (*source.shape[:-1], width), grad=True, ordered=False)


def used_parameter(draft: Draft) -> None:
    choices = [(name, out, value) for value in draft.some(is_dense) for name, _, out in linears(draft, value.shape[-1])]
    owner, width, source = draft.draw(st.sampled_from(choices))
    output = Value(draft.fresh("v"), (*source.shape[:-1], width), grad=source.grad or is_trained(draft, owner))
    draft.keep(source.name)
    draft.add("used parameter", f"F.linear({source.name}, self.{owner}.weight)", [source], output)


def can_tie(draft: Draft) -> bool:
    return any(linears(draft, value.shape[-1]) for value in draft.some(is_dense))


def own_parameter(draft: Draft) -> None:
    source, name = draft.pick(is_float), draft.fresh("p")
    draft.parts.append(f"self.{name} = nn.Parameter(torch.rand({source.shape[-1]}))")
    draft.keep(source.name)
    draft.add("parameter", f"{source.name} * self.{name}", [source], Value(draft.fresh("v"), source.shape, grad=True))


def buffer(draft: Draft) -> None:
    source, name = draft.pick(is_float), draft.fresh("b")
    draft.parts.append(f"self.register_buffer('{name}', torch.rand({source.shape[-1]}))")
    draft.add(
        "buffer", f"{source.name} + self.{name}", [source], Value(draft.fresh("v"), source.shape, grad=source.grad)
    )


def is_index(value: Value) -> bool:
    return value.kind == "i"


def embedding(draft: Draft) -> None:
    source, width, name = draft.pick(is_index), draft.width, draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.Embedding({source.limit}, {width})")
    output = Value(draft.fresh("v"), (*source.shape, width), grad=True)
    draft.add("embedding", f"self.{name}({source.name})", [source], output)
