"""A script for torchrun: it saves, a rank is killed once, and what torchrun starts anew goes on from the last save."""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.engines import jobs

STEPS, FATAL = 12, 7


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = jobs.chain().trainer(jobs.adam, places="ranks", lag=2)
    trainer.load(folder / "saves", missing_ok=True)
    trainer.save_on_signal(folder / "saves")
    begun = trainer.steps
    for x, y in jobs.batches(STEPS)[begun:]:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.steps == FATAL and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.step(x, target=y)
        if trainer.steps % 3 == 0:
            trainer.save(folder / "saves")
    trainer.collect()
    if os.environ["RANK"] == "0":
        torch.save({"begun": begun, "net": trainer.net.state_dict()}, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
