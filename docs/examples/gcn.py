"""Train a graph network of torch-geometric to tell two communities apart. Its layers learn from synthetic gradients."""

import torch
from torch_geometric.nn import GCN

import dnifx

torch.manual_seed(0)
labels = torch.arange(60) % 2
close = labels[:, None] == labels[None, :]
edges = (torch.rand(60, 60) < torch.where(close, 0.2, 0.02)).nonzero().t().contiguous()
features = torch.randn(60, 8)
features[:, 0] += labels

model = GCN(in_channels=8, hidden_channels=16, num_layers=3, out_channels=2)
net = dnifx.decouple(model, ["convs.0", "convs.1"], args=(features, edges), loss=torch.nn.functional.cross_entropy)
print(net)
trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=3e-3))
losses = [trainer.step(features, edges, target=labels).loss.item() for _ in range(150)]
with torch.no_grad():
    right = (net.eval()(features, edges).argmax(-1) == labels).float().mean().item()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {right:.0%} of the nodes right")
