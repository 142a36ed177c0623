"""Sparse tensors: as inputs, as buffers and attributes, made in forward, in every layout that torch multiplies."""

import pytest
import torch
from torch import Tensor, nn

import dnifx
from tests.passes.capture.both_targets import trains_like_the_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
LAYOUTS = (torch.sparse_coo, torch.sparse_csr)


def adjacency(nodes: int, layout: torch.layout) -> Tensor:
    dense = (torch.rand(nodes, nodes) > 0.6).double()
    return (dense / dense.sum(1, keepdim=True).clamp(min=1)).to_sparse(layout=layout)


class Given(nn.Module):
    """A graph convolution network whose adjacency is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def matrix(self, x: Tensor, given: Tensor | None) -> Tensor:
        """Return the adjacency."""
        assert given is not None
        return given

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        matrix = self.matrix(x, given)
        h = torch.relu(torch.sparse.mm(matrix, self.first(x)))
        h = torch.relu(matrix @ self.second(h))
        scores: Tensor = self.head(h)
        return scores


class Held(Given):
    """The adjacency is a buffer, or an attribute that nobody registered."""

    held: Tensor

    def __init__(self, layout: torch.layout, registered: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        matrix = adjacency(10, layout)
        if registered:
            self.register_buffer("held", matrix, persistent=False)
        else:
            self.held = matrix

    def matrix(self, x: Tensor, given: Tensor | None) -> Tensor:
        return self.held


class MadeOfEdges(Given):
    """The adjacency is made in forward, of the edges."""

    def matrix(self, x: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        weights = torch.full((given.shape[1],), 0.5, dtype=x.dtype)
        return torch.sparse_coo_tensor(given, weights, (len(x), len(x)))


class MadeOfDense(Given):
    """The adjacency is made in forward, of a dense matrix."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layout = layout

    def matrix(self, x: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        return given.to_sparse(layout=self.layout)


def features(nodes: int = 10) -> Tensor:
    return torch.randn(nodes, 6, dtype=torch.double)


def targets(nodes: int = 10) -> Tensor:
    return torch.randint(0, 3, (nodes,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_input(layout: torch.layout) -> None:
    sizes = (10, 10, 7)
    batches = [((features(nodes), adjacency(nodes, layout)), targets(nodes)) for nodes in sizes]
    net = trains_like_the_model(Given, ["first", "second"], batches, nn.CrossEntropyLoss())
    assert len(net.input_kinds) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("registered", [True, False])
def test_a_sparse_tensor_that_the_model_holds(layout: torch.layout, registered: bool) -> None:
    batches = [((features(),), targets()) for _ in range(2)]
    trains_like_the_model(lambda: Held(layout, registered), ["first", "second"], batches, nn.CrossEntropyLoss())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_tensor_that_is_made_in_forward(layout: torch.layout) -> None:
    dense = [((features(), adjacency(10, layout).to_dense()), targets()) for _ in range(2)]
    trains_like_the_model(lambda: MadeOfDense(layout), ["first", "second"], dense, nn.CrossEntropyLoss())
    edges = [((features(), torch.randint(0, 10, (2, 12))), targets()) for _ in range(2)]
    trains_like_the_model(MadeOfEdges, ["first", "second"], edges, nn.CrossEntropyLoss())


@pytest.mark.parametrize("number", [2, 3])
def test_a_number_of_cuts_beside_a_sparse_input(number: int) -> None:
    batches = [((features(), adjacency(10, torch.sparse_coo)), targets())]
    trains_like_the_model(Given, number, batches, nn.CrossEntropyLoss())


class Learned(Given):
    """The weights of the edges are learned, so the adjacency itself has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Linear(2, 1)

    def matrix(self, x: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        weights = torch.sigmoid(self.edges(given.to(x).T)).squeeze(1)
        return torch.sparse_coo_tensor(given, weights, (len(x), len(x)))


def test_a_sparse_tensor_with_a_gradient_stays_on_one_side_or_is_refused() -> None:
    edges = torch.randint(0, 10, (2, 12))
    trains_like_the_model(Learned, ["first"], [((features(), edges), targets())], nn.CrossEntropyLoss())
    with pytest.raises(
        dnifx.errors.DnifxError, match=r"sparse_coo_tensor.* crosses the boundary 'second'.*dense tensors only"
    ):
        dnifx.decouple(Learned().double(), ["second"], args=(features(), edges))


def test_a_number_of_cuts_passes_over_a_sparse_tensor_with_a_gradient() -> None:
    edges = torch.randint(0, 10, (2, 12))
    trains_like_the_model(Learned, 2, [((features(), edges), targets())], nn.CrossEntropyLoss())
