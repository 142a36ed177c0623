"""What each framework multiplies the loss by: micro-batches leave the weights of one large batch, on model and estimators."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dnifx
from dnifx.adapters import accelerate as for_accelerate
from dnifx.adapters.nets import factor, nets_of
from dnifx.errors import InputError
from dnifx.estimators import Synthetic
from dnifx.runtime.decoupled import DecoupledModule

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Labelled(nn.Module):
    """A model that takes labels and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def made(labelled: bool = False) -> DecoupledModule:
    torch.manual_seed(0)
    model = Labelled() if labelled else nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    args = (X, Y) if labelled else (X,)
    net = dnifx.decouple(model, "first" if labelled else "0", args=args, gradient=Synthetic(hidden=0))
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def whole(labelled: bool = False) -> dict[str, Tensor]:
    """Return the weights after one step on all examples."""
    net = made(labelled)
    optimizer = sgd(net)
    torch.autograd.backward(net(X, Y)["loss"] if labelled else cross_entropy(net(X), Y))
    optimizer.step()
    return net.state_dict()


def check(net: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_accelerate() -> None:
    import accelerate

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    net = made()
    prepared, optimizer = accelerator.prepare(net, sgd(net))
    for_accelerate.tell_loss_scale(accelerator, prepared)
    for inputs, labels in zip(X.chunk(4), Y.chunk(4), strict=True):
        with accelerator.accumulate(prepared):
            accelerator.backward(cross_entropy(prepared(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    check(net, whole())


def lightning_module() -> Any:
    """Return a LightningModule that trains the net."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = made()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    return Classifier()


def test_lightning(tmp_path: Path) -> None:
    import lightning

    from dnifx.adapters.lightning import TellLossScale

    module = lightning_module()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        accumulate_grad_batches=4,
        callbacks=[TellLossScale()],
        **quiet,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4))
    check(module.net, whole())


@pytest.mark.parametrize("labelled", [True, False], ids=["the model's loss", "a loss of the trainer's"])
def test_transformers(labelled: bool, tmp_path: Path) -> None:
    import transformers

    from dnifx.adapters import transformers as for_transformers

    class OwnLoss(transformers.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return (
                super().compute_loss(model, inputs) if labelled else cross_entropy(model(inputs["x"]), inputs["labels"])
            )

    net = made(labelled)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_grad_norm=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = OwnLoss(net, arguments, train_dataset=data, optimizers=(sgd(net), None))
    if not labelled:
        for_transformers.tell_loss_scale(trainer)
    trainer.train()
    check(net, whole(labelled))


class Tied(nn.Module):
    """A language model whose readout is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.mix(self.embed(ids))))
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_tied_weights_are_saved_once_and_resumed(tmp_path: Path) -> None:
    import transformers

    from dnifx.adapters.transformers import SavesTied

    ids = torch.randint(0, 10, (8, 6), generator=torch.Generator().manual_seed(0))

    def run(folder: str, steps: int, resume: bool = False) -> DecoupledModule:
        torch.manual_seed(0)
        net = dnifx.decouple(Tied(), ["mix"], kwargs={"ids": ids, "labels": ids}, gradient=Synthetic(hidden=0))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=steps,
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        data = [{"ids": row, "labels": row} for row in ids]
        SavesTied(net, arguments, train_dataset=data, optimizers=(optimizer, None)).train(
            resume_from_checkpoint=resume or None
        )
        return net

    whole = run("whole", 4)
    run("halves", 2)
    halves = run("halves", 4, resume=True)
    assert halves.get_submodule("out").weight is halves.get_submodule("embed").weight
    for name, value in whole.state_dict().items():
        assert torch.equal(halves.state_dict()[name], value), name


def test_a_scaler_and_accumulation_make_a_product() -> None:
    assert factor(None, 4) == 0.25
    assert factor(torch.amp.GradScaler("cpu", enabled=False), 4) == 0.25
    assert float(factor(torch.amp.GradScaler("cpu", init_scale=64.0), 4)) == 16.0


def test_a_module_without_a_net_is_refused() -> None:
    with pytest.raises(InputError, match="holds no net"):
        nets_of(nn.Linear(2, 2))
