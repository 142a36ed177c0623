"""Makes a random program that fails smaller, for a person to read: fewer steps, no blocks, simpler cuts."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.wild.programs import Wild

Fails = Callable[[Wild], bool]
Bodies = list[ast.stmt]


def shrink(program: Wild, fails: Fails) -> Wild:
    """Drop steps of a program one by one, as long as it runs by itself and still fails.

    Args:
        program: A program that fails.
        fails: Whether another one fails in the same way.
    """
    smaller = True
    while smaller:
        smaller = False
        for candidate in candidates(program):
            if stands(candidate) and fails(candidate):
                program, smaller = candidate, True
                break
    return program


def stands(program: Wild) -> bool:
    """Whether a program still runs by itself: a step may be gone that another one needs."""
    try:
        return program.runs()
    except (NameError, AttributeError, TypeError, KeyError):
        return False


def candidates(program: Wild) -> Iterator[Wild]:
    """Yield the program with one thing less, the later steps first."""
    tree = ast.parse(program.source)
    for number in reversed(range(sum(1 for _ in places(tree)))):
        for change in (drop, rename, flatten):
            other = copy.deepcopy(tree)
            body, index = list(places(other))[number]
            if change(body, index):
                yield replace(program, source=ast.unparse(other))
    if isinstance(program.cuts, list) and len(program.cuts) > 1:
        for cut in program.cuts:
            yield replace(program, cuts=[other for other in program.cuts if other != cut])  # type: ignore[arg-type]
    if program.masked:
        yield replace(program, masked=False)


def places(tree: ast.AST) -> Iterator[tuple[Bodies, int]]:
    """Yield every list of statements and every place in it."""
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                yield from ((body, index) for index in range(len(body)))


def drop(body: Bodies, index: int) -> bool:
    """Take a statement out; say whether something is left."""
    del body[index]
    return bool(body)


def rename(body: Bodies, index: int) -> bool:
    """Take an assignment out, and let what follows read the first name on its right instead; say whether it was one."""
    step = body[index]
    if not isinstance(step, ast.Assign) or not isinstance(step.targets[0], ast.Name):
        return False
    made = step.targets[0].id
    read = [each.id for each in ast.walk(step.value) if isinstance(each, ast.Name) and each.id != made]
    read = [
        name for name in read if name not in ("self", "torch", "nn", "F", "sum", "range", "enumerate", "float", "max")
    ]
    if not read:
        return False
    del body[index]
    for later in body[index:]:
        for each in ast.walk(later):
            if isinstance(each, ast.Name) and each.id == made:
                each.id = read[0]
    return bool(body)


def flatten(body: Bodies, index: int) -> bool:
    """Put a block's statements in its place; say whether it was a block."""
    step = body[index]
    if not isinstance(step, ast.If | ast.For | ast.With):
        return False
    body[index : index + 1] = step.body
    return True
