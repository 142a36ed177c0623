"""The documents: their examples print what they say, and their links and names of files lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, examples, run

LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
FILE = re.compile(r"`((?:dnifx|passes|zoo|tests|docs|benchmarks)/(?:[\w/]*\w(?:\.(?:py|md)|/))?)`")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
UNWRITTEN = {
    "dnifx/estimators/low_rank.py",
    "tests/estimators/test_low_rank.py",
    "passes/identities.py",
    "tests/passes/test_identities.py",
}
"""Files that the walk-throughs tell their reader to write."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_its_examples_print_what_it_says(path: Path) -> None:
    for example, printed in run(path):
        if example.printed is not None:
            assert printed == example.printed, f"{example.place}; python -m tests.documents writes what is printed now"


@pytest.mark.parametrize("name", ["README.md", "docs/writing_an_estimator.md", "docs/writing_a_pass.md"])
def test_there_are_examples_that_print(name: str) -> None:
    assert any(example.printed for example in examples(ROOT / name))


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_what_it_points_to_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (path.parent / link).exists()]
    missing += [name for name in set(FILE.findall(text)) - UNWRITTEN if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_its_sentences_are_short(path: Path) -> None:
    words = [len(sentence.split()) for sentence in sentences(path.read_text(encoding="utf-8"))]
    assert sum(words) < 18 * len(words)


def test_sentences_are_told_from_code_and_tables() -> None:
    text = (
        "# A title\nOne two. `a b c` [three\nfour](x.md)!\n\n- Five six\n  seven\n\n| a | b |\n```sh\nno words\n```\n"
    )
    assert sentences(text) == ["One two.", "code three\nfour!", "Five six\n  seven"]


def test_a_wrong_text_is_found(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(1 + 1)\n```\nwhich prints\n```text\n3\n```\n", encoding="utf-8")
    [(example, printed)] = run(document)
    assert (example.printed, printed) == ("3\n", "2\n")
    assert example.line == 2


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 60
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 130


def sentences(text: str) -> list[str]:
    """Return the sentences of a document: no headings, tables and code."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-#|])", FENCED.sub("\n\n", text)):
        lines = [line for line in paragraph.strip().splitlines() if not line.startswith(("#", "|", "<", "!"))]
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines)).removeprefix("- ")
        found += [
            each for each in re.split(r"(?<=[.!?:])\s+", re.sub(r"`[^`]*`", "code", plain)) if re.search(r"\w", each)
        ]
    return found
