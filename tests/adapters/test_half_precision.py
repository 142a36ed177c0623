"""A scaled loss in each framework: model and estimators get the gradients of the loss, whatever it was multiplied by."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dnifx.adapters import accelerate as for_accelerate
from dnifx.adapters import transformers as for_transformers
from dnifx.adapters.lightning import TellLossScale
from dnifx.estimators import Stale, Synthetic
from tests.adapters.half import scaling
from tests.adapters.test_adapters import X, Y, lightning_module, made, sgd, whole

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=[2.0**3, 2.0**9])
def scale(request: pytest.FixtureRequest) -> float:
    """Return what the loss is multiplied by."""
    return float(request.param)


def check(net: torch.nn.Module, wanted: dict[str, Tensor]) -> None:
    """Compare what a step has changed; half precision rounds, a factor that is left out would be at least 4."""
    start = made(labelled="first.weight" in wanted).state_dict()
    for name, value in net.state_dict().items():
        change, expected = value.cpu() - start[name], wanted[name] - start[name]
        assert (change - expected).norm() <= 0.05 * expected.norm() + 1e-6, name
    fits = [name for name in wanted if name.startswith("interfaces")]
    assert any(not torch.equal(wanted[name], start[name]) for name in fits)


@pytest.mark.parametrize("device", DEVICES)
def test_accelerate(device: str, scale: float) -> None:
    import accelerate

    with scaling(scale):
        handlers = [accelerate.GradScalerKwargs(init_scale=scale)]
        accelerator = accelerate.Accelerator(
            cpu=device == "cpu", mixed_precision="fp16", gradient_accumulation_steps=4, kwargs_handlers=handlers
        )
        net = made()
        prepared, optimizer = accelerator.prepare(net, sgd(net))
        for_accelerate.tell_loss_scale(accelerator, prepared)
        for inputs, labels in zip(X.to(device).chunk(4), Y.to(device).chunk(4), strict=True):
            with accelerator.accumulate(prepared):
                accelerator.backward(cross_entropy(prepared(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
        assert accelerator.scaler.get_scale() == scale
        assert not accelerator.optimizer_step_was_skipped
        check(net, whole())


@pytest.mark.parametrize("device", DEVICES)
def test_lightning(device: str, scale: float, tmp_path: Path) -> None:
    module = lightning_module()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    plugin = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", device, torch.amp.GradScaler(device, init_scale=scale)
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator=device,
        devices=1,
        default_root_dir=tmp_path,
        accumulate_grad_batches=4,
        callbacks=[TellLossScale()],
        plugins=[plugin],
        **quiet,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4))
    check(module.net, whole())


class OwnLoss(transformers.Trainer):
    """Computes the loss itself."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return cross_entropy(model(inputs["x"]), inputs["labels"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("labelled", [True, False], ids=["the model's loss", "a loss of the trainer's"])
def test_transformers(labelled: bool, device: str, scale: float, tmp_path: Path) -> None:
    with scaling(scale):
        net = made(labelled)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_steps=1,
            use_cpu=device == "cpu",
            fp16=True,
            report_to=[],
            save_strategy="no",
            max_grad_norm=0,
            remove_unused_columns=False,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
        kind = transformers.Trainer if labelled else OwnLoss
        trainer = kind(net, arguments, train_dataset=data, optimizers=(sgd(net), None))
        trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=scale)
        if not labelled:
            for_transformers.tell_loss_scale(trainer)
        trainer.train()
        check(net, whole(labelled))


@pytest.mark.parametrize("gradient", [Synthetic(hidden=0), Stale()], ids=["synthetic", "stale"])
def test_an_overflow_changes_nothing_and_is_no_news(gradient: Any, recwarn: pytest.WarningsRecorder) -> None:
    net = made(gradient=gradient)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    net.loss_scale = scaler
    before = {name: value.clone() for name, value in net.state_dict().items()}
    changed = []
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(8 * cross_entropy(net(X), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
        changed.append({name for name, value in net.state_dict().items() if not torch.equal(value, before[name])})
    assert changed[0] == changed[1] == set(), "the scaler finds a scale first"
    assert {*changed[-1], "interfaces.cut_0.anchor"} >= set(before), "the anchor never moves"
    assert not recwarn.list
