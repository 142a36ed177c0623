"""How a net shows itself: as text, as a picture, as a page, in a notebook."""

import os
from html import escape
from typing import Any

from dnifx.runtime.net.stand_in import StandIn


class Shown(StandIn):
    """A net that can be looked at."""

    def to_svg(self, code: str | os.PathLike[str] | None = None) -> str:
        """Return a picture of the net as SVG: partitions, cuts, estimators, and the way of their gradients.

        Args:
            code: The ``model.py`` of a folder that ``to_folder`` wrote; each box then links to its first line there.
        """
        return self.emitters.svg(self.program, code)

    def to_html(self, schedule: Any = None) -> str:
        """Return one HTML file: modules unfold, a click shows shapes, cost and code, and a schedule plays.

        Args:
            schedule: The schedule that it plays, as in ``trainer``; by default the net's own, beside backpropagation.
        """
        return self.emitters.html(self, schedule)

    def _repr_svg_(self) -> str:
        """Draw the net in a notebook."""
        return self.to_svg()

    def _repr_html_(self) -> str:
        """Draw the net in a notebook, with the report below."""
        return f'<div style="overflow-x:auto">{self.to_svg()}</div><details><pre>{escape(str(self))}</pre></details>'

    def __str__(self) -> str:
        return self.emitters.report(self.program)

    def __rich__(self) -> Any:
        return self.emitters.rich(self.program)
