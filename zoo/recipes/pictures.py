"""Pictures of results, drawn by matplotlib, which is asked for only when there is something to draw."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dnifx.errors import DataError
from dnifx.zoo.recipes.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float]) -> Iterator["Figure"]:
    """Give an empty figure to draw on, and write it whole when the block ends.

    Args:
        path: The picture, a PNG.
        title: Written above it.
        size: Width and height, in inches.

    Raises:
        DataError: Where matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{path.name} needs matplotlib, which is absent: pip install 'dnifx[zoo]'") from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
