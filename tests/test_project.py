"The project as a whole: notebooks run, parameters, versions and files agree."

import json
import subprocess
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import notebooks
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dr2seg_lib.commands.parameters_cell import parameters_of
from dr2seg_lib.core.parameter_names import flat_parameters, nested_parameters
from dr2seg_lib.core.parameters import EvaluateConfig, Rea2SegConfig, TrainConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
LIBRARY = [p for p in NOTEBOOKS if "#| default_exp" in p.read_text()]
EXPERIMENTS = [p for p in NOTEBOOKS if p.parent.name == "experiments" and p not in LIBRARY]
names = dict(ids=lambda p: str(p.relative_to(ROOT / "nbs").with_suffix("")))


@pytest.mark.parametrize("path", EXPERIMENTS, **names)
def test_experiment_has_one_parameters_cell(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize(
    "name, config",
    [("train", TrainConfig), ("evaluate", EvaluateConfig), ("rea2seg", Rea2SegConfig)],
)
def test_the_parameters_cell_of_an_experiment_fits_its_configuration(name, config):
    path = ROOT / "nbs" / "experiments" / f"{name}.ipynb"
    declared = parameters_of(path)
    own = {"preset"} if name in ("train", "evaluate") else set()
    assert declared.keys() == {"config", "out", "resume"} | own
    assert config(**declared["config"]) == config()
    assert "globals()" not in path.read_text()


@pytest.mark.parametrize("name", ["ablate", "compare"])
def test_the_config_of_a_sweep_is_one_of_a_training(name):
    declared = parameters_of(ROOT / "nbs" / "experiments" / f"{name}.ipynb")
    config = TrainConfig(**declared["config"])
    assert (
        nested_parameters({n: config.flat()[n] for n in flat_parameters(declared["config"])})
        == (declared["config"])
    )


@pytest.fixture(scope="module")
def python():
    with notebooks.kernel() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("path", LIBRARY, **names)
def test_library_notebook_runs(path, python):
    "The text that its cells show is what is committed."
    assert not notebooks.stale_cells(path, python.execute(path))


def settings_of(checkout):
    "What settings.ini says."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(checkout / "settings.ini")
    return config["DEFAULT"]


SETTINGS = settings_of(ROOT)
EXTRAS = [f.removesuffix("_requirements") for f in SETTINGS if f.endswith("_requirements")]


def requirements(field):
    "{name: range} of one list of settings.ini."
    asked = map(Requirement, SETTINGS[field].split())
    return {canonicalize_name(r.name): r.specifier for r in asked}


def pinned():
    "{name: version} of constraints.txt."
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def installed_requirements(extra=None):
    "{name: range} that the installed package asks for."
    asked = map(Requirement, metadata.requires("dr2seg_lib"))
    if extra:
        chosen = [r for r in asked if r.marker and r.marker.evaluate({"extra": extra})]
    else:
        chosen = [r for r in asked if r.marker is None]
    return {canonicalize_name(r.name): r.specifier for r in chosen}


def test_the_installed_package_has_the_version_of_settings():
    assert metadata.version("dr2seg_lib") == SETTINGS["version"]


def test_the_installed_package_asks_for_what_settings_say():
    assert installed_requirements() == requirements("requirements"), "run make install"


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_installed_extras_are_those_of_settings(extra):
    assert installed_requirements(extra) == requirements(f"{extra}_requirements")


@pytest.mark.parametrize("field", ["requirements", *(f"{e}_requirements" for e in EXTRAS)])
def test_every_requirement_is_pinned_within_its_range(field):
    pins = pinned()
    outside = [
        n for n, specifier in requirements(field).items() if pins.get(n, "0") not in specifier
    ]
    assert not outside


def test_what_is_installed_is_what_is_pinned():
    "bench is installed by who runs it."
    pins, fields = pinned(), ("requirements", "sam2_requirements", "dev_requirements")
    names = set().union(*map(requirements, fields))
    versions = {name: metadata.version(name).split("+")[0] for name in names}
    assert versions == {name: pins[name] for name in names}


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
