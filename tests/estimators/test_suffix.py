"""Suffix: with nothing left out and the model's own weights it is the true gradient; made thin it learns from the user's loss."""

import copy
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import Suffix
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.zoo.resnet import ResNet
from tests.contracts.cases import Case, cases, decoupled
from tests.contracts.running import TARGETS, run_scheduled

WHOLE: dict[str, Any] = {"blocks": 10**6, "readout": "shared", "refresh": 1, "decay": 0.0, "budget": 1e9}
"""Nothing left out, and every weight the model's own."""


def block(width: int, drop: float = 0.0) -> nn.Module:
    return Residual(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(drop), nn.Linear(width, width)))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Tower(nn.Module):
    """Blocks between a stem and a readout."""

    def __init__(self, blocks: int = 4, width: int = 6, classes: int = 3, drop: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(block(width, drop) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = each(x)
        return self.head(self.norm(x))


def make(gradient: Any, drop: float = 0.0, **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    loss = options.pop("loss", nn.CrossEntropyLoss())
    net = dnifx.decouple(
        Tower(drop=drop).double(), ["blocks.0", "blocks.2"], args=(x,), gradient=gradient, loss=loss, **options
    )
    return net, x, y


def model_gradients(net: DecoupledModule, x: Tensor, y: Tensor, target: str) -> dict[str, Tensor]:
    """The gradients of one step, of the model's parameters alone."""
    if target == "fused":
        torch.autograd.backward(functional.cross_entropy(net(x, target=y), y))
        return {name: each.grad for name, each in net.original.named_parameters() if each.grad is not None}
    before = {name: each.detach().clone() for name, each in net.original.named_parameters()}
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
    return {name: before[name] - each.detach() for name, each in net.original.named_parameters()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_suffix_with_the_models_weights_gives_the_true_gradient(target: str) -> None:
    net, x, y = make(Suffix(**WHOLE))
    plain = Tower().double()
    plain.load_state_dict(net.original.state_dict())
    torch.autograd.backward(functional.cross_entropy(plain(x), y))
    found = model_gradients(net, x, y, target)
    for name, each in plain.named_parameters():
        torch.testing.assert_close(found[name], each.grad, msg=name)


@given(cases(without=("dropout", "random"), training=True))
def test_a_whole_suffix_gives_the_true_gradient_of_any_model(case: Case) -> None:
    net = decoupled(case, "oracle")
    thin = decoupled(case, Suffix(**WHOLE))
    wanted, found = (
        run_scheduled(case, net, case.inputs, case.target),
        run_scheduled(case, thin, case.inputs, case.target),
    )
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.gradients, wanted.gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_a_thin_suffix_gives_the_gradient_of_its_own_loss_and_learns_from_it(target: str) -> None:
    net, x, y = make(Suffix(blocks=1))
    (first, second) = (each.estimator for each in net.program.interfaces)
    assert any("keeps blocks.1, leaves out blocks.2, blocks.3" in note for note in net.program.notes)
    thin, model = copy.deepcopy(first.get_submodule("thin")), net.original
    h = model.get_submodule("blocks.0")(model.get_submodule("stem")(x))
    losses = functional.cross_entropy(thin(h)[0], y)
    own = dict(model.get_submodule("stem").named_parameters())
    wanted = torch.autograd.grad(losses, [*own.values(), *thin.parameters()], retain_graph=True)
    before = {name: each.detach().clone() for name, each in first.named_parameters()}
    found = model_gradients(net, x, y, target)
    for name, each in zip(own, wanted, strict=False):
        torch.testing.assert_close(found[f"stem.{name}"], each)
    for (name, parameter), each in zip(first.named_parameters(), wanted[len(own) :], strict=True):
        moved = parameter.grad if target == "fused" else before[name] - parameter.detach()
        torch.testing.assert_close(moved, each, msg=name)
    assert sum(1 for _ in second.parameters()) == 4 + 2 + 2


def test_random_draws_of_a_suffix_leave_those_of_the_model_alone() -> None:
    found = []
    for gradient in ("oracle", Suffix()):
        net, x, y = make(gradient, drop=0.5)
        torch.manual_seed(3)
        outputs = [net(x, **({"target": y} if gradient != "oracle" else {})) for _ in range(2)]
        found.append((*outputs, torch.get_rng_state()))
    torch.testing.assert_close(found[0], found[1])


def test_a_shared_readout_is_taken_again_every_few_steps() -> None:
    net, x, y = make(Suffix(readout="shared", refresh=3))
    estimator = net.program.interfaces[0].estimator
    head, own = net.original.get_submodule("head"), dict(estimator.named_parameters())
    copied = next(each for name, each in own.items() if name.endswith("head.weight"))
    assert not copied.requires_grad
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    same = []
    for _ in range(7):
        held = head.get_parameter("weight").detach().clone()
        trainer.step(x, target=y)
        same.append(torch.equal(copied, held))
    assert same == [True, False, False, True, False, False, True]


def test_kept_blocks_may_be_moving_averages_of_the_models() -> None:
    net, x, y = make(Suffix(decay=0.75))
    estimator = net.program.interfaces[0].estimator
    name, copied = next((n, p) for n, p in estimator.named_parameters() if "blocks.1" in n.replace("_", "."))
    source = net.original.get_parameter("blocks.1." + name.split("blocks.1.")[-1])
    with torch.no_grad():
        copied.zero_()
    held = source.detach().clone()
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.5)).step(x, target=y)
    torch.testing.assert_close(copied.detach(), 0.25 * held)
    assert not copied.requires_grad


def test_training_goes_on_from_what_was_saved() -> None:
    states = []
    for broken in (False, True):
        net, x, y = make(Suffix(readout="shared", refresh=3, decay=0.9))
        trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.05))
        for number in range(6):
            if broken and number == 4:
                saved = copy.deepcopy(trainer.state_dict())
                net, x, y = make(Suffix(readout="shared", refresh=3, decay=0.9))
                trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.05))
                trainer.load_state_dict(saved)
            trainer.step(x, target=y)
        states.append(dict(net.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


class Tokens(nn.Module):
    """A language model whose readout is its embedding; it computes its own loss where labels are given."""

    def __init__(self, width: int = 8, words: int = 11, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))
        self.readout = nn.Linear(width, words, bias=False)
        self.readout.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=self.embed.weight.dtype)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits = self.readout(x)
        if labels is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_tokens_with_a_mask_made_before_the_cut_and_a_tied_readout() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (4, 7))
    net = dnifx.decouple(Tokens().double(), ["layers.0"], args=(ids,), gradient="suffix", loss=token_loss)
    assert any("keeps layers.1, leaves out layers.2" in note for note in net.program.notes)
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    losses = [float(trainer.step(ids, target=ids).losses["loss"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    short = ids[:, :5]
    assert trainer.step(short, target=short).loss is not None


def test_a_model_that_returns_its_loss_needs_no_other() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (4, 7))
    net = dnifx.decouple(Tokens().double(), ["layers.0"], args=(ids, ids), gradient=Suffix(**WHOLE))
    plain = copy.deepcopy(net.original)
    torch.autograd.backward(net(ids, ids)[0])
    torch.autograd.backward(plain(ids, ids)[0])
    for name, each in plain.named_parameters():
        torch.testing.assert_close(net.original.get_parameter(name).grad, each.grad, msg=name)


class Pixels(nn.Module):
    """A U-Net: a skip goes from before the cut to behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.inner = nn.Sequential(*(Residual(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = torch.tanh(self.down(x))
        inner = self.inner(torch.tanh(self.deep(first)))
        return {"mask": self.out(torch.cat([first, self.up(inner)], 1)), "inner": inner}


def pixel_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.mse_loss(output["mask"], target)


@pytest.mark.parametrize("target", TARGETS)
def test_pixels_with_a_skip_over_the_cut_and_a_structured_output(target: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 1, 8, 8).double()
    net = dnifx.decouple(Pixels().double(), ["deep"], args=(x,), gradient=Suffix(**WHOLE), loss=pixel_loss)
    plain = copy.deepcopy(net.original)
    torch.autograd.backward(pixel_loss(plain(x), y))
    before = {name: each.detach().clone() for name, each in net.original.named_parameters()}
    if target == "fused":
        torch.autograd.backward(pixel_loss(net(x, target=y), y))
    else:
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
    for name, each in plain.named_parameters():
        own = net.original.get_parameter(name)
        found = own.grad if target == "fused" else before[name] - own.detach()
        torch.testing.assert_close(found, each.grad, msg=name)


def test_images_are_averaged_where_the_suffix_would_cost_too_much() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    body = [Residual(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net = dnifx.decouple(model, ["1"], args=(x,), gradient=Suffix(blocks=2, budget=0.2), loss=nn.CrossEntropyLoss())
    assert any("averages images over 2 x 2" in note for note in net.program.notes)
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(x, target=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: make(Suffix(), loss=None), "Give dnifx.decouple"),
        (lambda: Suffix(blocks=-1), "blocks must be 0 or more"),
        (lambda: Suffix(readout="mine"), "give 'own' or 'shared'"),  # type: ignore[arg-type]
        (lambda: Suffix(decay=1.0), "from 0 up to 1"),
        (lambda: make("suffix")[0](torch.randn(5, 4).double()), "call net\\(x, target=y\\)"),
    ],
)
def test_what_cannot_be_done_is_refused(make_it: Any, said: str) -> None:
    with pytest.raises(EstimatorError, match=said):
        make_it()


class OwnLoss(nn.Module):
    """Returns its loss first. Its names are those that generated code has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.suffix_loss, self.thin_loss = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = self.last(torch.tanh(self.thin_loss(torch.tanh(self.suffix_loss(x)))))
        return nn.functional.mse_loss(out, target), out


@pytest.mark.parametrize("gradient", ["suffix", Suffix(readout="shared", refresh=2, decay=0.9)], ids=["own", "mirrors"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_folder_s_forward_learns_as_the_net_does(
    gradient: Any, own_loss: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    if own_loss:
        net = dnifx.decouple(OwnLoss(), ["tanh"], args=(x, y), gradient=gradient)
    else:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        net = dnifx.decouple(model, ["0"], args=(x,), gradient=gradient, loss=nn.functional.mse_loss)
    name = f"emitted_{own_loss}_{isinstance(gradient, str)}"
    net.to_folder(tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module(name).Net()
    if not own_loss:
        other.suffix_loss = nn.functional.mse_loss
        with pytest.raises(Exception, match="call net\\(x, target=y\\)"):
            other(x)
    for number in range(4):
        for each in (net, other):
            torch.manual_seed(number)
            each.zero_grad()
            loss = each(x, y)[0] if own_loss else nn.functional.mse_loss(each(x, target=y), y)
            torch.autograd.backward(loss)
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.sub_(0 if parameter.grad is None else 0.1 * parameter.grad)
        here, there = net.state_dict(), other.state_dict()
        assert set(here) == set(there)
        assert [key for key in here if not torch.equal(here[key], there[key])] == []
    net.eval()
    other.eval()
    with torch.no_grad():
        given = (x, y) if own_loss else (x,)
        assert str(net(*given)) == str(other(*given))


def test_the_suffix_is_shown() -> None:
    net, x, y = make("suffix")
    assert "def suffix_blocks_0(self, " in net.code
    assert "keeps blocks.1" in str(net)
    net.eval()
    torch.testing.assert_close(net(x), net.original(x))
    probed = net.train().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).probe(x, target=y)
    assert set(probed.true) == {"blocks.0", "blocks.2"}


class Doubles(nn.Module):
    """Gives rows of the shape that it takes, in memory that only its own kind of layer lays out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).t().contiguous().t()


def test_a_suffix_that_does_not_run_without_its_blocks_is_refused() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(4, 4), Doubles(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.block(torch.tanh(self.first(x))).t().view(-1).view(4, -1).t())

    x = torch.randn(5, 4)
    with pytest.raises(EstimatorError, match=r"'first': its suffix does not run without the blocks.*Suffix\(blocks="):
        dnifx.decouple(Columns(), ["first"], args=(x,), gradient=Suffix(blocks=0), loss=nn.CrossEntropyLoss())
    dnifx.decouple(Columns(), ["first"], args=(x,), gradient=Suffix(blocks=1), loss=nn.CrossEntropyLoss())


def test_the_cost_of_a_suffix_that_reads_sizes_is_told() -> None:
    class Sized(Tower):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.shape[0]
            x = self.stem(x)
            for each in self.blocks:
                x = each(x).reshape(rows, -1)
            return self.head(self.norm(x))

    x = torch.randn(5, 4)
    net = dnifx.decouple(Sized(), ["blocks.0"], args=(x,), gradient=Suffix(), loss=nn.CrossEntropyLoss())
    (note,) = [note for note in net.program.notes if "the suffix of" in note]
    kept, behind = 2 * 5 * (2 * 36 + 18), 2 * 5 * (6 * 36 + 18)
    assert f": {kept / behind:.0%} of the FLOPs" in note


def test_parameters_stand_in_one_order_in_all_processes() -> None:
    """Optimizers number them: in the order of a set of names, a run that resumed in another process mixed their states up."""
    net, *_ = make(Suffix(blocks=4))
    names = [name for name, _ in net.program.interfaces[0].estimator.named_parameters() if name.startswith("thin.")]
    kept = [name.removeprefix("thin.").rpartition(".")[0] for name in names if name.endswith(".weight")]
    assert len(kept) > 6
    assert kept == sorted(kept, key=lambda path: (path.count("."), path))


def test_a_block_that_changes_the_shape_stays_whole_where_others_of_its_class_are_left_out() -> None:
    net = dnifx.decouple(
        ResNet(blocks=2, filters=4),
        ["stages.0"],
        args=(torch.randn(2, 3, 8, 8),),
        gradient=Suffix(),
        loss=functional.cross_entropy,
    )
    (interface,) = net.program.interfaces
    kept = {name.rpartition(".")[0] for name, _ in interface.estimator.named_parameters()}
    assert any("keeps stages.1.1, leaves out stages.2.1:" in note for note in net.program.notes), net.program.notes
    assert {path for path in kept if "2.0" in path}
    assert not {path for path in kept if "2.1" in path}


class Nested(nn.Module):
    """A block that may hold others of its class; one that holds some changes the width."""

    def __init__(self, width: int, inner: int = 0) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Nested(width) for _ in range(inner))
        self.out = nn.Linear(width, width + inner)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.inner:
            x = each(x)
        found: Tensor = torch.relu(self.out(x))
        return found


def test_blocks_within_a_block_of_their_own_class_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Nested(4, 2), nn.Linear(6, 2))
    net = dnifx.decouple(model, ["0"], args=(torch.randn(5, 3),), gradient=Suffix(blocks=0), loss=nn.MSELoss())
    assert any("leaves out 1.inner.0, 1.inner.1:" in note for note in net.program.notes), net.program.notes
