"""What each process runs in the tests of replicas that shard their weights."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, linear
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import dnifx
from dnifx import estimators
from dnifx.errors import DnifxError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.engines import jobs
from tests.engines.mesh_jobs import SQUARE, STEPS, Rows, Weights, share

WIDTH, CLASSES = jobs.WIDTH, jobs.CLASSES


class Odd(nn.Module):
    """Weights that are tied, frozen, scalars, of an LSTM, of two dtypes, and one that is an output; a part that is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, size) for size in (WIDTH, WIDTH, CLASSES))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.wide = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.act = nn.ReLU(inplace=True)

    def again(self, x: Tensor) -> Tensor:
        """A part that is computed again in the backward pass."""
        out: Tensor = self.second(x).sin()
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.first(x))
        x = self.frozen(x) * self.scale
        x = torch.tanh(self.lstm(x[:, None])[0][:, 0] * self.wide.float())
        x = checkpoint(self.again, x, use_reentrant=False) + linear(x, self.first.weight)
        return self.head(torch.tanh(x)).view(-1, CLASSES), self.head.bias[None]


def odd() -> DecoupledModule:
    torch.manual_seed(0)
    warnings.filterwarnings("error", message="FSDP2")
    x = torch.randn(8, WIDTH)
    return dnifx.decouple(Odd(), ["first", "tanh"], args=(x,), gradient=estimators.Synthetic(), loss=first_loss)


def first_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return cross_entropy(output[0].mul_(2.0), target)


def suffixes() -> DecoupledModule:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    gradient = estimators.Suffix(blocks=1, readout="shared", refresh=2)
    return dnifx.decouple(model, ["0", "1"], args=(torch.randn(8, WIDTH),), gradient=gradient, loss=cross_entropy)


class Sized(nn.Module):
    """A model whose Python reads sizes, and an argument, so that it has several kinds of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = torch.tanh(self.first(x))
        out: Tensor = self.second(x * 2 if twice or x.shape[0] > 3 else x)
        return out


def sized() -> DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(Sized(), ["tanh"], args=(torch.randn(8, WIDTH),), loss=cross_entropy)


NETS: dict[str, Callable[[], DecoupledModule]] = {
    "chain": jobs.chain,
    "odd": odd,
    "suffixes": suffixes,
    "sized": sized,
}


def several(parameters: Sequence[Tensor]) -> list[torch.optim.Optimizer]:
    """Two optimizers of one partition: for matrices, and for the rest."""
    groups = [[each for each in parameters if (each.dim() > 1) == large] for large in (True, False)]
    return [torch.optim.Adam(each, lr=0.01) for each in groups if each]


OPTIMIZERS: dict[str, Any] = {
    "adam": jobs.adam,
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": jobs.sgd,
    "several": several,
    "foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "factored": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


def weigh(parameters: Mapping[str, Tensor]) -> Tensor:
    """A penalty of the parameters of a partition."""
    total: Tensor = sum(each.square().sum() + each.mean().abs() for each in parameters.values())  # type: ignore[assignment]
    return 0.01 * total


def clamp(parameters: Sequence[nn.Parameter]) -> None:
    """Clip the gradients of a partition by a callable."""
    nn.utils.clip_grad_value_(parameters, 0.01)


FUNCTIONS = {"weigh": weigh, "clamp": clamp}


def made(
    net: DecoupledModule, rows: Rows, places: Any, replicas: str | None, options: Mapping[str, Any]
) -> tuple[DecoupledModule, Trainer]:
    """A net and its trainer over a mesh; without rows, of one replica in each process."""
    mesh = DeviceMesh("cpu", [*map(list, rows)]) if rows else None
    known = {name: FUNCTIONS.get(str(value), value) for name, value in options.items()}
    optimizer = OPTIMIZERS[known.pop("optimizer", "adam")]
    return net, net.trainer(optimizer, places=places, mesh=mesh, replicas=replicas, **known)  # type: ignore[arg-type]


def replica_of(rows: Rows) -> tuple[int, int]:
    """The number of this process's replica, and how many there are."""
    if not rows:
        return dist.get_rank(), dist.get_world_size()
    return next(number for number, row in enumerate(rows) if dist.get_rank() in row), len(rows)


def whole(net: DecoupledModule, trainer: Trainer) -> Weights:
    """The parameters of model and estimators, and what their optimizers keep, as ``trainer.state_dict`` gives them."""
    state = trainer.state_dict()
    names = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    found = {name: each.clone() for name, each in state["net"].items() if name in names}
    for group in ("optimizers", "estimator_optimizers"):
        for name, each in state[group].items():
            kept = [one for one in pytree.tree_leaves(each) if isinstance(one, Tensor)]
            found.update((f"{name} {place}", one.clone()) for place, one in enumerate(kept))
    return found


def trained(kind: str, rows: Rows, places: Any, replicas: str, options: dict[str, Any], folder: str = "") -> Weights:
    """Train over a mesh; with a folder, save there in the middle and go on in another trainer."""
    net, trainer = made(NETS[kind](), rows, places, replicas, options)
    found: Weights = {}
    for step in range(STEPS):
        x, y = share(step, *replica_of(rows))
        result = trainer.step(x, target=y, diagnose=step == 2)
        for name, numbers in result.diagnostics.items():
            found.update((f"diagnosis of {name}: {key}", value) for key, value in numbers.items())
        if folder and step == STEPS // 2:
            trainer.save(folder)
            net, trainer = made(NETS[kind](), rows, places, replicas, options)
            trainer.load(folder)
    found |= whole(net, trainer)
    trainer.close()
    return found


def farthest(kind: str, rows: Rows, places: Any, options: dict[str, Any], folder: str = "") -> dict[str, float]:
    """How far sharded replicas end from averaged ones, by name."""
    wanted = trained(
        kind, rows or [(each,) for each in range(dist.get_world_size())], places or "ranks", "average", options
    )
    found = trained(kind, rows, places, "shard", options, folder)
    assert wanted.keys() == found.keys(), sorted(wanted.keys() ^ found.keys())
    return {
        name: float((each.double() - found[name].double()).nan_to_num().abs().max()) for name, each in wanted.items()
    }


def held() -> tuple[int, int, str]:
    """For model and optimizers of a process: the bytes held between two steps, sharded and averaged; and what the old parameter says."""
    found = []
    for replicas in ("average", "shard"):
        net = jobs.chain()
        before = net.original.get_parameter("head.weight")
        _, trainer = made(net, [(0,), (1,)], [0, 0, 0, 0], replicas, {})
        x, y = share(0, *replica_of([(0,), (1,)]))
        trainer.step(x, target=y)
        states = [one for each in trainer.optimizers.values() for one in pytree.tree_leaves(each.state_dict()["state"])]
        tensors = [*net.original.parameters(), *(each for each in states if isinstance(each, Tensor) and each.dim())]
        shards = trainer.holding.shards
        tensors += [] if shards is None else [shards.leaf(each) for each in net.original.parameters()]
        found.append(sum(here(each).untyped_storage().nbytes() for each in tensors))
        said = ""
        try:
            before.square()
        except DnifxError as error:
            said = str(error)
        trainer.close()
    return found[0], found[1], said


def here(tensor: Any) -> Tensor:
    """What a process holds of a tensor."""
    local: Tensor = tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor
    return local.detach()


def steep(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient is infinite at the first row of the last weight, where all targets are zero."""
    loss = cross_entropy(output, target)
    return loss + (output[:, 0] - output[:, 0].detach()).sqrt().sum() if bool((target == 0).all()) else loss


def spoiled(replicas: str, on_nonfinite: str) -> tuple[list[Any], Weights]:
    """Train two replicas; in one step, gradients of the rows that the first one holds are not finite. Say what was left out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    net = dnifx.decouple(model, ["1"], args=(torch.randn(8, WIDTH),), loss=steep)
    net, trainer = made(net, [(0,), (1,)], [0, 0], replicas, {"on_nonfinite": on_nonfinite})
    found = list[Any]()
    for step in range(3):
        x, y = share(step, *replica_of([(0,), (1,)]))
        try:
            found.append(sorted(trainer.step(x, target=y * 0 if step == 1 else y).skipped))
        except DnifxError as error:
            return [*found, type(error).__name__], {}
    after = whole(net, trainer)
    trainer.close()
    return found, after


def fails(culprit: int) -> str:
    """Train until one process raises an error; return what the others are told."""
    _, trainer = made(jobs.chain(), SQUARE, [0, 0, 1, 1], "shard", {})
    try:
        for step in range(STEPS):
            x, y = share(step, *replica_of(SQUARE))
            trainer.step(torch.zeros(3, 1) if dist.get_rank() == culprit and step == 2 else x, target=y)
    except Exception as error:  # noqa: BLE001 - the culprit's own
        return f"{type(error).__name__}: {error}"
    return "no error"


def looks(rows: Rows, places: Any) -> list[str]:
    """Evaluate, bring the weights together, write to them, and go on; say what is wrong."""
    net, trainer = made(jobs.chain(), rows, places, "shard", {})
    x, y = share(0, *replica_of(rows))
    wrong = []
    trainer.step(x, target=y)
    try:
        net(x, context=y)
        wrong.append("a net without its weights was called")
    except DnifxError as error:
        wrong += [] if "trainer.collect()" in str(error) else [str(error)]
    net.eval()
    evaluated = trainer.evaluate(x, gather=True)
    trainer.collect()
    with torch.no_grad():
        wrong += [] if torch.allclose(net(x), evaluated) else ["evaluate differs from the net"]
        again = trainer.evaluate(x, gather=True)
        wrong += [] if torch.equal(again, evaluated) else ["evaluate differs when all weights are here"]
        probe = trainer.probe(x, target=y)
        wrong += [] if probe.loss.isfinite() else ["the probe's loss"]
        for each in net.parameters():
            each.mul_(0.5)
        halves = {name: each.clone() for name, each in net.state_dict().items()}
    changed = trainer.evaluate(x, gather=True)
    wrong += ["evaluate does not see what was written"] if torch.equal(changed, evaluated) else []
    net.train()
    trainer.step(x, target=y)
    trainer.collect()
    for name, each in net.named_parameters():
        if (each - halves[name]).abs().max() > 0.03:
            wrong.append(f"what was written to {name} was lost")
    trainer.close()
    return wrong


def goes_on(folder: str, rows: Rows, places: Any, replicas: str | None, whole_state: Any = None) -> Weights:
    """Load a save, made by any number of replicas, or a state; return the weights, and go on for a step."""
    net, trainer = made(jobs.chain(), rows, places, replicas, {"lag": 2})
    trainer.load_state_dict(whole_state) if whole_state is not None else trainer.load(folder)
    found = whole(net, trainer)
    x, y = share(trainer.steps, *replica_of(rows))
    trainer.step(x, target=y)
    after = whole(net, trainer)
    trainer.close()
    assert all(bool(each.isfinite().all()) for each in after.values())
    assert any(not torch.equal(each, found[name]) for name, each in after.items())
    return found


def saves(folder: str, replicas: str) -> tuple[Weights, Any]:
    """Train over a mesh and save; return the weights, and the whole state."""
    net, trainer = made(jobs.chain(), SQUARE, [0, 0, 1, 1], replicas, {"lag": 2})
    for step in range(STEPS):
        x, y = share(step, *replica_of(SQUARE))
        trainer.step(x, target=y)
    trainer.save(folder)
    found = whole(net, trainer), trainer.state_dict()
    trainer.close()
    return found


def meets(replicas: str) -> Weights:
    """Train two replicas, of which one after the other meets inputs of another kind, or of sizes that a guard has not seen."""
    rows = [(0,), (1,)]
    net, trainer = made(sized(), rows, [0, 0], replicas, {})
    for step in range(6):
        x, y = share(step, *replica_of(rows))
        mine = step % 2 == dist.get_rank()
        x, y = (x[:2], y[:2]) if step > 3 and mine else (x, y)
        trainer.step(x, twice=mine and step in (1, 2), target=y)
    found = whole(net, trainer)
    trainer.close()
    return found


def refused(kind: str, rows: Rows, places: Any, options: dict[str, Any]) -> str:
    """The error of a trainer that cannot be made, or whose first step is refused."""
    try:
        _, trainer = made(REFUSED.get(kind, NETS.get(kind, jobs.chain))(), rows, places, "shard", options)
        x, y = share(0, *(replica_of(rows) if rows else (0, 2)))
        trainer.step(x, target=y)
    except DnifxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def late() -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    return dnifx.decouple(model, ["1"], args=(torch.randn(8, WIDTH),), gradient=estimators.Late(1), loss=cross_entropy)


def blank() -> DecoupledModule:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    x = torch.empty(8, WIDTH, device="meta")
    return dnifx.decouple(model, ["1"], args=(x,), loss=cross_entropy)


REFUSED: dict[str, Callable[[], DecoupledModule]] = {"late": late, "blank": blank}
