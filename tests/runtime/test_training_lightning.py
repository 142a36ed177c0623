"""The fused target inside a LightningModule, trained by Lightning's Trainer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.runtime.test_training_loops import make_data, make_net


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_learns_in_a_lightning_trainer(tmp_path: Path) -> None:
    import lightning  # here, because it takes seconds and every process that runs tests reads this file

    class Classifier(lightning.LightningModule):
        """A user's module around a decoupled net."""

        def __init__(self) -> None:
            super().__init__()
            self.net = make_net(context="label", num_classes=3)
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            inputs, labels = batch
            loss = cross_entropy(self.net(inputs, context=labels), labels)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(TensorDataset(*make_data()), batch_size=32))
    assert len(module.losses) == 60
    assert sum(module.losses[-3:]) < 0.5 * sum(module.losses[:3])
