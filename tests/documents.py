"""The examples in the documents: their Python blocks and commands run in order, each with what it prints.

A text block right after one is what it prints. A block that is one of the files of docs/examples is written to that
file's name, with fewer steps. ``python -m tests.documents`` runs them all and writes what they print into the documents.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import dnifx.cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FILES = {path.read_text(encoding="utf-8"): path.name for path in (ROOT / "docs" / "examples").rglob("*.py")}
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One block of a document that runs.

    Attributes:
        path: The document.
        line: Number of the block's first line of code.
        code: The code, or commands, one a line.
        language: ``python``, or ``console`` for commands, each after a ``$``.
        printed: What the document says that it prints, or None where it says nothing.
        span: Where the text block's body begins and ends in the document.
    """

    path: Path
    line: int
    code: str
    language: str = "python"
    printed: str | None = None
    span: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def examples(path: Path) -> list[Example]:
    """Return the blocks of a document that run, each with the text block that follows it."""
    text = path.read_text(encoding="utf-8")
    blocks = list(FENCED.finditer(text))
    found = []
    for index, block in enumerate(blocks):
        if block["language"] in ("python", "console"):
            line = text.count("\n", 0, block.start("body")) + 1
            after = blocks[index + 1] if index + 1 < len(blocks) else None
            if after is not None and after["language"] == "text":
                found.append(Example(path, line, block["body"], block["language"], after["body"], after.span("body")))
            else:
                found.append(Example(path, line, block["body"], block["language"]))
    return found


def run(path: Path) -> Iterator[tuple[Example, str]]:
    """Run the blocks of a document in one namespace and an empty folder; yield each with what it printed."""
    namespace: dict[str, object] = {"__name__": path.stem}
    with tempfile.TemporaryDirectory() as folder, in_folder(folder), torch.random.fork_rng(devices=[]):
        for example in examples(path):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if example.code in FILES:
                    shorter = re.sub(r"^STEPS = \d+$", "STEPS = 20", example.code, flags=re.MULTILINE)
                    Path(FILES[example.code]).write_text(shorter, encoding="utf-8")
                elif example.language == "console":
                    for line in example.code.splitlines():
                        command(*shlex.split(line.removeprefix("$ ")))
                else:
                    code = compile("\n" * (example.line - 1) + example.code, os.fspath(path), "exec")
                    exec(code, namespace)
            yield example, without_trailing_spaces(printed.getvalue())


@contextlib.contextmanager
def in_folder(folder: str) -> Iterator[None]:
    """Work in a folder and import from it; forget its modules in the end."""
    known = set(sys.modules)
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, COLUMNS="100"),
        mock.patch("sys.path", [folder, *sys.path]),
    ):
        yield
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def command(program: str, *arguments: str) -> None:
    """Run ``dnifx`` or a Python script, in this process."""
    if program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
        return
    assert program == "dnifx", f"a document may run dnifx and python, not {program}"
    try:
        dnifx.cli.main(arguments)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"dnifx {shlex.join(arguments)} ends with {end.code}") from end


def without_trailing_spaces(text: str) -> str:
    """Return the text with no spaces at the end of its lines."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def rewrite(path: Path) -> None:
    """Write what the blocks of a document print into its text blocks."""
    text = path.read_text(encoding="utf-8")
    for example, printed in reversed(list(run(path))):
        if example.printed is not None:
            text = text[: example.span[0]] + printed + text[example.span[1] :]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for document in DOCUMENTS:
        rewrite(document)
