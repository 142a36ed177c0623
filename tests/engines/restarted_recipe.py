"""A recipe for torchrun: the second process is killed once, after a measurement."""

import os
import signal
import sys

from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from tests.engines import recipe_jobs

FATAL = 6


def main(out: str) -> None:
    whole = Line.point

    def point(self: Line, point: Point, unit: str = "error %") -> None:
        whole(self, point, unit)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and point.step == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)

    Line.point = point  # type: ignore[method-assign]
    found = recipe_jobs.trained("ranks", out)
    if os.environ["RANK"] == "0":
        recipe_jobs.keep(found, f"{out}/found.pickle")


if __name__ == "__main__":
    main(sys.argv[1])
