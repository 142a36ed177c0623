"""How near what partitions learn from is to backpropagation: cosines of the gradients of their parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dnifx.zoo.recipes.table_learners import TableLearner


def parameter_cosines(learner: TableLearner, inputs: Tensor, targets: Tensor) -> Mapping[str, float]:
    """Return, by the name of each cut, the cosine between two gradients of the partition before it.

    One is what the partition learns from, the other the gradient of backpropagation through the whole network, both with
    respect to all parameters of the partition. It is 0 where one of them is. Of a cut network it is the ``parameter_cosine``
    that ``Trainer.probe`` finds; this function knows networks that are not cut, too. The network's running averages move.

    Args:
        learner: The network and the way it learns.
        inputs: Inputs of a batch.
        targets: Its targets.
    """
    names, parameters = zip(*learner.model.named_parameters(), strict=True)
    learner.net.train()
    losses = learner.all_losses(inputs, targets), learner.task.loss(learner.model(inputs), targets)
    own, true = (
        dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True)) for loss in losses
    )
    found = {}
    for boundary in learner.net.boundaries:
        paths = learner.net.partitions[boundary.producer].parameters
        mine, theirs = (torch.cat([gradients[path].flatten() for path in paths]) for gradients in (own, true))
        found[boundary.name] = float(functional.cosine_similarity(mine, theirs, dim=0))
    return found
