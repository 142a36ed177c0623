"""The examples in the documents: their Python blocks run in order, and a text block right after one is what it prints.

``python -m tests.documents`` runs them all and writes what they print into the documents.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One Python block of a document.

    Attributes:
        path: The document.
        line: Number of the block's first line of code.
        code: The code.
        printed: What the document says that it prints, or None where it says nothing.
        span: Where the text block's body begins and ends in the document.
    """

    path: Path
    line: int
    code: str
    printed: str | None = None
    span: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def examples(path: Path) -> list[Example]:
    """Return the Python blocks of a document, each with the text block that follows it."""
    text = path.read_text(encoding="utf-8")
    blocks = list(FENCED.finditer(text))
    found = []
    for index, block in enumerate(blocks):
        if block["language"] == "python":
            line = text.count("\n", 0, block.start("body")) + 1
            after = blocks[index + 1] if index + 1 < len(blocks) else None
            if after is not None and after["language"] == "text":
                found.append(Example(path, line, block["body"], after["body"], after.span("body")))
            else:
                found.append(Example(path, line, block["body"]))
    return found


def run(path: Path) -> Iterator[tuple[Example, str]]:
    """Run the blocks of a document in one namespace and an empty folder; yield each with what it printed."""
    namespace: dict[str, object] = {"__name__": path.stem}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        for example in examples(path):
            code = compile("\n" * (example.line - 1) + example.code, os.fspath(path), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            yield example, without_trailing_spaces(printed.getvalue())


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
