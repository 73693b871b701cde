"The project as a whole: notebooks, exported modules, versions and files agree."
import json, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from dr2seg_lib.commands.execute import kernel_class
from dr2seg_lib.evaluation.config import EvaluateConfig
from dr2seg_lib.evaluation.rea2seg import Rea2SegConfig
from dr2seg_lib.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent == ROOT/"nbs" and re.match(r"\d\d_", p.name)]
EXPERIMENTS = [p for p in NOTEBOOKS if p.parent == ROOT/"nbs"/"experiments"]
names = dict(ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "weights", "runs")
    for name in "nbs", "dr2seg_lib": shutil.copytree(ROOT/name, folder/name, ignore=ignored)
    for name in "settings.ini", "setup.py": shutil.copy(ROOT/name, folder/name)
    return folder


def nbdev(command, folder):
    done = subprocess.run([BIN/command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_what_the_notebooks_export(copy):
    before = {p.relative_to(ROOT) for p in (ROOT/"dr2seg_lib").rglob("*.py")}
    shutil.rmtree(copy/"dr2seg_lib")
    nbdev("nbdev_export", copy)
    after = {p.relative_to(copy) for p in (copy/"dr2seg_lib").rglob("*.py")}
    assert before == after, "a module without its notebook, or the other way round"
    stale = [str(p) for p in sorted(before) if (ROOT/p).read_text() != (copy/p).read_text()]
    assert not stale, f"run nbdev_export: {stale} differ from their notebooks"


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    dirty = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_bytes() != (copy/p.relative_to(ROOT)).read_bytes()]
    assert not dirty, f"run nbdev_clean: {dirty}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name != "tours"], **names)
def test_notebook_has_no_outputs(path):
    "Only the tours keep what they show."
    cells = json.loads(path.read_text())["cells"]
    assert not any(c.get("outputs") for c in cells), f"clear the outputs of {path.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, **names)
def test_the_title_is_the_one_heading_of_first_rank(path):
    "Prose behind a stray # would be shown as headings, line by line."
    said = [re.sub(r"```.*?```", "", "".join(c["source"]), flags=re.S) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
    titles = [line for text in said for line in text.splitlines() if re.match(r"# |#$", line)]
    assert titles == said[0].splitlines()[:1], f"{path.name}: {titles[1:] or titles}"


def test_a_room_imports_only_from_rooms_before_it():
    rooms = [p.stem[3:] for p in LIBRARY]
    for place, room in enumerate(rooms):
        text = (ROOT/"dr2seg_lib"/f"{room}.py").read_text()
        used = re.findall(r"^from \.(\w+) import", text, re.M) + [n.split(" as ")[0].strip() for line in re.findall(r"^from \. import (.*)", text, re.M) for n in line.split(",")]
        assert set(used) <= set(rooms[:place]), f"{room} imports {sorted(set(used) - set(rooms[:place]))}, which come after it"


@pytest.mark.parametrize("path", EXPERIMENTS, **names)
def test_experiment_has_one_parameters_cell(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("name, config", [("train", TrainConfig), ("evaluate", EvaluateConfig), ("rea2seg", Rea2SegConfig)])
def test_the_parameters_of_an_experiment_are_those_of_its_configuration(name, config):
    cells, found = json.loads((ROOT/"nbs"/"experiments"/f"{name}.ipynb").read_text())["cells"], {}
    exec("".join(next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"]), {}, found)
    assert set(found) - {"out", "resume"} == set(config.model_fields)
    assert config(**{k: found[k] for k in config.model_fields}) == config()


@pytest.mark.parametrize("path", LIBRARY, **names)
def test_library_notebook_runs(path):
    "Each in a kernel of its own, without the cells marked `#| eval: false`."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*eval:\s*false", c.source, re.M)]
    NotebookClient(nb, timeout=600, kernel_manager_class=kernel_class(),
                   resources={"metadata": {"path": str(path.parent)}}).execute()


def test_installed_package_follows_settings():
    "setup.py takes everything from settings.ini, and what it asks for is what is installed."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini")
    settings = config["DEFAULT"]
    asked = [Requirement(r) for r in metadata.requires("dr2seg_lib")]
    assert metadata.version("dr2seg_lib") == settings["version"]
    runtime = {f"{r.name}{r.specifier}" for r in asked if r.marker is None}
    assert runtime == set(settings["requirements"].split()), "run make install"
    for extra in ("dev", "bench"):
        mine = {f"{r.name}{r.specifier}" for r in asked if r.marker and r.marker.evaluate({"extra": extra})}
        assert mine == set(settings[f"{extra}_requirements"].split())
    here = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": "dev"})] # bench is installed by who runs it
    wrong = [str(r) for r in here if metadata.version(r.name).split("+")[0] not in r.specifier]
    assert not wrong, f"installed in other versions: {wrong}"


def test_sam2_is_the_pinned_one():
    line = (ROOT/"requirements-sam2.txt").read_text().splitlines()[-1]
    assert line.split()[0] == f"sam2=={metadata.version('sam2')}" and "--hash=sha256:" in line


def test_no_large_file_is_tracked():
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT/f for f in tracked.split("\0") if f and (ROOT/f).is_file()]
    large = [f"{f.relative_to(ROOT)}: {f.stat().st_size >> 20} MiB" for f in files if f.stat().st_size > 20 << 20]
    assert not large, f"over 20 MiB: {large}"
