"The project as a whole: notebooks, exported modules, versions and files agree."

import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import notebooks
import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
LIBRARY = [p for p in NOTEBOOKS if "#| default_exp" in p.read_text()]
EXPERIMENTS = [p for p in NOTEBOOKS if p.parent.name == "experiments" and p not in LIBRARY]
# A package imports only from those before it; the list is the reading order.
ORDER = (
    "core data runs models segmenters scorers rollouts methods evaluation training experiments "
    "viewing commands cli pretraining"
).split()
names = dict(ids=lambda p: str(p.relative_to(ROOT / "nbs").with_suffix("")))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "weights")
    for name in "nbs", "dr2seg_lib":
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in "settings.ini", "setup.py":
        shutil.copy(ROOT / name, folder / name)
    return folder


def nbdev(command, folder):
    done = subprocess.run([BIN / command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_what_the_notebooks_export(copy):
    before = {p.relative_to(ROOT) for p in (ROOT / "dr2seg_lib").rglob("*.py")}
    for path in (copy / "dr2seg_lib").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    nbdev("nbdev_export", copy)
    after = {p.relative_to(copy) for p in (copy / "dr2seg_lib").rglob("*.py")}
    assert before == after, "a module without its notebook, or the other way round"
    stale = [str(p) for p in sorted(before) if (ROOT / p).read_text() != (copy / p).read_text()]
    assert not stale, f"run nbdev_export: {stale} differ from their notebooks"


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    dirty = [
        str(p.relative_to(ROOT))
        for p in NOTEBOOKS
        if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()
    ]
    assert not dirty, f"run nbdev_clean: {dirty}"


@pytest.mark.parametrize("path", NOTEBOOKS, **names)
def test_the_title_is_the_one_heading_of_first_rank(path):
    "Prose behind a stray # would be shown as headings, line by line."
    said = [
        re.sub(r"```.*?```", "", "".join(c["source"]), flags=re.S)
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "markdown"
    ]
    titles = [line for text in said for line in text.splitlines() if re.match(r"# |#$", line)]
    assert titles == said[0].splitlines()[:1], f"{path.name}: {titles[1:] or titles}"


def imports_of(path):
    "The modules of the library that a module imports, as file paths."
    folder, tree = path.parent, ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
        for name in node.names:
            for file in (base / name.name).with_suffix(".py"), base.with_suffix(".py"):
                if file.exists():
                    yield file.resolve()
                    break


def package_of(path):
    return path.relative_to(ROOT / "dr2seg_lib").with_suffix("").parts[0]


MODULES = [
    p for p in (ROOT / "dr2seg_lib").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "dr2seg_lib")))
def test_a_package_imports_only_from_packages_before_it(path):
    upward = [
        p for p in imports_of(path) if ORDER.index(package_of(p)) > ORDER.index(package_of(path))
    ]
    assert not upward


def test_no_module_imports_itself_by_a_detour():
    graph = {p: set(imports_of(p)) for p in MODULES}
    TopologicalSorter(graph).prepare()  # raises a CycleError


@pytest.mark.parametrize("path", EXPERIMENTS, **names)
def test_experiment_has_one_parameters_cell(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("path", LIBRARY, **names)
def test_library_notebook_runs(path):
    "Each in a kernel of its own; the text that its cells show is what is committed."
    assert not notebooks.stale_cells(path, notebooks.execute(path))


def test_installed_package_follows_settings():
    "setup.py takes everything from settings.ini, and what it asks for is what is installed."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    settings = config["DEFAULT"]
    asked = [Requirement(r) for r in metadata.requires("dr2seg_lib")]
    assert metadata.version("dr2seg_lib") == settings["version"]
    runtime = {f"{r.name}{r.specifier}" for r in asked if r.marker is None}
    assert runtime == set(settings["requirements"].split()), "run make install"
    for extra in ("dev", "bench"):
        mine = {
            f"{r.name}{r.specifier}"
            for r in asked
            if r.marker and r.marker.evaluate({"extra": extra})
        }
        assert mine == set(settings[f"{extra}_requirements"].split())
    here = [
        r for r in asked if r.marker is None or r.marker.evaluate({"extra": "dev"})
    ]  # bench is installed by who runs it
    wrong = [str(r) for r in here if metadata.version(r.name).split("+")[0] not in r.specifier]
    assert not wrong, f"installed in other versions: {wrong}"


def test_sam2_is_the_pinned_one():
    line = (ROOT / "requirements-sam2.txt").read_text().splitlines()[-1]
    assert line.split()[0] == f"sam2=={metadata.version('sam2')}"
    assert "--hash=sha256:" in line


def test_no_large_file_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = [ROOT / f for f in tracked.split("\0") if f and (ROOT / f).is_file()]
    large = [
        f"{f.relative_to(ROOT)}: {f.stat().st_size >> 20} MiB"
        for f in files
        if f.stat().st_size > 20 << 20
    ]
    assert not large, f"over 20 MiB: {large}"
