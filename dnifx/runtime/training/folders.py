"""A trainer's state in a folder, by torch.distributed.checkpoint: each rank writes what it alone keeps up to date.

A save goes to a folder of its own, ``step-12``, which counts once it is whole; the one before stays until then. Each
has the checksums of its files.
"""

import io
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnifx.engines.stopping import KILLED
from dnifx.errors import StateError
from dnifx.runtime.net.absent import hold
from dnifx.runtime.training.checksums import checksums, refuse_damaged, write_checksums
from dnifx.runtime.training.holding import own_tensors
from dnifx.runtime.training.over_ranks import OverRanks, own_state, own_weights, receive_late, spread_over, take_state
from dnifx.runtime.training.saving import DAMAGED, copied, saved, write
from dnifx.runtime.training.shard_files import quiet, room, with_sharded
from dnifx.runtime.training.shard_states import apart
from dnifx.runtime.training.turns import Turn
from dnifx.runtime.training.weights import is_sharded, named_tensors
from dnifx.writing import PART, clear, sync_folder

WHOLE = ".metadata"
"""What torch.distributed.checkpoint writes last."""

NET = "net."
"""How the names of weights begin there."""

KEPT = 2
"""How many saves stay in a folder."""


class InFolders(OverRanks):
    """What a trainer saves to a folder, and how it goes on from there."""

    turn: Turn
    folder: Path | None = None
    """Where the run is saved when a signal comes."""

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save the run to a folder, by torch.distributed.checkpoint. Over ranks every rank calls it, and writes its own part.

        Two saves stay there, with checksums. ``load`` takes the last whole one, on any number of ranks, if all see the folder.

        Raises:
            StateError: The net has several rates, or the folder cannot be written to; earlier saves are whole.
        """
        with self.turn.taken():
            return save(self, Path(folder))

    def load(self, folder: str | os.PathLike[str], missing_ok: bool = False) -> bool:
        """Go on from the last whole save in a folder. Over ranks, every rank calls it, and reads the weights that it holds.

        Args:
            folder: What ``save`` was given.
            missing_ok: Where there is no whole save, change nothing and return False.

        Raises:
            StateError: There is none, or it is damaged, or belongs to another trainer; this one is as it was.
        """
        with self.turn.taken():
            found = last_save(self, Path(folder))
            if found is None and missing_ok:
                return False
            if found is None:
                raise StateError(f"{folder} holds no whole save; give the folder that trainer.save was given")
            self.engine.spread()
            load(self, found)
        self.engine.restart(self.latest)
        self.net.spread = spread_over(self.engine)
        return True

    def save_on_signal(self, folder: str | os.PathLike[str], signals: Sequence[int] = (signal.SIGTERM,)) -> None:
        """When a signal comes, finish the step, save the run to a folder, and leave the script with the code 128 + signal.

        Over ranks every rank calls it. A signal to one rank stops all of them after the same step. ``load`` goes on from there.

        Args:
            folder: Where ``save`` writes.
            signals: The signals, such as SIGTERM, by which schedulers of jobs and torchrun end a process.

        Raises:
            StateError: The net has several rates, the folder cannot be made, or this is not the main thread.
        """
        refuse_rates(self)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"{folder} cannot be made: {error.strerror}; give a folder that can be written to"
            ) from error
        self.folder = Path(folder)
        self.engine.listen(signals, self.steps)

    def stop(self) -> None:
        """Where a signal came that ``save_on_signal`` waits for, save the run and leave. ``step`` does it at its end.

        A loop over ``compute`` and ``advance`` calls it after each step.

        Raises:
            SystemExit: The run was saved.
        """
        number = 0 if self.folder is None else self.engine.stopped(self.steps)
        if self.folder is not None and number:
            self.save(self.folder)
            self.engine.close()
            raise SystemExit(KILLED + number)


def refuse_rates(trainer: OverRanks) -> None:
    """Raise StateError where a net has several rates."""
    if trainer.exchange is not None:
        raise StateError(
            "a net with several rates is not saved to a folder: use torch.save(trainer.state_dict(), path)"
        )


def save(trainer: OverRanks, folder: Path) -> Path:
    """Save a trainer, and return where. Over ranks, every rank calls it; targets that are under way are waited for.

    Of several replicas, whose weights are the same, the first writes these; each writes its late targets and running statistics.

    Raises:
        StateError: The net has several rates, or the folder cannot be written to; earlier saves are whole.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    refuse_rates(trainer)
    ranks = trainer.engine.ranks
    if ranks is not None or trainer.engine.places:
        receive_late(trainer)
    weights = own_weights(trainer)
    own, sharded = apart(own_state(trainer), f"state.{trainer.engine.rank}.")
    sharded |= {f"{NET}{name}": value for name, value in weights.items() if is_sharded(value)}
    (part,) = trainer.parts
    carried = {name: each for name, each in part.state_dict().items() if name not in ("late", "flight", "tied")}
    own["common"] = {"steps": trainer.steps, "schedule": trainer.source.state_dict(), "part": carried}
    engine = trainer.engine
    content: dict[str, Tensor] = {f"{NET}{name}": value for name, value in weights.items()}
    content[f"rank.{engine.rank}"] = packed(own)
    if engine.replica:
        content = {f"replica.{engine.replica}.rank.{engine.rank}": packed(share_of(trainer, own, weights))}
    content |= sharded
    target, draft = folder / f"step-{trainer.steps}", folder / f".step-{trainer.steps}{PART}"
    first = engine.process == 0
    if first:
        clear(folder, "step-*")
    engine.agreed(None)
    failed: BaseException | None = None
    written: dict[str, str] = {}
    try:
        try:
            with quiet():
                save(content, checkpoint_id=draft, no_dist=ranks is None, process_group=engine.group)
            written = checksums([*draft.glob(f"__{engine.process}_*"), *([draft / WHOLE] if first else [])])
        except (OSError, CheckpointException) as error:
            failed = error
        everyone = engine.agreed((written, failed is None))
        if first and all(done for _, done in everyone):
            try:
                write_checksums(draft, {name: each for known, _ in everyone for name, each in known.items()})
                shutil.rmtree(target, ignore_errors=True)
                draft.rename(target)
                sync_folder(folder)
            except OSError as error:
                failed = error
    finally:
        if first:
            shutil.rmtree(draft, ignore_errors=True)
    if isinstance(failed, CheckpointException) and any(
        isinstance(each, KeyboardInterrupt) for each, _ in failed.failures.values()
    ):
        raise KeyboardInterrupt from failed
    reason = next(filter(None, engine.agreed("" if failed is None else told(failed))), "")
    if reason:
        raise StateError(
            f"{target} cannot be written: {reason}. The saves before it are whole; make room, or give a folder that can be written to"
        ) from failed
    if first:
        for old in saves(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def share_of(trainer: OverRanks, own: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a replica alone has of its share of the batches: what is late, sums of gradients, and running statistics."""
    buffers = {name for name, _ in trainer.net.named_buffers()}
    kept = {name: value for name, value in weights.items() if name in buffers}
    return {"late": own["late"], "flight": own["flight"], "updates": own["updates"], "buffers": kept}


def told(error: BaseException) -> str:
    """Return the last line of what an error says; that of a rank holds a traceback."""
    return (str(error).strip().splitlines() or [""])[-1][:200]


def last_save(trainer: OverRanks, folder: Path) -> Path | None:
    """Return the last whole save that every rank sees in a folder, or None. Over ranks, every rank calls it."""
    seen = trainer.engine.agreed([each.name for each in saves(folder)])
    common = [name for name in seen[0] if all(name in each for each in seen)]
    return folder / common[-1] if common else None


def load(trainer: OverRanks, found: Path) -> None:
    """Go on from a save, made on any number of ranks.

    Raises:
        StateError: It belongs to another trainer; this one is as it was.
    """
    if trainer.holding.shards is not None:
        trainer.holding.shards.divide()
        trainer.net.elsewhere = trainer.holding.elsewhere
    wanted = trainer.holding.own if trainer.net.elsewhere else None
    names = None if wanted is None else trainer.holding.names
    weights, parts, shapes, shares = read(found, wanted, dict(named_tensors(trainer.net)))
    mine = shares.get(trainer.engine.replica)  # further replicas begin with what the first has
    try:
        before = copied(saved(trainer), ["net", *trainer.groups])  # type: ignore[arg-type]
    except StateError:  # weights of other ranks, which this rank does not use
        before = None
    try:
        check(trainer, shapes, parts, found)
        parts, mine = with_sharded(trainer.groups, trainer.updates, found, (parts, mine), names)
        take(trainer, weights, parts, mine, names)
    except BaseException as error:
        if before is not None:
            write(trainer, before)  # type: ignore[arg-type]
        if isinstance(error, DAMAGED):
            raise StateError(
                f"{found} does not fit this trainer: {type(error).__name__}: {error}. Make the trainer with the same model, cuts and "
                "optimizers"
            ) from error
        raise


def saves(folder: Path) -> list[Path]:
    """Return the whole saves in a folder, the last one last."""
    whole = [each for each in folder.glob("step-*") if re.fullmatch(r"step-\d+", each.name) and (each / WHOLE).exists()]
    return sorted(whole, key=lambda each: int(each.name.removeprefix("step-")))


def packed(state: Any) -> Tensor:
    """Return a state as bytes."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


Read = tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, torch.Size], dict[int, list[dict[str, Any]]]]


def unpacked(content: Tensor) -> Any:
    """Return a state from its bytes."""
    return torch.load(io.BytesIO(bytes(content.numpy())), map_location="cpu", weights_only=True)


def read(path: Path, wanted: Set[str] | None, tensors: Mapping[str, Tensor]) -> Read:
    """Return the wanted weights of a save by name, what each rank saved beside them, and the shapes of all weights.

    The last value is what the ranks of each replica but the first saved.

    Args:
        path: Where it is.
        wanted: Names of weights; None for all.
        tensors: Those of this process, by name. Of those that are sharded, its shares alone are read.

    Raises:
        StateError: It is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        refuse_damaged(path)
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        content: dict[str, Any] = {
            name: room(each, tensors.get(name.removeprefix(NET)))
            for name, each in known.items()
            if isinstance(each, TensorStorageMetadata) and not name.startswith("state.")
            if wanted is None or not name.startswith(NET) or name.removeprefix(NET) in wanted
        }
        shapes = {
            name.removeprefix(NET): each.size
            for name, each in known.items()
            if isinstance(each, TensorStorageMetadata) and name.startswith(NET)
        }
        with quiet():
            load(content, checkpoint_id=path, no_dist=True)
        parts = [unpacked(value) for name, value in content.items() if name.startswith("rank.")]
        shares: dict[int, list[dict[str, Any]]] = {}
        for name, value in content.items():
            if name.startswith("replica."):
                shares.setdefault(int(name.split(".")[1]), []).append(unpacked(value))
    except (Exception, CheckpointException) as error:
        raise StateError(
            f"{path} cannot be read: {type(error).__name__}: {told(error)}; remove it, to go on from the save before"
        ) from error
    weights = {name.removeprefix(NET): value for name, value in content.items() if name.startswith(NET)}
    return weights, parts, shapes, shares


def check(trainer: OverRanks, shapes: Mapping[str, torch.Size], parts: list[dict[str, Any]], path: Path) -> None:
    """Raise StateError where a save is of another trainer."""
    own = {name: value.shape for name, value in own_tensors(trainer.net, (0,) * len(trainer.net.partitions), 0)}
    other = sorted(name for name in {*own, *shapes} if name not in shapes or own.get(name) != shapes[name])
    groups = {group: {name for each in parts for name in each["groups"][group]} for group in trainer.groups}
    lacking = [group for group, items in trainer.groups.items() if {*items} != groups[group]]
    if other or lacking:
        what = f"the weights {', '.join(other[:3])}" if other else f"the {lacking[0]}"
        raise StateError(
            f"{path} differs from this trainer in {what}; make it with the same model, cuts and optimizers"
        )


def take(
    trainer: OverRanks,
    weights: dict[str, Tensor],
    parts: list[dict[str, Any]],
    shares: list[dict[str, Any]] | None,
    names: Set[str] | None,
) -> None:
    """Take up what all ranks saved, and what those of this replica did; with ``names``, states of optimizers of these names alone."""
    (part,) = trainer.parts
    common = parts[0]["common"]
    flight: dict[str, dict[str, Any]] = {"passages": {}, "gradients": {}}
    late: dict[str, Any] = {}
    tied: dict[str, dict[str, Any]] = {"now": {}, "due": {}}
    for each in parts:
        for group, values in tied.items():
            values.update(each.get("tied", {}).get(group, {}))
    for each in shares or parts:
        for group, found in flight.items():
            found.update(each["flight"][group])
        late.update(each["late"])
    part.load_state_dict({**common["part"], "late": late, "flight": flight, "tied": tied})
    tensors = dict(named_tensors(trainer.net))
    weights |= {name: value for each in shares or () for name, value in each["buffers"].items() if name in weights}
    with torch.no_grad():
        for name, value in weights.items():
            hold(tensors[name])  # states of optimizers go to the devices of weights
            tensors[name].copy_(value)
    for update in trainer.updates.values():
        update.load_state_dict({"count": 0, "sums": {}})
    sums = {name: each for share in shares or () for name, each in share["updates"].items()}
    for each in parts:
        each["updates"] |= sums
        nothing: dict[str, Any] = {
            "late": {},
            "flight": {"passages": {}, "gradients": {}},
            "tied": {"now": {}, "due": {}},
        }
        take_state(trainer, {**each, **nothing}, names)
    if names is None:
        trainer.net.elsewhere = ""
    trainer.holding.blank = False
    trainer.source.load_state_dict(common["schedule"])
    trainer.steps = common["steps"]
