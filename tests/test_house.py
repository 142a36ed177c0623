"""The layout of the project.

One name for every module, imports that point one way, short files, tests beside what they test, a wheel that holds what it
should, and files that speak of the project alone.
"""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
LINKS = {"passes": "dnifx.passes", "zoo": "dnifx.zoo"}
"""Folders beside ``dnifx`` that are packages below it."""

LAYERS = {
    "dnifx": (
        *("errors", "units", "writing", "ir", "engines", "runtime", "estimators", "schedules", "report"),
        *(
            "requests",
            "passes",
            "api",
            "doctor",
            "",
            "adapters",
            "zoo",
            "recipe_commands",
            "option_names",
            "loading",
            "model_options",
            "doctor_command",
            "cli",
            "__main__",
        ),
    ),
    "dnifx.passes": (
        *("", "graph", "torch_logging", "compiled", "pipeline", "capture", "flops", "measure", "cuts", "insert"),
        *("time", "legalize", "emit", "schedule", "place", "place_devices", "automatic_lag", "rates", "compiler"),
    ),
    "dnifx.runtime": ("", "emitted", "net", "training", "decoupled"),
}
"""What each package holds, from the lowest layer to the highest: a layer imports from those below it alone.

'' is the package itself, which for ``dnifx`` is what ``import dnifx`` gives.
"""

LONGEST = {"dnifx": 400, "passes": 400, "zoo": 400, "benchmarks": 400, "tests": 500}
"""How many lines a module of each folder may have."""

WITHOUT_TESTS = {"dnifx/ir"}
"""Packages of value types alone, which the tests of all others use."""

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


@cache
def imports(path: Path) -> frozenset[str]:
    """Return what a module imports anywhere in it, as dotted names; ``from a import b`` as ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: an import relative to the package"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return frozenset(found)


def module_imports() -> dict[str, frozenset[str]]:
    """Return what each module of ``dnifx`` imports."""
    found = {module_name(path): imports(path) for path in sources()}
    return {name: imported for name, imported in found.items() if name.split(".")[0] == "dnifx"}


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
    page = [path.relative_to(ROOT).as_posix() for path in files(ROOT / "dnifx" / "report" / "page")]
    assert wheel_names(checkout, tmp_path / "wheels") == sorted([*wanted, "dnifx/py.typed", *page])


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


def layer(package: str, name: str) -> str:
    """Return the layer of a package that a dotted name lies in; '' for the package itself and what it exports."""
    part = name.removeprefix(package).removeprefix(".").split(".")[0]
    return part if part in LAYERS[package] else ""


def upward(package: str, imported: Mapping[str, Collection[str]]) -> list[str]:
    """Return the imports inside a package that lead to a layer above the importing one."""

    def height(name: str) -> int:
        return LAYERS[package].index(layer(package, name))

    inside = {name: others for name, others in imported.items() if f"{name}.".startswith(f"{package}.")}
    return [
        f"{name} imports {other}, which is above it"
        for name, others in inside.items()
        for other in sorted(others)
        if f"{other}.".startswith(f"{package}.") and height(other) > height(name)
    ]


def circles(imported: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle; an imported name stands for the module that holds it."""
    graph = networkx.DiGraph()
    for name, others in imported.items():
        for other in others:
            while other and other not in imported:
                other = other.rpartition(".")[0]
            if other and other != name:
                graph.add_edge(name, other)
    groups = map(sorted, networkx.strongly_connected_components(graph))
    return sorted(group for group in groups if len(group) > 1)


def long_files(root: Path, longest: Mapping[str, int]) -> list[str]:
    """Return the modules with more lines than those of their folder may have."""
    found = []
    for folder, limit in longest.items():
        for path in files(root / folder):
            lines = len(path.read_text(encoding="utf-8").splitlines()) if path.suffix == ".py" else 0
            found += [f"{path.relative_to(root)}: {lines} lines, at most {limit}"] if lines > limit else []
    return found


def packages_below(folder: Path) -> set[str]:
    """Return the packages below a folder as relative paths."""
    return {path.parent.relative_to(folder).as_posix() for path in files(folder) if path.name == "__init__.py"} - {"."}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package: str) -> None:
    assert not upward(package, module_imports())


def test_an_import_that_points_up_is_found() -> None:
    imported = {
        "dnifx.ir.cuts": {"dnifx.errors.CutError", "dnifx.passes.cuts.resolve", "torch"},
        "dnifx.passes.cuts.resolve": {"dnifx.Edge", "dnifx.passes.emit", "dnifx.passes.graph.captured"},
        "dnifx.passes.emit": {"dnifx.passes.cuts.resolve"},
        "dnifx.zoo": {"dnifx.decouple"},
    }
    assert upward("dnifx", imported) == [
        "dnifx.ir.cuts imports dnifx.passes.cuts.resolve, which is above it",
        "dnifx.passes.cuts.resolve imports dnifx.Edge, which is above it",
    ]
    assert upward("dnifx.passes", imported) == [
        "dnifx.passes.cuts.resolve imports dnifx.passes.emit, which is above it"
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_its_layer(package: str) -> None:
    named = {
        name.removeprefix(f"{package}.").split(".")[0] for name in module_imports() if name.startswith(f"{package}.")
    }
    assert named | {""} == set(LAYERS[package])


def test_no_modules_import_each_other() -> None:
    assert not circles(module_imports())


def test_a_circle_is_found() -> None:
    imported = {
        "a": {"a.one.function"},
        "a.one": {"a.two.Class", "torch"},
        "a.two": {"a.three"},
        "a.three": {"a.one"},
        "a.four": {"a.one", "a.four.own"},
    }
    assert circles(imported) == [["a.one", "a.three", "a.two"]]
    assert circles({**imported, "a.three": {"a.__version__"}}) == [["a", "a.one", "a.three", "a.two"]]
    assert not circles({**imported, "a.three": set()})


def test_imports_for_types_and_inside_functions_count(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("if TYPE_CHECKING:\n    from a import b\ndef f():\n    import c.d\n", encoding="utf-8")
    assert imports(module) == {"a.b", "c.d"}


def test_no_module_is_too_long() -> None:
    assert not long_files(ROOT, LONGEST)


def test_a_long_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name, lines in (("short.py", 3), ("long.py", 4), ("data.txt", 9)):
        (tmp_path / "tests" / name).write_text("\n" * lines, encoding="utf-8")
    assert long_files(tmp_path, {"tests": 3}) == ["tests/long.py: 4 lines, at most 3"]


def test_every_package_has_its_folder_of_tests() -> None:
    assert packages_below(ROOT / "tests" / "passes") == packages_below(ROOT / "passes")
    tops = {path.parent for path in (ROOT / "dnifx").glob("*/__init__.py")}
    tested = {path for path in tops if path.relative_to(ROOT).as_posix() not in WITHOUT_TESTS}
    assert not [path for path in tested if not (ROOT / "tests" / path.name / "__init__.py").is_file()]
    assert all(list((ROOT / "tests" / "passes" / name).glob("test_*.py")) for name in packages_below(ROOT / "passes"))


def test_packages_are_found_below_a_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "one", tmp_path / "one" / "two"):
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (tmp_path / "data").mkdir()
    assert packages_below(tmp_path) == {"one", "one/two"}


def test_the_zoo_uses_the_public_interface_alone() -> None:
    for path in files(ROOT / "zoo"):
        used = {name for name in imports(path) if name.split(".")[0] == "dnifx"} if path.suffix == ".py" else set()
        open_to_all = {"", "errors", "writing", "estimators", "schedules", "zoo"}
        assert {layer("dnifx", name) for name in used} <= open_to_all, path


def test_the_runtime_that_is_copied_imports_torch_alone() -> None:
    for path in (*files(ROOT / "dnifx" / "runtime" / "emitted"), ROOT / "dnifx" / "errors.py"):
        others = {each for each in imports(path) if not each.startswith(("dnifx.runtime.emitted.", "dnifx.errors."))}
        assert {each.split(".")[0] for each in others} - set(sys.stdlib_module_names) <= {"torch"}, path


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
