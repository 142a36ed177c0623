"""The recurrent network of the paper's sequence tasks."""

from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class SequenceNetwork(nn.Module):
    """An LSTM with a linear readout. It reads vectors or, with an embedding, symbols.

    Args:
        inputs: Size of an input vector, or number of symbols if ``embedded``.
        width: Units of the LSTM.
        outputs: Number of classes of a step's output.
        embedded: Whether the inputs are symbols, to be embedded in ``width`` dimensions.

    >>> import torch
    >>> zero = torch.zeros(1, 2, 4)
    >>> y, _ = SequenceNetwork(3, 4, 5)(torch.zeros(2, 7, 3), (zero, zero))
    >>> y.shape
    torch.Size([2, 7, 5])

    References:
        Jaderberg et al. 2017, appendix A.3.
    """

    def __init__(self, inputs: int, width: int, outputs: int, embedded: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(inputs, width) if embedded else nn.Identity()
        self.core = nn.LSTM(width if embedded else inputs, width, batch_first=True)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits [batch, steps, outputs] and the next state, h and c [1, batch, width]."""
        hidden, left = self.core(self.embedding(x), state)
        return self.readout(hidden), left
