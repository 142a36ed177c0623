"""The exact gradient in time: a trace of how parameters reach the state that a window starts from.

With h_w the state that window w leaves, theta a parameter, L_w the loss of window w, and the weights fixed,

    e_w = (dh_w/dh_{w-1}) e_{w-1} + dh_w/dtheta,    dL/dtheta = sum_w dL_w/dtheta + (dL_w/dh_{w-1}) e_{w-1},

where d/dtheta on the right is that within the window. dh_w/dh_{w-1} is a product entry by entry, so e costs about as much memory
as one copy of the parameters for each example, however long the stream is.

A **place** is an index into the state of an example. Several tensors of one shape may share a place, such as the two numbers of a
complex one; they are the **rows** of the place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vjp, vmap

from dnifx.errors import InputError
from dnifx.runtime.emitted.compiling import outside_graphs
from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.ops import held
from dnifx.runtime.emitted.windows import without_rows

uncompiled = outside_graphs("a trace differentiates the next state")

Trace = tuple[Tensor, ...]
"""For each parameter [batch, rows, *its shape]; [batch, rows, places, *its shape] where an entry of it reaches several places."""


@dataclass(frozen=True, eq=False)
class TraceRule:
    """How the trace of a state goes through one window.

    Attributes:
        boundary: The boundary's name.
        function: A graph module: from the tensors of the state, and what else the next state depends on, to the next state.
        dims: The dimension of each tensor of the state that counts examples.
        read_dims: That of the others; None where there is none.
        layout: The tensors that share their places, by their numbers; the places of one group stand behind those of another.
        reads: Names of the others.
        constants: What the function takes behind them, always the same.
        parameters: Paths of the trained parameters that reach the state.
        homes: For each parameter, the place that each of its entries reaches, of its shape; None where one reaches several.
    """

    boundary: str
    function: Any
    dims: tuple[int, ...]
    read_dims: tuple[int | None, ...]
    layout: tuple[tuple[int, ...], ...]
    reads: tuple[str, ...]
    constants: tuple[Any, ...]
    parameters: tuple[str, ...]
    homes: tuple[Tensor | None, ...]

    @property
    def rows(self) -> int:
        """Number of rows of a place."""
        return max(map(len, self.layout))

    def goes_on(self, other: "TraceRule") -> bool:
        """Whether a trace that another rule left goes on by this one."""
        pairs = zip(self.homes, other.homes, strict=False)
        same = all(one is two or (one is not None and two is not None and torch.equal(one, two)) for one, two in pairs)
        return self.parameters == other.parameters and self.layout == other.layout and same

    def weights(self) -> list[Tensor]:
        """Return the parameters as they are now."""
        return [held(self.function, *path.split(".")) for path in self.parameters]

    def next_state(
        self, values: Sequence[Tensor], reads: Sequence[Any], weights: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the next state, with other parameters where they are given."""
        device = values[0].device
        fixed = (each.to(device) if isinstance(each, Tensor) else each for each in self.constants)
        left: tuple[Tensor, ...] = functional_call(self.function, weights or {}, (*values, *reads, *fixed))
        return left

    def home(self, index: int, device: torch.device) -> Tensor | None:
        """Return the places of a parameter's entries in one row, on a device."""
        found = self.homes[index]
        return None if found is None else found.to(device).flatten()

    def grid(self, tensors: Sequence[Tensor], lead: int = 1) -> Tensor:
        """Return the tensors of a state by rows and places, [..., rows, places]; missing rows are 0.

        Args:
            tensors: One for each tensor of the state, of its shape without examples behind ``lead`` dimensions.
            lead: Number of dimensions before it.
        """
        flat = [tensor.reshape(*tensor.shape[:lead], -1) for tensor in tensors]
        rows = [
            [flat[group[row]] if row < len(group) else torch.zeros_like(flat[group[0]]) for group in self.layout]
            for row in range(self.rows)
        ]
        return torch.stack([torch.cat(parts, lead) for parts in rows], lead)


class AttachTrace(torch.autograd.Function):
    """Passes the state that a window starts from; backward, gives the parameters what the trace says of what arrives."""

    @staticmethod
    def forward(ctx: Any, rule: TraceRule, trace: Trace, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take the state, then the parameters; return the state."""
        count = len(rule.dims)
        ctx.rule, ctx.trace, ctx.boundary = rule, trace, rule.boundary
        ctx.kinds = [weight.dtype for weight in tensors[count:]]
        return tuple(value.view_as(value) for value in tensors[:count])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Return the sum over examples, rows and places of what arrived times the trace."""
        rule, wanted = ctx.rule, ctx.needs_input_grad[2 + len(arriving) :]
        pairs = zip(arriving, rule.dims, strict=True)
        error = rule.grid([each.movedim(dim, 0) for each, dim in pairs])
        given = [
            weighted(error, trace, rule.home(index, error.device)).to(kind) if want else None
            for index, (trace, kind, want) in enumerate(zip(ctx.trace, ctx.kinds, wanted, strict=True))
        ]
        return None, None, *(None for _ in arriving), *given


class HoldTrace(torch.autograd.Function):
    """Passes values on as they are; the next window finds the trace that is held here."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the values."""
        ctx.trace = trace
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Pass the gradients on."""
        return None, *arriving


def weighted(error: Tensor, trace: Tensor, home: Tensor | None) -> Tensor:
    """Return the gradient of a parameter, of its shape, from what arrives at the state, [batch, rows, places]."""
    if home is None:
        return torch.einsum("brp,brp...->...", error.to(trace.dtype), trace)
    at_home = error[:, :, home].view(trace.shape).to(trace.dtype)
    return (at_home * trace).sum((0, 1))


def begin_trace(trace: Trace | None, reset: Tensor | None) -> Trace | None:
    """Return the trace at the start of a window: nothing reaches the state of examples that begin an episode."""
    return None if trace is None else tuple(without_rows(each, reset, 0) for each in trace)


def attach_trace(rule: TraceRule, trace: Trace | None, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the detached state that a window starts from; what arrives there in the backward pass goes on to the parameters."""
    weights = rule.weights()
    if trace is None or not any(weight.requires_grad for weight in weights):
        return tuple(values)
    attached: tuple[Tensor, ...] = AttachTrace.apply(rule, trace, *values, *weights)  # type: ignore[no-untyped-call]
    return attached


@uncompiled
def start_traced(rule: TraceRule, values: Sequence[Tensor], reset: Tensor | None) -> tuple[Any, ...]:
    """Return the state that a window starts from, and the trace of it; a state without a trace begins a stream.

    The state that ``end_traced`` gave is tied to the parameters, and holds its trace.

    Args:
        rule: How the trace goes through the window.
        values: The state as it was given.
        reset: Which examples begin an episode, [batch], or None.

    Raises:
        InputError: The state was changed since, or has another history of its own.
    """
    node: Any = values[0].grad_fn
    kinds = AttachTrace._backward_cls, HoldTrace._backward_cls
    order = [value.output_nr for value in values if value.grad_fn is node]
    traced = isinstance(node, kinds) and order == list(range(len(values)))
    if not traced and any(value.requires_grad for value in values):
        raise InputError(
            f"the state at {rule.boundary!r} was changed since the last window left it, or is computed from something that is trained, and "
            "the trace of an exact gradient cannot follow that. Give the state as the last call returned it, with reset= for examples "
            "that begin an episode; a detached state begins a stream"
        )
    trace = begin_trace(node.trace if traced else None, reset)
    begun = [without_rows(value.detach(), reset, dim) for value, dim in zip(values, rule.dims, strict=True)]
    return *attach_trace(rule, trace, begun), trace


@uncompiled
def end_traced(
    rule: TraceRule,
    trace: Trace | None,
    started: Sequence[Tensor],
    reads: Sequence[Any],
    left: Sequence[Tensor],
    outputs: bool = False,
) -> tuple[Tensor, ...]:
    """Return the state that a window leaves, with its trace.

    Args:
        rule: How the trace goes through the window.
        trace: The trace of the state that the window started from.
        started: That state.
        reads: What else the next state depends on.
        left: The next state.
        outputs: Whether some of it is an output too, which keeps the window's graph. Otherwise the state is tied to the parameters by
            its trace alone, so that the graph can be freed.
    """
    if not torch.is_grad_enabled():
        return tuple(value.detach() for value in left)
    found = advance_trace(rule, trace, started, reads)
    if not outputs:
        return attach_trace(rule, found, [value.detach() for value in left])
    held: tuple[Tensor, ...] = HoldTrace.apply(found, *left)  # type: ignore[no-untyped-call]
    return held


def derivatives(rule: TraceRule, values: Sequence[Tensor], reads: Sequence[Any]) -> tuple[Tensor, Trace]:
    """Return the derivatives of the state that a window leaves, without a graph.

    Args:
        rule: How the next state is computed.
        values: The state that the window started from.
        reads: What else the next state depends on.

    Returns:
        With respect to the state, [batch, rows, rows, places], and with respect to each parameter within the window.
    """
    names, weights = rule.parameters, [weight.detach() for weight in rule.weights()]
    own = {name: each for name, each, home in zip(names, weights, rule.homes, strict=True) if home is not None}
    rest = {name: each for name, each, home in zip(names, weights, rule.homes, strict=True) if home is None}
    read = [each.detach() if isinstance(each, Tensor) else each for each in reads]
    mapped = [each for each, dim in zip(read, rule.read_dims, strict=True) if dim is not None]
    dims = rule.dims, tuple(dim for dim in rule.read_dims if dim is not None)

    def one(state: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        by_example = iter(others)
        beside = [
            each if dim is None else next(by_example).unsqueeze(dim)
            for each, dim in zip(read, rule.read_dims, strict=True)
        ]

        def run(given: dict[str, Tensor], *values: Tensor) -> Tensor:
            whole = [value.unsqueeze(dim) for value, dim in zip(values, rule.dims, strict=True)]
            left = rule.next_state(whole, beside, given)
            return rule.grid([each.squeeze(dim) for each, dim in zip(left, rule.dims, strict=True)], 0)

        made, pull, *_ = vjp(lambda given, *values: run({**rest, **given}, *values), own, *state)
        rows = torch.eye(rule.rows, dtype=made.dtype, device=made.device)
        seeds = rows.unsqueeze(-1).expand(-1, -1, made.size(-1))
        direct, *through = vmap(pull)(seeds)
        if rest:
            direct = {**direct, **jacrev(lambda given: run({**own, **given}, *state))(rest)}
        return rule.grid(through), direct

    with torch.no_grad():
        detached = tuple(value.detach() for value in values)
        jacobian, direct = vmap(one, in_dims=dims)(detached, tuple(mapped))
    return jacobian, tuple(direct[name] for name in names)


def advance_trace(rule: TraceRule, trace: Trace | None, values: Sequence[Tensor], reads: Sequence[Any]) -> Trace:
    """Return the trace of the state that a window leaves.

    Args:
        rule: How the next state is computed.
        trace: The trace of the state that the window started from; None where nothing reaches it.
        values: That state.
        reads: What else the next state depends on.
    """
    jacobian, direct = derivatives(rule, values, reads)
    if trace is None:
        return direct
    passed = zip(trace, direct, strict=True)
    return tuple(
        through(jacobian, each, rule.home(index, each.device)) + own for index, (each, own) in enumerate(passed)
    )


def through(jacobian: Tensor, trace: Tensor, home: Tensor | None) -> Tensor:
    """Return a trace through a window: its Jacobian, [batch, rows, rows, places], times the trace."""
    if home is None:
        return torch.einsum("boip,bip...->bop...", jacobian.to(trace.dtype), trace)
    at_home = jacobian[..., home].view(*jacobian.shape[:3], *trace.shape[2:])
    return torch.einsum("boi...,bi...->bo...", at_home.to(trace.dtype), trace)
