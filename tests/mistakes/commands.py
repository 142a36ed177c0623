"""Mistakes on the command line: one line, and exit code 2."""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from dnifx.cli import main
from dnifx.errors import DnifxError


class CommandLine(DnifxError):
    """What the command line wrote, where it left with exit code 2."""


def run(*words: str) -> None:
    """Run a command; ``FOLDER`` and ``FILE`` stand for a folder and a file that are there."""
    err = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="dnifx-mistakes") as folder:
        file = Path(folder) / "file"
        file.write_text("mine")
        given = [word.replace("FOLDER", folder).replace("FILE", str(file)) for word in words]
        code: object = 0
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                main(given)
        except SystemExit as left:
            code = left.code
        assert code == 2
        assert file.read_text() == "mine"
        raise CommandLine(re.sub(r"^error ", "", err.getvalue().strip()))


def command(words: str) -> tuple[str, Callable[[], None]]:
    return f"`dnifx {words}`", lambda: run(*words.split())


MISTAKES: Mapping[str, Callable[[], object]] = dict(
    command(words)
    for words in (
        "show fnc",
        "code torch.nn:Identity -i 2x3",
        "show fcn --cuts hiden.*",
        "show fcn --cuts 99",
        "show nowhere:make",
        "show torch.nn:Nothing",
        "show FOLDER/none.py:make",
        "show torch.nn.Linear",
        "show fcn -i axb",
        "show fcn -i 2x3:floaty",
        "show fcn -i 2x3",
        "show fcn -s depth=3",
        "show fcn -s layers",
        "show fcn -s layers=many",
        "show fcn -g synth",
        "show fcn -g Syntetic",
        "show fcn -g Synthetic(hid=1)",
        "show fcn -g __import__('os')",
        "show fcn --context target",
        "show fcn --context label --num-classes 1",
        "show fcn --inputs 32x784",
        "show fcn --every slow",
        "show fcn --every slow=x",
        "show fcn -f svg -o FOLDER/no/where.svg",
        "show fcn -f svg -o FOLDER",
        "code fcn -o FILE",
        "code fcn -o FILE/deeper",
        "schedule fcn --schedule randm",
        "schedule fcn --schedule random_order",
        "schedule fcn --schedule warm_up{step=3}",
        "schedule fcn --schedule unlocked{p=0.5}",
        "schedule fcn --devices gpu9",
        "schedule fcn --steps 0",
        "schedule fcn --trace FOLDER/no/where.json",
        "doctor --places 2",
        "doctor fcn --cuts 2 --places 3 --rounds 1",
        "doctor fcn --cuts 2 --places 2 --delay -1",
        "doctor fcn --bandwidth 0",
        "doctor two-clocks",
        "train fcn --lag auto",
        "train fcn --steps 0",
        "train fcn --gradient none?",
        "train fcn --data imagenet",
        "train fcn --out FILE",
        "train copy --out FILE/deeper",
    )
)
