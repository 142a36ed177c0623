"""A run of a recipe that is killed several times, and started again each time until it ends by itself."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dnifx.writing import PART
from tests.kills.comparing import PREVIOUS, differences, files
from tests.kills.deaths import ERROR, Death, after_time, at_call, full_disk, in_write, on_writing
from tests.kills.disks import small_disk
from tests.kills.processes import ended

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS = 6
"""How often a run is killed at most before it may end."""
SMALL = 0.25
"""Share of the runs that write to a small file system."""
ROOM = 1 << 16
"""What a run needs on its disk before it starts, in bytes."""

Job = Callable[[Path], object]
"""Runs something whose output goes to a folder."""


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed.

    Attributes:
        out: Its output.
        seconds: How long it took.
        calls: How many calls wrote.
        size: How many bytes it wrote.
    """

    out: Path
    seconds: float
    calls: int
    size: int


@dataclass
class Trial:
    """What became of one run.

    Attributes:
        seed: The number from which it is drawn.
        name: The job.
        deaths: The deaths that it died, in words.
        kinds: How many of each kind.
        wrong: What is wrong, in words.
    """

    seed: int
    name: str
    deaths: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}, seed {self.seed}", *(f"  {death}" for death in self.deaths)]
        return "\n".join([*lines, *(f"  wrong: {text}" for text in self.wrong)])


class Trials:
    """Draws trials of some jobs.

    Args:
        folder: Where to write.
        jobs: The jobs, by name.
        small: Whether some may write to a small file system.
    """

    def __init__(self, folder: Path, jobs: Mapping[str, Job], small: bool) -> None:
        self._folder, self._jobs, self._small = folder, jobs, small
        self._whole: dict[str, Whole] = {}

    def run(self, seed: int) -> Trial:
        """Run the trial of a number: draw a job, kill it several times, let it end, and compare it."""
        drawn = random.Random(seed)
        trial = Trial(seed, drawn.choice(list(self._jobs)))
        place = self._folder / "disk"
        if self._small and drawn.random() < SMALL:
            with small_disk(place):
                self._run(trial, drawn, place / "out", place)
        else:
            place.mkdir(exist_ok=True)
            self._run(trial, drawn, place / "out", None)
            shutil.rmtree(place)
        return trial

    def _run(self, trial: Trial, drawn: random.Random, out: Path, disk: Path | None) -> None:
        whole = self.whole(trial.name)
        for _ in range(KILLS):
            death = draw(drawn, whole, disk)
            status, errors = ended(lambda: self._jobs[trial.name](out), death)
            death.relieve()
            if not status:
                errors = ""  # it ended before its death; Python tells of a Ctrl-C where it cannot be raised
                break
            trial.deaths.append(str(death))
            trial.kinds[death.kind] += 1
            trial.wrong += unlike(death, status, errors)
            if status == ERROR:
                trial.wrong += [f"{name} is left by an error" for name in sorted(files(out)) if name.endswith(PART)]
        else:
            status, errors = ended(lambda: self._jobs[trial.name](out))
        if status or errors:
            trial.wrong.append(f"the last run ended with {status}: {errors}")
        trial.wrong += wrong_with(self._jobs[trial.name], out, whole.out)

    def whole(self, name: str) -> Whole:
        """Return the run of a job that nobody killed, made once.

        Raises:
            RuntimeError: It does not end by itself.
        """
        if name not in self._whole:
            out, calls = self._folder / "whole" / name, self._folder / "calls"
            out.parent.mkdir(exist_ok=True)
            begin = time.perf_counter()
            status, errors = ended(lambda: _counted(self._jobs[name], out, calls))
            seconds = time.perf_counter() - begin
            if status:
                raise RuntimeError(f"{name} ends with {status} though nobody kills it: {errors}")
            size = sum((out / each).stat().st_size for each in files(out))
            self._whole[name] = Whole(out, seconds, calls.stat().st_size, size)
        return self._whole[name]


def _counted(job: Job, out: Path, calls: Path) -> None:
    """Run a job and write a byte for each call that writes."""
    with calls.open("wb", buffering=0) as file:

        def call(number: int, own: Callable[[], object]) -> object:
            file.write(b".")
            return own()

        on_writing(call)
        job(out)


def wrong_with(job: Job, out: Path, whole: Path) -> list[str]:
    """Tell in words what is wrong with a run that ended.

    Where only the checkpoints before the last differ, since a stop was saved at another step, the run goes on from them too.

    Args:
        job: The job.
        out: Its output, which the run from these checkpoints writes anew.
        whole: The output of the run that nobody killed.
    """
    wrong = [*differences(out, whole, previous=False)]
    if wrong or not any(differences(out, whole)):
        return wrong
    for path in [*out.rglob(f"*{PREVIOUS}")]:
        path.replace(path.with_suffix(""))
    status, errors = ended(lambda: job(out))
    wrong += [f"the run from the checkpoints before the last ended with {status}: {errors}"] if status else []
    return wrong + [f"from the checkpoint before, {each}" for each in differences(out, whole, previous=False)]


def draw(drawn: random.Random, whole: Whole, disk: Path | None) -> Death:
    """Draw a way to die."""
    sent, number = drawn.choice(SIGNALS), drawn.randrange(whole.calls)
    ways: list[Death] = [
        after_time(sent, drawn.uniform(0, whole.seconds)),
        at_call(sent, number, drawn.random() < 0.5),
        in_write(number, int(2 ** drawn.uniform(0, 17)), drawn.random() < 0.5),
    ]
    if disk is not None:
        ways.append(full_disk(disk, drawn.randrange(whole.size + ROOM)))
    return drawn.choice(ways)


def unlike(death: Death, status: int, errors: str) -> Iterator[str]:
    """Tell in words where a process did not end as its death says."""
    if not death.fits(status, errors):
        yield f"{death}: it ended with {status}: {errors}"
