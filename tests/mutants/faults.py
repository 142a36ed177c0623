"""The small faults that can be put into a source file: one operator, number, condition or statement changed."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
UNTESTED = ("__str__", "__repr__", "__rich__")
"""Methods whose text is for people alone."""


@dataclass(frozen=True)
class Fault:
    """A fault in a file.

    Attributes:
        path: The file, below the root.
        lines: The lines that a test runs where it meets the fault: from the start of its statement.
        number: Which fault of the file it is, counted from 0.
        before: The code that is changed.
        after: What it becomes.
    """

    path: str
    lines: tuple[int, ...]
    number: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.lines[-1]}: {self.before}  ->  {self.after}"


def faults(root: Path, path: str) -> list[Fault]:
    """Return all faults that can be put into a file, in the order of its text."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    starts = statements(tree)
    return [
        Fault(path, tuple(range(starts[old], place(old) + 1)), number, shown(old), shown(new))
        for number, (old, new) in enumerate(changes(tree))
    ]


def statements(tree: ast.AST) -> dict[ast.AST, int]:
    """Return for every node in which line its statement begins."""
    starts: dict[ast.AST, int] = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            starts[child] = place(child) if isinstance(child, ast.stmt) else starts.get(node, 1)
    return starts


def place(node: ast.AST) -> int:
    """Return the line of a node."""
    return int(getattr(node, "lineno", 1))


def broken(root: Path, fault: Fault) -> str:
    """Return the text of a file with a fault in it."""
    tree = ast.parse((root / fault.path).read_text(encoding="utf-8"))
    old, new = next(pair for number, pair in enumerate(changes(tree)) if number == fault.number)
    return ast.unparse(ast.fix_missing_locations(Swap(old, new).visit(tree)))


class Swap(ast.NodeTransformer):
    """Puts one node in another's place."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """Return the new node for the old one."""
        found: ast.AST = self.new if node is self.old else self.generic_visit(node)
        return found


def shown(node: ast.AST) -> str:
    """Return the first line of a node as code."""
    return ast.unparse(node).splitlines()[0]


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield pairs of a node and what a fault makes of it."""
    for node in meant(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield node, replaced(node, ops=[COMPARISONS[type(node.ops[0])]()])
        elif isinstance(node, ast.BoolOp):
            yield node, replaced(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, node.operand
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not textual(node):
            yield node, replaced(node, op=OPERATORS[type(node.op)]())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, ast.Constant(not node.value)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, ast.Constant(node.value + 1)
        elif isinstance(node, (ast.If, ast.IfExp)):
            yield node, replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Return) and node.value is not None and not empty(node.value):
            yield node, ast.Return(ast.Constant(None))
        elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Delete)):
            yield node, ast.Pass()
        elif isinstance(node, ast.Continue):
            yield node, ast.Break()


def meant(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree whose meaning a test could find: no annotations, texts, imports or messages of errors."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not skipped(child):
                yield from meant(child)


def skipped(node: ast.AST) -> bool:
    """Whether a test has nothing to find in a node."""
    if isinstance(node, ast.FunctionDef):
        return node.name in UNTESTED
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or called(node.value) == "warn"
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Call):
        return called(node) == "cast"
    if isinstance(node, ast.keyword):
        return node.arg == "strict"  # of zip: it finds faults of others
    return isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert))


def called(node: ast.AST) -> str:
    """Return the last name of what a call calls; empty where a node is none."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def textual(node: ast.BinOp) -> bool:
    """Whether an operation joins texts or types."""
    parts = (node.left, node.right)
    return any(
        isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and not isinstance(each.value, (int, float)))
        for each in parts
    )


def empty(node: ast.expr) -> bool:
    """Whether an expression is None."""
    return isinstance(node, ast.Constant) and node.value is None


def replaced(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of a node with other fields."""
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made
