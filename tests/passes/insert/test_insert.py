"""Insert: which estimator stands where, what it is built from, and the errors for one that does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx import estimators
from dnifx.errors import ContextError, EstimatorError
from dnifx.estimators import BoundarySpec
from dnifx.estimators.affine import AffineGradient
from dnifx.estimators.zero import ZeroGradient
from dnifx.ir import Program
from dnifx.passes.insert.contexts import make_context
from dnifx.passes.insert.interfaces import InsertInterfaces
from tests.passes.programs import Residual, compiled, mlp

X = torch.randn(3, 6)


class Scale(nn.Module):
    """A user's estimator: each value times a learned number."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = nn.Parameter(torch.zeros(len(spec.values)))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(value * scale for value, scale in zip(values, self.scale, strict=True))


class Answers(nn.Module):
    """Answers with whatever a function makes of the values."""

    def __init__(self, function: Callable[[tuple[Tensor, ...]], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> Any:
        return self.function(values)


def inserted(gradient: Any, cuts: Any = ("0", "2"), **options: Any) -> Program:
    return compiled(mlp(6, 6, 6, 2), cuts, X, until="insert", gradient=gradient, **options)


def kinds(program: Program) -> dict[str, str]:
    return {program.boundaries[item.boundary].name: type(item.estimator).__name__ for item in program.interfaces}


@pytest.mark.parametrize("name", ["synthetic", "zero", "stale", "oracle"])
def test_an_estimator_by_name(name: str) -> None:
    program = inserted(name)
    expected = type(estimators.BY_NAME[name](BoundarySpec("0", program.boundaries[0].specs)))
    assert all(type(item.estimator) is expected for item in program.interfaces)
    assert len({id(item.estimator) for item in program.interfaces}) == 2, "each boundary has one of its own"


def test_a_factory_is_given_the_boundary() -> None:
    program = compiled(Residual(), ["blocks.0"], X, until="insert", gradient=Scale, context="label", num_classes=4)
    estimator = program.interfaces[0].estimator
    assert isinstance(estimator, Scale)
    assert estimator.spec.name == "blocks.0"
    assert estimator.spec.values == program.boundaries[0].specs
    assert (estimator.spec.context, estimator.spec.classes) == (4, 4)
    assert program.interfaces[0].description == "Scale"
    assert program.interfaces[0].fits


class Transposed(nn.Module):
    """A value whose first size is not the batch: ``[features, batch]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.transpose(self.first(x), 0, 1).contiguous().transpose(0, 1))
        return result


def test_an_estimator_is_told_the_batch_of_the_inputs_and_not_the_first_size_of_a_value() -> None:
    shapes: list[tuple[int, ...]] = []

    class Listens(Scale):
        def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
            assert context is not None
            shapes.append(tuple(context.shape))
            return super().forward(values, context)

    options: dict[str, Any] = {"gradient": Listens, "context": "label", "num_classes": 2}
    program = compiled(Transposed(), ["contiguous"], X, until="insert", **options)
    (made,) = (item.estimator for item in program.interfaces)
    assert isinstance(made, Listens)
    assert made.spec.values[0].shape == (5, 3)
    assert made.spec.batch == 3
    assert shapes == [(3, 2)]
    (first,) = (item.estimator for item in compiled(mlp(6, 6, 2), ["0"], X, until="insert", **options).interfaces)
    assert isinstance(first, Listens)
    assert first.spec.batch == 3


def test_a_default_estimator_of_a_value_without_a_batch_dimension_sees_no_label() -> None:
    options: dict[str, Any] = {"gradient": estimators.Synthetic(hidden=0), "context": "label", "num_classes": 2}
    (apart,) = compiled(Transposed(), ["contiguous"], X, until="insert", **options).interfaces
    (batched,) = compiled(Transposed(), ["first"], X, until="insert", **options).interfaces
    assert [tuple(each.shape) for each in apart.estimator.parameters()] == [(3, 3), (3,)]
    assert [tuple(each.shape) for each in batched.estimator.parameters()] == [(5, 5 + 2), (5,)]


def test_an_estimator_for_each_boundary_by_name_and_glob_the_first_that_matches() -> None:
    program = inserted({"0": "zero", "**": estimators.Synthetic(hidden=0)})
    assert kinds(program) == {"0": "ZeroGradient", "2": "SyntheticGradient"}
    assert [item.description for item in program.interfaces] == ["Zero()", "Synthetic(hidden=0)"]


def test_an_estimator_has_the_dtype_of_its_values() -> None:
    program = compiled(mlp(6, 6, 2).double(), ["0"], X.double(), until="insert", gradient="synthetic")
    assert {parameter.dtype for parameter in program.interfaces[0].estimator.parameters()} == {torch.float64}
    with torch.device("meta"):
        model = mlp(6, 6, 2)
    program = compiled(model, ["0"], torch.empty(3, 6, device="meta"), until="insert", gradient="synthetic")
    assert {parameter.device.type for parameter in program.interfaces[0].estimator.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "locked", "fits"), [("zero", False, False), ("oracle", True, False), ("stale", False, True)]
)
def test_what_an_interface_needs(name: str, locked: bool, fits: bool) -> None:
    item = inserted(name).interfaces[0]
    assert (item.locked, item.fits) == (locked, fits)


def test_an_estimator_without_free_parameters_is_not_fitted() -> None:
    def frozen(spec: BoundarySpec) -> nn.Module:
        return Scale(spec).requires_grad_(False)

    assert not inserted(frozen).interfaces[0].fits


def test_interfaces_of_an_earlier_compilation_are_used_again() -> None:
    first = inserted("synthetic")
    existing = {boundary.name: item for boundary, item in zip(first.boundaries, first.interfaces, strict=True)}
    before = compiled(mlp(6, 6, 6, 2), ["0", "2"], X, until="legalize")
    again = InsertInterfaces("zero", existing=existing).run(before)
    assert all(one.estimator is other.estimator for one, other in zip(first.interfaces, again.interfaces, strict=True))


def test_asking_an_estimator_on_trial_leaves_it_as_it_is() -> None:
    drawn: list[Tensor] = []

    class Draws(Scale):
        def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
            drawn.append(torch.rand(()))
            return super().forward(values, context)

    before = compiled(mlp(6, 6, 2), ["0"], X, until="legalize")
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    program = InsertInterfaces(Draws).run(before)
    assert drawn, "it was tried"
    assert torch.equal(torch.rand(()), expected), "and the random state put back"
    assert program.interfaces[0].estimator.training


@pytest.mark.parametrize(
    ("gradient", "text"),
    [
        ("syntetic", r"gradient='syntetic' is not an estimator; the nearest names are 'synthetic'"),
        ({"0": "zero"}, r"gradient= gives nothing for '2'; name them, or add a glob such as '\*\*'"),
        ({"0": "zero", "2": "zero", "9": "zero"}, r"names a boundary '9' that is not there; the boundaries are"),
        (
            nn.Linear(2, 2),
            r"gradient= for boundary '0' is Linear; give a name or a factory .*each boundary gets a module of its own",
        ),
        (3, r"gradient= for boundary '0' is int; give a name or a factory"),
        (
            lambda spec: torch.relu,
            r"the factory .* returned builtin_function_or_method for boundary '0'; it must return an nn.Module",
        ),
        (
            lambda spec: Answers(lambda values: values[0]),
            r"Answers of boundary '0' answered with one tensor; expected a tuple with one",
        ),
        (
            lambda spec: Answers(lambda values: (values[0][:, :2],)),
            r"answered with \[\(3, 2\)\]; expected .*\[\(3, 6\)\]",
        ),
        (lambda spec: Answers(lambda values: values * 2), r"answered with \[\(3, 6\), \(3, 6\)\]"),
        (
            lambda spec: Answers(lambda values: (values[0] @ torch.ones(5, 5),)),
            r"(?s)Answers of boundary '0' cannot be called: RuntimeError: .*takes \(values, context\): a tuple of f32\[3, 6\]",
        ),
    ],
)
def test_what_is_no_estimator_is_refused(gradient: Any, text: str) -> None:
    with pytest.raises(EstimatorError, match=text):
        inserted(gradient)


def test_a_factory_that_raises_a_dnifx_error_is_heard() -> None:
    with pytest.raises(EstimatorError, match="hidden must be 0 or more, width positive and kernel odd"):
        inserted(lambda spec: estimators.Synthetic(hidden=-1)(spec))


def test_a_value_that_no_synthetic_gradient_takes_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(torch.fft.fft(self.body(x)).real)
            return result

    with pytest.raises(
        EstimatorError, match=r"'fft_fft': fft_fft is complex64\[3, 4\]; a synthetic gradient .*give a factory"
    ):
        compiled(Odd(), lambda node: "fft" in node.name, torch.randn(3, 4), gradient="synthetic")


@pytest.mark.parametrize(
    ("context", "classes", "text"),
    [
        (None, 10, "num_classes=10 is given without a context; give context= too, or neither"),
        ("label", None, "context='label' needs num_classes= of 2 or more, got None"),
        ("label", 1, "needs num_classes= of 2 or more, got 1"),
        ("labels", 10, "context='labels': give None, 'label' or a callable"),
        (torch.abs, None, r"a callable context= needs num_classes=, the width of its features .*got None"),
        (torch.abs, 0, "needs num_classes=.*got 0"),
    ],
)
def test_a_context_that_does_not_fit_together(context: Any, classes: int | None, text: str) -> None:
    with pytest.raises(ContextError, match=text):
        make_context(context, classes)


def test_a_label_becomes_one_hot_features() -> None:
    context = make_context("label", 4)
    assert context is not None
    assert (context.width, context.classes, context.description) == (4, 4, "label (4 classes)")
    assert context.features(torch.tensor([1, 3])).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_callable_context_gives_the_features() -> None:
    def double(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(pair, 1)

    context = make_context(double, 5)
    assert context is not None
    assert (context.width, context.classes, context.description) == (5, None, "double")
    assert context.features((torch.ones(2, 2), torch.zeros(2, 3))).shape == (2, 5)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda y: torch.ones(3, 4), r"gave \[3, 4\]; expected features \[batch, ..., 5\], as num_classes=5 says"),
        (lambda y: torch.ones(5), r"gave \[5\]; expected"),
        (lambda y: [y], "gave list; expected"),
    ],
)
def test_features_of_another_width_are_refused(made: Any, text: str) -> None:
    y = torch.zeros(3, dtype=torch.long)
    net = dnifx.decouple(mlp(6, 6, 2), ["0"], args=(X,), context=made, num_classes=5, loss=nn.functional.cross_entropy)
    with pytest.raises(ContextError, match=text):
        net.trainer(torch.optim.Adam).step(X, target=y)
    with pytest.raises(ContextError, match=text):
        net(X, context=y)


def test_a_model_may_have_an_input_called_context_where_there_is_a_context() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x) * context)
            return result

    net = dnifx.decouple(Taken(), ["first"], args=(X, X), context="label", num_classes=3)
    label = torch.zeros(len(X), dtype=torch.long)
    assert torch.equal(net(X, kwargs={"context": X}, context=label), net.original(X, X))
    net = dnifx.decouple(Taken(), ["first"], args=(X, X))
    assert torch.equal(net(X, context=X), net.original(X, X))


def test_identity_and_names_survive() -> None:
    before = compiled(mlp(6, 6, 6, 2), ["0", "2"], X, until="legalize")
    after = InsertInterfaces("synthetic").run(before)
    assert (after.graph, after.boundaries, after.partitions) == (before.graph, before.boundaries, before.partitions)
    assert after.model is before.model
    assert isinstance(after.interfaces[0].estimator, AffineGradient)
    assert not isinstance(after.interfaces[0].estimator, ZeroGradient)


class Tokens(nn.Module):
    """Sees tokens, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.out(torch.relu(self.embed(x)).mean(1))
        return found


@pytest.mark.parametrize("shape", [(8, 4), (5, 8), (8,), (8, 5, 4), (8, 1, 5), (1, 5)])
def test_a_mask_that_fits_no_value_is_refused(shape: tuple[int, ...]) -> None:
    given: dict[str, Any] = {"args": (torch.randn(8, 5, 4),), "kwargs": {"mask": torch.ones(shape)}, "mask": "mask"}
    if shape == (8,):
        dnifx.decouple(Tokens(), "embed", **given)  # of examples
        return
    with pytest.raises(ContextError, match=rf"mask='mask' is \[{', '.join(map(str, shape))}\], and no value"):
        dnifx.decouple(Tokens(), "embed", **given)
