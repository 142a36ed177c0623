"""Train a U-Net to remove noise from squares. It has three partitions, and skip connections cross the cuts."""

import torch
from torch import Tensor, nn

import dnifx


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Upsample(None, 2))
        self.up = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        return self.up(torch.cat([down, self.deep(down)], 1))


torch.manual_seed(0)
clean = torch.zeros(16, 1, 16, 16)
for image in clean:
    row, column = torch.randint(0, 10, (2,)).tolist()
    image[0, row : row + 6, column : column + 6] = 1
noisy = clean + 0.5 * torch.randn_like(clean)
net = dnifx.decouple(UNet(), ["down", "deep"], args=(noisy,), loss=nn.functional.mse_loss)
trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
losses = [trainer.step(noisy, target=clean).loss.item() for _ in range(60)]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, over {len(net.boundaries)} boundaries")
