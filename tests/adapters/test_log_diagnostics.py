"""How good the synthetic gradients are, in the loggers of the frameworks: in the steps that are logged, and in no others."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dnifx.errors import InputError
from tests.adapters.test_adapters import X, Y, lightning_module, made, sgd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def looked_at(steps: range, logged: int) -> list[float]:
    """Return the cosine in each logged step of a plain loop over the examples, four at a time."""
    net = made()
    optimizer = sgd(net)
    found = []
    for step in steps:
        rows = slice(4 * (step % 4), 4 * (step % 4) + 4)
        net.diagnosing = (step + 1) % logged == 0
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(net(X[rows]), Y[rows]))
        if net.diagnosing:
            found.append(net.diagnostics("dni/")["dni/0/cosine"])
        optimizer.step()
    return found


def test_lightning(tmp_path: Path) -> None:
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from dnifx.adapters.lightning import LogDiagnostics

    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=3,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LogDiagnostics()],
    )
    trainer.fit(lightning_module(), DataLoader(TensorDataset(X, Y), batch_size=4))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dni/0/cosine"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    assert [float(row["dni/0/cosine"]) for row in rows] == pytest.approx(looked_at(range(6), 3), abs=1e-5)


def test_transformers(tmp_path: Path) -> None:
    import transformers

    from dnifx.adapters.transformers import LogDiagnostics

    net = made(labelled=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_grad_norm=0,
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(net, arguments, train_dataset=data, optimizers=(sgd(net), None))
    trainer.add_callback(LogDiagnostics(trainer))
    trainer.train()
    found: list[dict[str, Any]] = [row for row in trainer.state.log_history if "dni/first/cosine" in row]
    assert [row["step"] for row in found] == [3, 6]
    assert all(-1 <= row["dni/first/cosine"] <= 1 and row["dni/first/target_norm"] > 0 for row in found)
    with pytest.raises(InputError, match="holds no net"):
        LogDiagnostics(transformers.Trainer(torch.nn.Linear(2, 2), arguments))
