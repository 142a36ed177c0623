"""transformers.Trainer: it divides the loss for accumulation, and Accelerate scales it in half precision.

A model that returns its loss needs no adapter for that. ``tell_loss_scale`` is for a loss that the trainer computes itself, such as
one with label smoothing. ``ClipModel``, ``LogDiagnostics`` and ``SavesTied`` are for all of them.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor

from dnifx.adapters.nets import factor, nets_of
from dnifx.errors import InputError, LossError
from dnifx.runtime.emitted.loss_scale import Factor


@dataclass(frozen=True)
class TrainerScale:
    """What a trainer multiplies the loss by now."""

    trainer: Any

    def __call__(self) -> Factor:
        """Return the factor."""
        return factor(self.trainer.accelerator.scaler, self.trainer.current_gradient_accumulation_steps)


def tell_loss_scale(trainer: Any) -> None:
    """Let the nets in the model of a ``transformers.Trainer`` know what it multiplies the loss by.

    Raises:
        InputError: The model holds no net.
        LossError: A function of your own divides the loss by the number of items, of which the net knows nothing.
    """
    if trainer.compute_loss_func is not None:
        raise LossError(
            "compute_loss_func divides the loss by the number of items in all micro-batches, and the net cannot know that factor: return "
            "the loss from the model, or set net.loss_scale in the function"
        )
    trainer.model_accepts_loss_kwargs = False  # so that the loss is a mean, which the trainer divides
    for net in nets_of(trainer.model):
        net.loss_scale = TrainerScale(trainer)


class ClipModel(transformers.TrainerCallback):
    """Clips the gradients of the model by their own norm, without the fits of its estimators: ``callbacks=[ClipModel(1.0)]``.

    The trainer's own ``max_grad_norm`` would count the fits too; set it to 0.

    Args:
        max_norm: The largest norm of the model's gradients.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look whether the trainer clips already.

        Raises:
            InputError: It does, or the model holds no net.
        """
        nets_of(given["model"])
        if args.max_grad_norm:
            raise InputError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips model and estimators by one norm before ClipModel can clip "
                "the model by its own: give max_grad_norm=0"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Clip; the trainer has unscaled the gradients."""
        for net in nets_of(given["model"]):
            net.clip_grad_norm_(self.max_norm)


class LogDiagnostics(transformers.TrainerCallback):
    """Logs how good the synthetic gradients are: ``trainer.add_callback(LogDiagnostics(trainer))``.

    Every ``logging_steps`` steps, ``net.diagnostics()`` goes where the trainer's own numbers go.

    Args:
        trainer: The trainer.
        prefix: What the names of the numbers begin with.

    Raises:
        InputError: The trainer's model holds no net.
    """

    def __init__(self, trainer: Any, prefix: str = "dni/") -> None:
        self.trainer = trainer
        self.prefix = prefix
        nets_of(trainer.model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Compare in the steps that are logged, and in no others."""
        for net in nets_of(self.trainer.model):
            net.diagnosing = state.logging_steps > 0 and (state.global_step + 1) % state.logging_steps == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Log what was found."""
        for net in nets_of(self.trainer.model):
            if net.diagnosing:
                self.trainer.log(net.diagnostics(self.prefix))
                net.diagnosing = False


class SavesTied(transformers.Trainer):
    """A ``transformers.Trainer`` that saves a net whose model ties weights: each tensor once, under its first name.

    The file format of its checkpoints refuses a tensor that has two names, and the net is no ``PreTrainedModel``, of which the
    trainer knows what is tied. When the checkpoint is loaded, the second names are reached through the first.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the weights."""
        super()._save(output_dir, once(state_dict if state_dict is not None else self.weights()))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of what a checkpoint lacks, second names aside."""
        whole = self.weights()
        tied = whole.keys() - once(whole).keys()
        load_result.missing_keys[:] = [each for each in load_result.missing_keys if each not in tied]
        super()._issue_warnings_after_load(load_result)

    def weights(self) -> dict[str, Tensor]:
        """Return the state of the model."""
        return {} if self.model is None else self.model.state_dict()


def once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which each tensor stands under its first name alone."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, each in state.items():
        place = (each.device, each.data_ptr(), each.dtype, each.shape, each.stride())
        if each.numel() == 0 or place not in seen:
            kept[name] = each
        seen.add(place)
    return kept
