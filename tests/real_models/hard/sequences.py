"""Models of sequences: recurrent layers, cells in loops, attention written out, convolutions along time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.real_models.hard.pieces import BATCH, LENGTH, TOKENS, WIDTH, Factory, mlp, words


class RecurrentModel(nn.Module):
    """Embedding, recurrent layers and a head; the states are given out too."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH, batch_first=True) for _ in range(3))  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        x, states = self.embedding(ids), []
        for layer in self.layers:
            x, state = layer(x)
            states.append(state)
        return self.head(x), states


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.before, self.core = mlp(), nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.after = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), mlp())

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.before(self.embedding(ids))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.core(packed)[0], batch_first=True)
        return self.after(x)


class CellLoop(nn.Module):
    """A cell in a Python loop over time, then a body."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.body = nn.Sequential(mlp(), nn.ReLU(), mlp())

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for moment in x.unbind(1):
            state = self.cell(moment, state)
        return self.body(state[0]) if state is not None else x


class AttentionByHand(nn.Module):
    """Multi-head attention written out, causal and with a padding mask; the head is the embedding."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("causal", torch.ones(64, 64).tril().bool(), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        batch, length, width = x.shape
        causal: Tensor = self.causal  # type: ignore[assignment]
        for projection in self.projections:
            query, key, value = projection(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
            scores = query @ key.transpose(-1, -2) / (width // 4) ** 0.5
            scores = scores.masked_fill(~causal[:length, :length], float("-inf"))
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None, :], -1e9)
            x = x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.head(x)


class StateSpace(nn.Module):
    """Long convolutions by the Fourier transform, in complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, 16) * 0.1) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        size = 2 * x.shape[1]
        for kernel, mix in zip(self.kernels, self.mixes, strict=True):
            spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
            long = torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].transpose(1, 2)
            x = x + mix(F.gelu(long))
        return x


class Wave(nn.Module):
    """Dilated gated convolutions whose skips add up (WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**index) for index in range(5))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | int = 0
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            wide = gate(F.pad(x, (2**index, 0)))
            value, opened = wide.chunk(2, 1)
            hidden = torch.tanh(value) * torch.sigmoid(opened)
            total = total + skip(hidden)
            x = x + hidden
        return F.relu(torch.as_tensor(total))


def recurrent_family() -> Mapping[str, Factory]:
    """Return models with time in them."""
    return {
        "lstm": lambda: (RecurrentModel(nn.LSTM), (words(),), {}),
        "gru": lambda: (RecurrentModel(nn.GRU), (words(),), {}),
        "packed": lambda: (Packed(), (words(), torch.tensor([6, 4, 2])), {}),
        "cell loop": lambda: (CellLoop(), (torch.randn(BATCH, LENGTH, WIDTH),), {}),
        "state space": lambda: (StateSpace(), (torch.randn(BATCH, LENGTH, WIDTH),), {}),
        "wave": lambda: (Wave(), (torch.randn(BATCH, 8, 40),), {}),
        "attention by hand": lambda: (AttentionByHand(), (words(), words() > 3), {}),
    }
