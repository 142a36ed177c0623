"""The decoupled module: the user's model with interfaces, to be used in anybody's training loop."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils import _pytree as pytree

from dnifx.engines.processes import replicas_alone
from dnifx.errors import ContextError, DnifxError, DnifxWarning, EstimatorError, InputError, LossError, StateError
from dnifx.ir import Boundary
from dnifx.runtime.emitted.compiling import outside_graphs
from dnifx.runtime.emitted.ends import tell_losses
from dnifx.runtime.emitted.fitting import losses_of
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.emitted.recording import recording
from dnifx.runtime.net.arguments import model_keywords, takes
from dnifx.runtime.net.input_kinds import InputKind
from dnifx.runtime.net.labels import Labels, check_examples
from dnifx.runtime.net.refused_inputs import explaining, refuse_inputs
from dnifx.runtime.net.showing import Shown
from dnifx.runtime.net.states import refuse_without_trainer, with_first_states, with_own_tensors, without_episodes
from dnifx.runtime.net.undo import Undo
from dnifx.runtime.training.optimizers import OptimizerSpec, SchedulerSpec
from dnifx.runtime.training.over_ranks import refuse_elsewhere
from dnifx.runtime.training.own_losses import OwnLosses
from dnifx.runtime.training.replicas import Replicas
from dnifx.runtime.training.scaling import scaling_of
from dnifx.runtime.training.trainer import Trainer
from dnifx.runtime.training.updates import Clip, Penalty, UpdateOptions

EXTRA_STATE = "_extra_state"
"""The name under which torch saves what a module's ``get_extra_state`` gives."""


class DecoupledModule(Shown):
    """A model with a Decoupled Neural Interface on every cut; call it as you call the model.

    Outside ``torch.no_grad()`` the fused graph runs: same output, and in the backward pass every cut gives its producer the
    synthetic gradient and its estimator the target. Under ``torch.no_grad()`` and in ``backprop()`` the original model runs.
    It also runs in evaluation mode where there are synthetic inputs, which serve training alone, or where (with a warning)
    the evaluation cannot be captured or cut. Where a draw decides what the model does, a warning says so if an outcome cannot
    be cut: calls with that outcome run the original model too.

    What the net has not itself, such as ``config`` or ``generate``, it takes from the model, ``net.original``.
    """

    accepts_loss_kwargs = False
    """Lets ``transformers.Trainer`` divide a mean loss for accumulation, which the net sees, rather than the model by the number of
    items in all micro-batches, which it cannot."""

    straight: bool = False
    """Whether gradients are those of backpropagation, as ``backprop`` says."""

    @contextmanager
    def backprop(self) -> Iterator[None]:
        """Let calls of the module run the original model, so that the true gradient passes all cuts.

        It can be differentiated again, as a gradient penalty or a model of forces does with ``create_graph=True``. Estimators
        learn nothing from these calls. Training steps of a trainer are as ever.
        """
        before, self.straight = self.straight, True
        try:
            yield
        finally:
            self.straight = before

    def forward(
        self,
        *args: Any,
        context: Any = None,
        target: Any = None,
        reset: Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Any:
        """Run the model.

        Args:
            *args: As the model takes them.
            context: What estimators may see, such as labels [batch]; needed where gradients are recorded.
            target: What the loss compares the output with, where estimators predict the loss (``Critic``, ``Sobolev``): the
                module computes its own ``loss=`` once more for them, without a gradient.
            reset: Where states are cut in time, which examples begin an episode, [batch] and boolean: they start from zero.
            kwargs: Keyword arguments of the model, by name. An argument of the model that is called ``context``, ``target``,
                ``reset`` or ``kwargs`` belongs here where the net takes that name for itself.
            **named: Keyword arguments of the model.

        Raises:
            ContextError: There is a context and it was not given, or the other way round.
            InputError: The structure of the inputs is not that of the example.
            EstimatorError: An estimator needs what only a training step sees.
        """
        if self.program.context is None and context is not None:
            named["context"] = context
        if reset is not None and not self.recurrences:
            named["reset"] = reset
        bare = self.straight or not torch.is_grad_enabled()
        own = self.foresees or self.compares
        if target is not None and (
            not own or (bare and "target" not in (kwargs or {}) and takes(self.original, "target"))
        ):
            named["target"] = target
        kwargs = model_keywords(named, kwargs)
        blind = self.blind()
        refuse_elsewhere(self, runs=True)
        if bare or ((self.imagines or self.foresees or self.compares or blind) and not self.training):
            args, kwargs = without_episodes(self.program, args, kwargs, reset)
            return self.original(*args, **kwargs)
        if blind is not None:
            raise EstimatorError(
                f"the estimator of boundary {blind.name!r} needs what this forward does not see: the loss, the output's error, or "
                "gradients of earlier steps. Train with net.trainer(...).step(x, target=y), and evaluate in eval mode or under "
                "torch.no_grad()"
            )
        if self.foresees and (target is None or self.loss is None):
            raise EstimatorError(
                "an estimator of this module predicts the loss, which a forward sees where it knows the target: decouple with loss= and "
                "call net(x, context=y, target=y), or train with net.trainer(...).step(x, target=y); evaluate in eval mode or under "
                "torch.no_grad()"
            )
        seen: tuple[Any, ...] = ()
        if self.program.context is not None:
            if context is None:
                raise ContextError(
                    f"the estimators of this module see a context ({self.program.context.description}); call it as net(x, context=...), "
                    "or under torch.no_grad() for evaluation"
                )
            features = self.program.context.features
            if isinstance(features, Labels) and not torch.compiler.is_compiling():
                features.check(context)
                check_examples(context, tuple(pytree.tree_leaves((args, kwargs))), self.program)
            seen = (context if self.program.context.classes is not None else self.program.context.features(context),)
        if self.compares:
            if target is None:
                raise EstimatorError(
                    "a suffix compares its output with the target: call net(x, target=y), or train with "
                    "net.trainer(...).step(x, target=y); evaluate in eval mode or under torch.no_grad()"
                )
            seen = (*seen, target)
        if self.recurrences:
            refuse_without_trainer(self.program)
            seen = (*seen, reset)
            if not torch.compiler.is_compiling():
                args, kwargs = with_first_states(self.program, args, kwargs)
                args, kwargs = with_own_tensors(self.program, args, kwargs)
        seen = (*seen, self._scale.compiled() if torch.compiler.is_compiling() else self._scale)
        if not torch.compiler.is_compiling():
            self._watch.called()
        if self.training or torch.compiler.is_compiling():
            return self.run(args, kwargs, seen, target)
        return self.evaluate(args, kwargs, seen, reset)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: tuple[Any, ...], reset: Tensor | None
    ) -> Any:
        """Run in evaluation mode: the model itself, where its evaluation cannot be captured, or not be cut as in training."""
        signature = self.program.signature
        key = None if signature is None else signature.key(args, kwargs)
        if key not in self.uncut:
            try:
                return self.run(args, kwargs, seen)
            except DnifxError as error:
                self.uncut.add(key)
                warnings.warn(
                    f"in this mode {type(self.original).__name__} runs without its interfaces, and gradients are backpropagation's; "
                    f"to train it in evaluation mode, decouple it in that mode: {error}",
                    DnifxWarning,
                    stacklevel=4,
                )
        args, kwargs = without_episodes(self.program, args, kwargs, reset)
        return self.original(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: tuple[Any, ...], target: Any = None) -> Any:
        """Run the fused graph of the input kind that a call is in; ``seen`` is what its estimators see beside the inputs.

        Raises:
            InputError: No graph holds for these inputs, and the cuts cannot be found again in a new one.
            CutError: The same.
        """
        if torch.compiler.is_compiling():
            return self.run_compiled(args, kwargs, seen, target)
        for input_kind in self.whole.matching(args, kwargs):
            inputs = (*input_kind.signature.flatten(args, kwargs), *seen)
            if self.training:
                refuse_inputs(input_kind.program, input_kind.signature.inputs, inputs)
            if not input_kind.guarded:
                with explaining(input_kind.program, input_kind.signature.inputs, inputs):
                    return self.answer(input_kind, inputs, target)
            written = (inputs[position] for position in input_kind.written)
            before = Undo(self, written, self.whole.attributes)
            try:
                with explaining(input_kind.program, input_kind.signature.inputs, inputs):
                    return self.answer(input_kind, inputs, target)
            except GuardError:
                before.restore()
        if not self.whole.steered:
            raise InputError("no captured graph holds for these inputs")
        args, kwargs = without_episodes(self.program, args, kwargs, None)
        return self.original(*args, **kwargs)

    def run_compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: tuple[Any, ...], target: Any) -> Any:
        """Run a fused graph under ``torch.compile``. A call of a new kind runs outside of compiled graphs, which captures it."""
        for input_kind in self.whole.input_kinds:
            if input_kind.guards_sizes_alone and input_kind.signature.key(args, kwargs) == input_kind.key:
                try:
                    return self.answer(input_kind, (*input_kind.signature.flatten(args, kwargs), *seen), target)
                except GuardError:  # while it was traced: nothing has run
                    pass
        return run_outside_graphs(self, args, kwargs, seen, target)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what the module itself holds, and the extra state of the model, whose place it takes."""
        refuse_elsewhere(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if has_extra_state(self.original):
            destination[prefix + EXTRA_STATE] = self.original.get_extra_state()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        """Load what the module itself holds, and the extra state of the model."""
        given = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*given)
        key = prefix + EXTRA_STATE
        if not has_extra_state(self.original):
            return
        if key in state_dict:
            self.original.set_extra_state(state_dict[key])
            unexpected_keys[:] = [each for each in unexpected_keys if each != key]
        elif strict:
            missing_keys.append(key)

    def answer(self, input_kind: InputKind, inputs: tuple[Any, ...], target: Any) -> Any:
        """Run the fused graph; tell estimators that predict the loss what it is."""
        if self.diagnosing and not torch.compiler.is_compiling():
            with recording(self.recorder):
                made = input_kind.fused(*inputs)
        else:
            made = input_kind.fused(*inputs)
        if not self.foresees or self.loss is None:
            return input_kind.finish(made)
        outputs, predictions = made
        with torch.no_grad():
            loss = self.loss(input_kind.signature.unflatten(outputs), target)
        losses = losses_of(loss, len(predictions[0]), self.mean)
        return input_kind.finish(tell_losses(outputs, predictions, losses, self._scale))

    @property
    def foresees(self) -> bool:
        """Whether an estimator predicts the loss, and a forward can be told it."""
        return len(self.recurrences) == 0 and any(each.needs_loss for each in self.program.interfaces)

    @property
    def compares(self) -> bool:
        """Whether a suffix compares its output with the target."""
        return any(each.needs_answer for each in self.program.interfaces)

    def blind(self) -> Boundary | None:
        """Return the first boundary whose estimator needs what the fused graph does not see."""
        interfaces, windows = self.program.interfaces, bool(self.recurrences)
        return next((each for each in self.boundaries if interfaces[each.index].scheduled_only(windows)), None)

    def train(self, mode: bool = True) -> "DecoupledModule":
        """Set training mode here and on the original model, which shares all children."""
        super().train(mode)
        self.original.training = mode
        return self

    @property
    def code(self) -> str:
        """The program as readable Python: the fused forward, every partition, and one training step; so for each part."""
        texts = [self.emitters.code(each.program, each.mean) for each in self.parts]
        if len(texts) == 1:
            return texts[0]
        pairs = zip(self.parts, texts, strict=True)
        return "\n\n".join(f"# every {each.part.every}: one firing\n{text}" for each, text in pairs)

    def to_folder(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a Python package that imports torch alone: model, interfaces, training step and weights.

        Args:
            path: The folder to make; written beside it first, and moved when it is whole.
            overwrite: Replace a folder that is there.
        """
        self.emitters.folder(self, path, overwrite)

    def trainer(
        self,
        optimizer: OptimizerSpec,
        schedule: Any = "sequential",
        *,
        lr_scheduler: SchedulerSpec | None = None,
        estimator_optimizer: OptimizerSpec | None = None,
        lag: int | Literal["auto"] = 0,
        tied_lag: int | None = None,
        own_losses: OwnLosses | None = None,
        clip: Clip | None = None,
        accumulate: int = 1,
        replicas: Replicas | None = None,
        penalty: Penalty | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        autocast: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        places: Any = None,
        timeout: float = 600.0,
        engine: Literal["cuda-graph"] | None = None,
        mesh: Any = None,
    ) -> Trainer:
        """Return a trainer: one optimizer a partition, driven by an explicit schedule.

        Args:
            optimizer: From parameters to an optimizer, for all partitions, or a mapping from every partition's name. The
                parameters are a list, and ``parameters.named`` are their pairs of name and parameter. A list of optimizers
                stands for one, each for some of the parameters.
            schedule: A name, a text of actions, a Schedule or a source of schedules (``dnifx.schedules``). With several
                rates: ``"sequential"``, a ``dnifx.schedules.Period``, or its text, the windows with bars between.
            lr_scheduler: From an optimizer to a learning-rate scheduler, or a mapping. It is stepped whenever the part of
                its optimizer fires: after every step, where the net has no rates.
            estimator_optimizer: As ``optimizer``, for the estimators by boundary name; by default what ``dnifx.decouple`` was
                given, else the same callable.
            lag: Estimators are fitted to the targets of so many steps ago, so that partitions in other places need not be waited
                for. In the first ``lag`` steps they are not fitted. Over ranks, ``"auto"`` chooses by what it measures.
            tied_lag: Partitions that share a parameter with a later one, which updates it, read what it was so many steps ago. By default
                as many as ``lag``, or 0 where one of them waits for a true gradient in every step. With 0, places wait for each other.
            own_losses: Weights of scalars that forward leaves on the model, by attribute or glob: ``{"blocks.*.balance": 0.01}``.
                The partition that makes one adds its gradient, times the weight, to its own backward pass; leave it out of
                ``loss=``. None stands for something with a gradient that no loss reads.
            clip: The largest norm that the gradient of a partition may have: each is clipped by its own norm, since it does not wait
                for the others. Or a callable that is given a partition's parameters and changes their gradients.
            accumulate: How many steps make one update, of the mean of their gradients. Estimators learn likewise.
            replicas: Where ``torch.distributed`` runs several processes: ``"average"`` begins with the weights of process 0 and averages
                gradients; ``"shard"`` does so too, each with a share of weights and optimizers, by FSDP2; ``"apart"`` trains a net in each.
            penalty: From the parameters of a partition, by name in the net, to a scalar. Its gradient is added in every update of
                the partition. A penalty inside ``loss=`` would reach the last partition alone, and is refused.
            on_nonfinite: An update whose gradient is not finite is not made, and the running averages of its partition or estimator
                go back. ``"raise"``: then the step breaks off with an error. ``"skip"``: it goes on, and ``result.skipped`` names what
                was not updated. On a GPU no step breaks off, since that would have to wait for the device.
            autocast: What partitions, estimators and the loss are cast to under autocast, ``torch.bfloat16`` or ``torch.float16``.
                Backward passes and updates are outside it.
            scaler: A ``torch.amp.GradScaler`` for float16. Gradients are those of the loss times its scale, and are divided before
                they are clipped and applied. An update whose gradient became too large is left out, and the scale falls.
            places: ``"ranks"`` runs the partitions over the processes that torchrun started, balanced by cost; or the rank of each, in
                order or by name. Or devices of this process, and streams: ``["cuda:0", "cuda:1/2"]``, balanced, or one for each.
            timeout: Over ranks, seconds after which a rank that says nothing counts as gone.
            engine: ``"cuda-graph"`` records the whole step as one CUDA graph and replays it. Python runs while a step is recorded, once
                for each kind of batch, schedule and learning rate, and what it reads then stays.
            mesh: With ``places="ranks"``, a ``DeviceMesh`` of all processes, replicas by places. Each row runs the whole net over its
                processes, on a share of the batch of its own; processes of a column have the same partitions and average gradients.

        Raises:
            ScheduleError: The schedule is not valid, or an estimator cannot be fitted late.
            PlaceError: There are no processes, or the partitions cannot run on these ranks or devices.
            LossError: The module was made without ``loss=``, a partition before the last leaves something with a gradient that
                ``own_losses`` does not name, or it names something else.
            ContextError: Estimators see a context, and a part that sends messages has no loss, and so no target.
            OptimizerError: The mapping does not cover the partitions exactly, an optimizer does not hold exactly the parameters
                that it was given, or there are several processes and ``replicas=`` does not say what they do.
        """
        if not self.losses:
            raise LossError(
                "a trainer needs a loss: give dnifx.decouple(..., loss=...) a callable (output, target) -> scalar or one loss an example"
            )
        if self.spread:
            raise StateError(self.spread)
        if replicas == "shard":
            places, mesh = replicas_alone(places, mesh, engine)
        lags = self.emitters.lag(lag, places, schedule, self.program, mesh), tied_lag
        runs = self.emitters.engine(engine, places, schedule, self.program, lags, timeout, mesh)
        source = self.emitters.schedule(schedule, self.program, lags, runs)
        scaling = scaling_of(scaler, self, runs.ranks or runs.places)
        options = UpdateOptions(clip, accumulate, None, on_nonfinite, penalty, scaling, autocast)
        return Trainer(
            self, optimizer, source, lr_scheduler, estimator_optimizer, own_losses or {}, options, replicas, runs
        )


@outside_graphs(
    "this call differs from those that were captured in a fixed value, a mode, an attribute or autocast; or Python reads values in forward"
)
def run_outside_graphs(net: DecoupledModule, *given: Any) -> Any:
    """Run a net as if it were not compiled."""
    return net.run(*given)


def has_extra_state(model: nn.Module) -> bool:
    """Whether a model saves more than its parameters and buffers."""
    return type(model).get_extra_state is not nn.Module.get_extra_state
