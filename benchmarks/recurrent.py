"""Windows per second of a recurrent model that is cut in time.

    python -m benchmarks.recurrent
    python -m benchmarks.recurrent --rounds 5 --threads 2 --json recurrent.json

The contestants train an LSTM of 256 units on 256 streams, in windows of 4 steps, with Adam on one
thread. The estimator reads h and has one hidden layer of 256 units. The contestants are truncated
backpropagation, a hand-written DNI loop, and the fused and the scheduled target. They take turns in
one process. Truncated backpropagation runs twice, as its own control.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from benchmarks.contest import Contest, Contestants, run

WIDTH, BATCH, STEPS, SYMBOLS = 256, 256, 4, 32
State = tuple[Tensor, Tensor]


class Network(nn.Module):
    """An LSTM with a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(SYMBOLS, WIDTH, batch_first=True)
        self.readout = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits [batch, steps, symbols] and the next state."""
        outputs, state = self.core(x, state)
        return self.readout(outputs), state


def adam(parameters: object) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant."""
    return torch.optim.Adam(parameters, lr=7e-5)  # type: ignore[arg-type]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def fresh(device: torch.device) -> tuple[Network, State]:
    """Return a network and its first state."""
    torch.manual_seed(0)
    zero = torch.zeros(1, BATCH, WIDTH, device=device)
    return Network().to(device), (zero, zero.clone())


def truncated_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step of plain truncated backpropagation."""
    model, state = fresh(x.device)
    optimizer = adam(model.parameters())

    def step() -> None:
        nonlocal state
        optimizer.zero_grad()
        logits, (hidden, memory) = model(x, state)
        loss(logits, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        state = hidden.detach(), memory.detach()

    return step


def hand_written_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step of DNI, written by hand for this one network."""
    model, state = fresh(x.device)
    last = nn.Linear(WIDTH, 2 * WIDTH)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    estimator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), last).to(x.device)
    optimizer, fit_optimizer = adam(model.parameters()), adam(estimator.parameters())

    def step() -> None:
        nonlocal state
        optimizer.zero_grad()
        fit_optimizer.zero_grad()
        first = tuple(value.detach().requires_grad_() for value in state)
        logits, (hidden, memory) = model(x, first)
        with torch.no_grad():
            beyond = estimator(hidden[0]) * (0.1 / BATCH)
        gradients = (None, beyond[None, :, :WIDTH], beyond[None, :, WIDTH:])
        torch.autograd.backward((loss(logits, y), hidden, memory), gradients)
        target = torch.cat([value.grad[0] for value in first], 1) * BATCH  # type: ignore[index]
        made = estimator(first[0][0].detach())
        made.backward((made.detach() - target) * (2 / BATCH))
        optimizer.step()
        fit_optimizer.step()
        state = hidden.detach(), memory.detach()

    return step


def decoupled(x: Tensor) -> tuple[dnifx.DecoupledModule, State]:
    """Return the network cut in time, and its first state."""
    model, state = fresh(x.device)
    estimator = dnifx.estimators.SyntheticState(reads=(0,))
    cut = dnifx.Recurrent("state", "1", scale=0.1)
    return dnifx.decouple(model, cut, args=(x, state), gradient=estimator, loss=loss), state


def fused_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step of the fused target in a plain loop."""
    net, state = decoupled(x)
    optimizer = adam(net.parameters())

    def step() -> None:
        nonlocal state
        optimizer.zero_grad()
        logits, state = net(x, state)
        loss(logits, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def scheduled_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step of the scheduled target."""
    trainer = decoupled(x)[0].trainer(adam)

    def step() -> None:
        trainer.step(x, target=y)

    return step


def contestants(device: torch.device) -> Contestants:
    """Return the contestants on a device."""
    torch.manual_seed(0)
    symbols = torch.randint(SYMBOLS, (BATCH, STEPS), device=device)
    x, y = functional.one_hot(symbols, SYMBOLS).float(), symbols.roll(1, 1)
    return {
        "truncated": truncated_step(x, y),
        "truncated (control)": truncated_step(x, y),
        "DNI by hand": hand_written_step(x, y),
        "fused": fused_step(x, y),
        "scheduled": scheduled_step(x, y),
    }


CONTEST = Contest("recurrent", "windows", {f"windows of {STEPS} steps": contestants}, ("truncated", "DNI by hand"))


if __name__ == "__main__":
    run(CONTEST, __doc__, rounds=11, steps=10)
