"""Train a cut net with transformers.Trainer: mixed precision, clipping, accumulation, checkpoint and resume.

    python in_transformers.py folder 10
    python in_transformers.py folder 20

The second call goes on from the first one's checkpoint, and ends as one call of 20 updates does. The model returns its
loss, so that the net sees in the backward pass what the Trainer multiplies it by. The lines that know of the cuts have a
comment.
"""

import sys
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import dnifx
from dnifx.adapters.transformers import ClipModel

IDS = torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(0))
LABELS = (IDS[:, 0] < 15).long()
ROWS = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]


def make_model(dropout: float = 0.1) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(vocab_size=30, num_labels=2, **size, **dropouts)
    return transformers.BertForSequenceClassification(config)


def make_net(gradient: Any, dropout: float = 0.1) -> Any:
    inputs = {"input_ids": IDS[:4], "labels": LABELS[:4]}
    return dnifx.decouple(make_model(dropout), ["bert.encoder.layer.0"], kwargs=inputs, gradient=gradient)


def train(net: Any, folder: str, updates: int, parts: int = 4, **options: Any) -> list[float]:
    """Train until a number of updates is made, each from all examples in a number of parts; return the losses."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(ROWS) // parts,
        gradient_accumulation_steps=parts,
        max_steps=updates,
        save_steps=updates,
        logging_steps=1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        # max_grad_norm is 0, since ClipModel clips the model alone: the fits of estimators do not count
        **{"max_grad_norm": 0, "bf16": True, **options},
    )
    optimizer = torch.optim.Adam(net.parameter_groups(lr=3e-3, estimator_lr=1e-2))  # estimators in a group of their own
    given = {"train_dataset": ROWS, "optimizers": (optimizer, None), "callbacks": [ClipModel(1.0)]}
    trainer = transformers.Trainer(net, arguments, **given)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


if __name__ == "__main__":
    losses = train(make_net(dnifx.estimators.Synthetic(hidden=0)), sys.argv[1], int(sys.argv[2]))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
