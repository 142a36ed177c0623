"""The house: one name for every module, arrows that point one way, a wheel that holds what it should, clean files."""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = {"passes": "dnifx.passes", "zoo": "dnifx.zoo"}
"""Folders beside ``dnifx`` that are packages below it."""

ORDER = (
    *("errors", "ir", "runtime", "estimators", "schedules", "report"),
    *("passes", "api", "", "zoo", "loading", "cli", "__main__"),
)
"""The rooms from the lowest to the highest, '' for what ``import dnifx`` gives; each imports from rooms below it alone."""

MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users|mnt|tmp)/\w")
NOTE_TO_SELF = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
NUMBERED = re.compile(r"\b(?:issue|session|ticket)s? #?\d", re.IGNORECASE)


def ignored(name: str) -> bool:
    """Whether .gitignore, or git itself, leaves a name out."""
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return name == ".git" or any(fnmatch.fnmatch(name, pattern.strip("/")) for pattern in patterns)


def files(folder: Path = ROOT) -> Iterator[Path]:
    """Return the checkout's files, each once: links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not ignored(path.name):
            yield from files(path)
        elif path.is_file() and not ignored(path.name):
            yield path


def sources() -> list[Path]:
    return [path for path in files() if path.suffix == ".py"]


def module_name(path: Path) -> str:
    """Return the one name of a module, from its file."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([LINKS.get(first, first), *rest]).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Return what a module imports, as dotted names; ``from a import b`` as ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: an import relative to the package"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def project() -> dict[str, object]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        tools: dict[str, object] = tomllib.load(file)["tool"]["setuptools"]
    return tools


def package_folders() -> dict[str, str]:
    """Return every package of the wheel by its dotted name, and its folder in the checkout."""
    tops = {Path(name): LINKS.get(name, name) for name in ("dnifx", *LINKS)}
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    found = {}
    for folder in folders:
        first, *rest = folder.parts or ("",)
        if Path(first) in tops:
            found[".".join([tops[Path(first)], *rest])] = folder.as_posix()
    return found


@pytest.mark.parametrize(("folder", "package"), LINKS.items())
def test_links_lead_out_of_the_package_by_a_relative_path(folder: str, package: str) -> None:
    link = ROOT / package.replace(".", "/")
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_links_and_mapping_agree() -> None:
    assert project()["package-dir"] == {"dnifx": "dnifx", **{package: folder for folder, package in LINKS.items()}}


def test_every_package_is_listed() -> None:
    listed = project()["packages"]
    assert isinstance(listed, list)
    assert sorted(listed) == sorted(package_folders())
    for folder in package_folders().values():
        assert (ROOT / folder / "__init__.py").is_file(), folder


def wheel_names(checkout: Path, place: Path) -> list[str]:
    """Build the wheel of a checkout, with the setuptools that is here; return the names of its files."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(place), str(checkout)], check=True, capture_output=True, text=True)
    [wheel] = place.glob("*.whl")
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


@pytest.mark.parametrize("links", ["with links", "without links"])
def test_the_wheel_holds_every_module_once_and_nothing_else(links: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for path in files():
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if links == "with links":
        for folder, package in LINKS.items():
            (checkout / package.replace(".", "/")).symlink_to(Path("..", folder))
    packages = package_folders()
    names = [module_name(path) for path in sources() if path.relative_to(ROOT).parts[0] in {"dnifx", *LINKS}]
    wanted = [name.replace(".", "/") + ("/__init__.py" if name in packages else ".py") for name in names]
    assert wheel_names(checkout, tmp_path / "wheels") == sorted([*wanted, "dnifx/py.typed"])


def test_no_module_is_imported_by_a_second_name() -> None:
    wrong = [(str(path), name) for path in sources() for name in imports(path) if name.split(".")[0] in LINKS]
    assert not wrong
    assert not [name for name in sys.modules if name.split(".")[0] in LINKS]


@pytest.mark.parametrize("name", LINKS)
def test_a_second_name_is_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"this package is {LINKS[name]}; import it so" in done.stderr


def test_the_linter_refuses_a_second_name_and_relative_imports() -> None:
    code = "from passes.cuts import ResolveCuts\nfrom zoo import FCN\nfrom .ir import Edge\n"
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID",
        "--output-format",
        "concise",
        "--stdin-filename",
    ]
    done = subprocess.run([*command, "dnifx/new.py", "-"], cwd=ROOT, input=code, capture_output=True, text=True)
    assert [found.split()[1] for found in done.stdout.splitlines()[:3]] == ["TID251", "TID251", "TID252"]


def room(name: str) -> str:
    """Return the room of ``dnifx`` that a dotted name lies in; '' for the public names."""
    part = [*name.split("."), ""][1]
    return part if part in ORDER else ""


def test_arrows_point_down() -> None:
    for path in sources():
        name = module_name(path)
        if name.split(".")[0] != "dnifx":
            continue
        here = ORDER.index(room(name))
        above = {other for other in imports(path) - {"dnifx.__version__"} if other.split(".")[0] == "dnifx"}
        above = {other for other in above if ORDER.index(room(other)) > here}
        assert not above, f"{name} imports {above}, which stand above it"


def test_every_room_has_its_place() -> None:
    rooms = {room(module_name(path)) for path in sources() if module_name(path).startswith("dnifx")}
    assert rooms == set(ORDER)
    named = {module_name(path).split(".")[1] for path in sources() if module_name(path).startswith("dnifx.")}
    assert named <= set(ORDER)


def test_the_zoo_uses_the_public_interface_alone() -> None:
    for path in files(ROOT / "zoo"):
        used = {name for name in imports(path) if name.split(".")[0] == "dnifx"} if path.suffix == ".py" else set()
        assert {room(name) for name in used} <= {"", "errors", "estimators", "schedules", "zoo"}, path


def test_the_runtime_that_is_copied_imports_torch_alone() -> None:
    for name in ("interface", "ops"):
        tops = {each.split(".")[0] for each in imports(ROOT / "dnifx" / "runtime" / "emitted" / f"{name}.py")}
        assert tops - set(sys.stdlib_module_names) <= {"torch"}


def test_files_speak_of_the_project_alone() -> None:
    found = []
    for path in files():
        if path.suffix == ".png":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern in (MACHINE_PATH, NOTE_TO_SELF, NUMBERED):
                found += [f"{path.relative_to(ROOT)}:{number}: {line}"] if pattern.search(line) else []
    assert not found


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATH, "read /" + "home/someone/data"),
        (NOTE_TO_SELF, "# TO" + "DO: later"),
        (NUMBERED, "as issue " + "#3 asks"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


def test_names_of_files_say_what_is_in_them() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for path in sources() if path.stem in vague]
