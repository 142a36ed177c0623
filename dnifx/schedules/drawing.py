"""A schedule as a picture: partitions down, time across."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dnifx.ir import BAR, Action, Kind, Period, Program, Schedule
from dnifx.schedules.dependencies import Links, links, needs_in_order
from dnifx.schedules.language import on_partition, unplaced
from dnifx.schedules.transfers import transfer_needs

PLAIN_WIDTH = 100
_STYLES = {
    Kind.FORWARD: "cyan",
    Kind.INPUT: "bright_cyan",
    Kind.SYNTHESISE: "magenta",
    Kind.BACKWARD: "green",
    Kind.UPDATE: "bold yellow",
    Kind.RENEW: "yellow",
    Kind.TARGET: "blue",
    Kind.FIT: "bright_magenta",
    Kind.SEND_VALUES: "dim cyan",
    Kind.RECEIVE_VALUES: "dim cyan",
    Kind.SEND_TARGET: "dim blue",
    Kind.RECEIVE_TARGET: "dim blue",
    Kind.SEND_GRADIENTS: "dim green",
    Kind.RECEIVE_GRADIENTS: "dim green",
    Kind.SEND_WEIGHTS: "dim yellow",
    Kind.RECEIVE_WEIGHTS: "dim yellow",
    Kind.SEND_COPIES: "dim magenta",
    Kind.RECEIVE_COPIES: "dim magenta",
}


@dataclass(frozen=True)
class Cell:
    """One action in the picture.

    Attributes:
        action: The action, without its place.
        row: Number of its row.
        slot: Number of its column.
        marked: Whether it is shown as wrong.
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

    Every action takes one column, whatever it costs; ``simulate`` shows the costs. The actions of a boundary stand in
    the row of its producer. A partition that works at several places has a row for each. Empty rows are left out.

    Attributes:
        title: What is shown.
        rows: Name of each row.
        cells: The actions.
        bars: Numbers of the columns between one window of a period and the next.
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
        cell = max([4, *(len(each.text) for each in self.cells)])
        count, slots = max(1, (width - first) // cell), [each.slot for each in self.cells]
        start, stop = min(slots, default=0), max(slots, default=-1) + 1
        blocks = [self._block(range(left, min(left + count, stop)), first, cell) for left in range(start, stop, count)]
        return Text("\n").join([Text(self.title, style="bold"), *blocks])

    def _block(self, slots: range, first: int, width: int) -> Text:
        here = {(cell.row, cell.slot): cell for cell in self.cells if cell.slot in slots}
        shown = sorted({row for row, _ in here})
        times = ("" if slot in self.bars else f"{slot} " for slot in slots)
        head = Text("time".ljust(first) + "".join(time.rjust(width) for time in times).rstrip(), style="dim")
        bars = [slot in self.bars for slot in slots]
        lines = [_line(self.rows[row], [here.get((row, slot)) for slot in slots], bars, first, width) for row in shown]
        return Text("\n").join([head, *lines])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.drawn(options.max_width)


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
    """Return a schedule or a period, which need not be valid, as partitions by time.

    Actions of the same device and stream stand one after the other. Actions of different ones share a column where what
    they need is there. The windows of a period follow each other.
    """
    if isinstance(schedule, Schedule):
        return marked_grid(schedule, program)
    wholes = [marked_grid(window, program) for window in schedule.windows]
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


def marked_grid(schedule: Schedule, program: Program, wrong: int | None = None) -> Grid:
    """Return the grid of a schedule, with the action at position ``wrong`` marked."""
    wiring = links(program)
    slots = _columns(schedule, program, wiring)
    keys = [_row(action, wiring) for action in schedule.actions]
    rows = {key: row for row, key in enumerate(sorted(set(keys)))}
    names = [partition.name for partition in program.partitions] + ["?"]
    cells = tuple(
        Cell(replace(action, device=None, stream=None, rank=None), rows[key], slot, place == wrong)
        for place, (action, key, slot) in enumerate(zip(schedule.actions, keys, slots, strict=True))
    )
    return Grid(f"{schedule.name}: {len(cells)} actions", tuple(names[part] + tail for part, tail in rows), cells)


def _row(action: Action, wiring: Links) -> tuple[int, str]:
    """The row of an action: its partition (a row below the last for one that does not exist), and its place."""
    partition = wiring.place(action) if exists(action, wiring) else len(wiring.partitions)
    return partition, action.place


def exists(action: Action, wiring: Links) -> bool:
    """Whether the program has the partition or boundary of an action."""
    return action.index < (len(wiring.partitions) if on_partition(action.kind) else len(wiring.gates))


def device_of(action: Action, program: Program, wiring: Links) -> str:
    """The rank and the device that an action names, or else the device of its partition."""
    if action.rank is not None:
        return f"rank{action.rank}" + ("" if action.device is None else f":{action.device}")
    return action.device or str(program.partitions[wiring.place(action)].device)


def needs_over_ranks(schedule: Schedule, program: Program, wiring: Links) -> dict[Action, tuple[Action, ...]]:
    """Return the needs of each action of a schedule within its step. Between ranks, only transfers are needed."""
    there = [action for action in schedule.actions if exists(action, wiring)]
    found = needs_in_order(there, wiring)
    crossing = transfer_needs(replace(schedule, actions=tuple(there)), program)
    if not crossing:
        return found
    ranks = {unplaced(action): action.rank for action in there}
    local = {
        action: tuple(need for need in needs if ranks.get(need) == ranks[action]) for action, needs in found.items()
    }
    names = [unplaced(action) for action in there]
    return {action: (*local.get(action, ()), *crossing.get(action, ())) for action in names}


def _columns(schedule: Schedule, program: Program, wiring: Links) -> list[int]:
    """Give each action the first column that is free on its device and stream and stands after all that it needs."""
    needed = needs_over_ranks(schedule, program, wiring)
    free: dict[tuple[str, int], int] = {}
    done: dict[Action, int] = {}
    columns = []
    for action in schedule.actions:
        bare = unplaced(action)
        resource = (device_of(action, program, wiring), action.stream or 0) if bare in needed else ("", 0)
        after = max((done[need] for need in needed.get(bare, ()) if need in done), default=-1)
        done[bare] = max(free.get(resource, 0), after + 1)
        free[resource] = done[bare] + 1
        columns.append(done[bare])
    return columns
