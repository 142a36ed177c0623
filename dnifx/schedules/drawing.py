"""A schedule as a picture: partitions down, time across."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from dnifx.ir import BAR, Action, Kind, Period, Program, Schedule
from dnifx.schedules.dependencies import Links, answers_by_order, links, needs
from dnifx.schedules.language import on_partition, unplaced

PLAIN_WIDTH = 100
_STYLES = {
    Kind.FORWARD: "cyan",
    Kind.INPUT: "bright_cyan",
    Kind.SYNTHESISE: "magenta",
    Kind.BACKWARD: "green",
    Kind.UPDATE: "bold yellow",
    Kind.TARGET: "blue",
    Kind.FIT: "bright_magenta",
}


@dataclass(frozen=True)
class Cell:
    """One action in the picture.

    Attributes:
        action: The action, without its place.
        row: Number of its row.
        slot: Number of its column.
        marked: Whether it is the one that is wrong.
    """

    action: Action
    row: int
    slot: int
    marked: bool = False

    @property
    def text(self) -> str:
        """What the cell shows; a wrong action stands in brackets."""
        return f"[{self.action}]" if self.marked else f" {self.action} "


@dataclass(frozen=True)
class Grid:
    """A schedule as partitions by time, for rich and as plain text (``str``).

    One column is one action's time on every device and stream, whatever it costs; ``simulate`` tells what it costs.
    Actions of boundaries stand with the partition that produces their values; what it does at several places has
    several rows. Rows in which nothing happens are left out.

    Attributes:
        title: What is shown.
        rows: Name of each row.
        cells: The actions.
        bars: Numbers of the columns in which one window of a period ends and the next begins.
    """

    title: str
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    bars: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return self.plain(PLAIN_WIDTH)

    def plain(self, width: int) -> str:
        """Return the picture as text of at most ``width`` characters a line, in as many blocks as that takes."""
        return self.drawn(width).plain

    def around(self, slot: int, reach: int = 8) -> "Grid":
        """Return the part of the picture that is at most ``reach`` columns from ``slot``."""
        near = tuple(cell for cell in self.cells if abs(cell.slot - slot) <= reach)
        return Grid(self.title, self.rows, near, self.bars)

    def drawn(self, width: int) -> Text:
        """Return the picture as styled text of at most ``width`` characters a line."""
        first = max([4, *map(len, self.rows)]) + 1
        cell = max([4, *(len(cell.text) for cell in self.cells)])
        blocks = [self._block(slots, first, cell) for slots in self._slots(max(1, (width - first) // cell))]
        return Text("\n").join([Text(self.title, style="bold"), *blocks])

    def _slots(self, count: int) -> Iterator[range]:
        if self.cells:
            start, stop = min(cell.slot for cell in self.cells), max(cell.slot for cell in self.cells) + 1
            yield from (range(left, min(left + count, stop)) for left in range(start, stop, count))

    def _block(self, slots: range, first: int, width: int) -> Text:
        here = {(cell.row, cell.slot): cell for cell in self.cells if cell.slot in slots}
        shown = sorted({row for row, _ in here})
        times = ("" if slot in self.bars else f"{slot} " for slot in slots)
        head = Text("time".ljust(first) + "".join(time.rjust(width) for time in times).rstrip(), style="dim")
        bars = [slot in self.bars for slot in slots]
        lines = [_line(self.rows[row], [here.get((row, slot)) for slot in slots], bars, first, width) for row in shown]
        return Text("\n").join([head, *lines])

    def __rich__(self) -> RenderableType:
        return _Fitted(self)


@dataclass(frozen=True)
class _Fitted:
    """The picture at the width of the console it is printed on."""

    grid: Grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.grid.drawn(options.max_width)


def _line(name: str, cells: Sequence[Cell | None], bars: Sequence[bool], first: int, width: int) -> Text:
    line = Text(name.ljust(first), no_wrap=True)
    for cell, bar in zip(cells, bars, strict=True):
        style = "" if cell is None else "bold white on red" if cell.marked else _STYLES[cell.action.kind]
        text = (f"{BAR} " if bar else "") if cell is None else cell.text
        line.append(" " * (width - len(text)))
        line.append(text, style=style)
    line.rstrip()
    return line


def grid(schedule: Schedule | Period, program: Program) -> Grid:
    """Return a schedule as partitions by time, to be printed by rich or as text.

    Actions of one device and stream stand one after the other; those of others may stand above each other, as soon as
    what they need is there. Windows of a period stand one after the other.

    Args:
        schedule: A schedule of the program, or a period of such; it need not be valid.
        program: The program.
    """
    if isinstance(schedule, Schedule):
        return marked_grid(schedule, program, None)
    wholes = [marked_grid(window, program, None) for window in schedule.windows]
    rows = tuple(sorted({row for whole in wholes for row in whole.rows}))
    cells: list[Cell] = []
    bars: list[int] = []
    for whole in wholes:
        start = bars[-1] + 1 if bars else 0
        moved = [Cell(each.action, rows.index(whole.rows[each.row]), each.slot + start) for each in whole.cells]
        cells += moved
        bars.append(max((each.slot for each in moved), default=start) + 1)
    title = f"{schedule.name}: {len(cells)} actions in {len(wholes)} window{'s' if len(wholes) > 1 else ''}"
    return Grid(title, rows, tuple(cells), frozenset(bars[:-1]))


def marked_grid(schedule: Schedule, program: Program, wrong: int | None) -> Grid:
    """Return the grid with the action at position ``wrong`` marked."""
    wiring = links(program)
    slots = _columns(schedule, program, wiring)
    keys = [_row(action, wiring) for action in schedule.actions]
    rows = {key: row for row, key in enumerate(sorted(set(keys)))}
    names = [partition.name for partition in program.partitions] + ["?"]
    cells = tuple(
        Cell(unplaced(action), rows[key], slot, place == wrong)
        for place, (action, key, slot) in enumerate(zip(schedule.actions, keys, slots, strict=True))
    )
    return Grid(f"{schedule.name}: {len(cells)} actions", tuple(names[part] + tail for part, tail in rows), cells)


def _row(action: Action, wiring: Links) -> tuple[int, str]:
    """The row of an action: its partition (one more than the last if the program has none such), and its place."""
    partition = wiring.place(action) if known(action, wiring) else len(wiring.partitions)
    return partition, str(action).removeprefix(str(unplaced(action)))


def known(action: Action, wiring: Links) -> bool:
    """Whether the program has the partition or boundary of an action."""
    return action.index < (len(wiring.partitions) if on_partition(action.kind) else len(wiring.gates))


def device_of(action: Action, program: Program, wiring: Links) -> str:
    """The device an action runs on: its own, or that of its partition."""
    return action.device or str(program.partitions[wiring.place(action)].device)


def _columns(schedule: Schedule, program: Program, wiring: Links) -> list[int]:
    """Give each action the first column that is free on its device and stream and after all that it needs."""
    bare = tuple(map(unplaced, schedule.actions))
    usable = tuple(action for action in bare if known(action, wiring))
    present, answered = frozenset(usable), answers_by_order(usable, wiring)
    free: dict[tuple[str, int], int] = {}
    done: dict[Action, int] = {}
    columns = []
    for action, placed in zip(bare, schedule.actions, strict=True):
        resource, after = ("", 0), -1
        if action in present:
            resource = (device_of(placed, program, wiring), placed.stream or 0)
            after = _latest(needs(action, present, wiring, answered), done)
        column = max(free.get(resource, 0), after + 1)
        columns.append(column)
        done[action] = column
        free[resource] = column + 1
    return columns


def _latest(actions: Iterable[Action], done: Mapping[Action, int]) -> int:
    return max((done[action] for action in actions if action in done), default=-1)
