"""Emit a folder: the program as a Python package that imports torch alone."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnifx.runtime.module import DecoupledModule


def write_folder(net: "DecoupledModule", path: str | os.PathLike[str], overwrite: bool) -> None:
    raise NotImplementedError
