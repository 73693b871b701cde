"The wheel, away from the checkout: built, installed into an environment of its own, and run."

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = "dr2seg_lib", "nbs", "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"
FIRST_STEP = dict(steps=1, prompts=2, samples=2, max_new_tokens=12, eval_samples=2, record=1)


def run(*command, **options):
    "A command that must succeed."
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def environment():
    "That of this process, without what leads to the checkout."
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that the checkout gets no build folder."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = sys.executable, "-m", "pip"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The folder of an environment that holds the wheel, and sees the packages of this one."
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip = sys.executable, "-m", "pip", "--python", folder / "bin" / "python"
    run(*pip, "install", "--no-deps", "--no-index", wheel, env=environment())
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return folder


def files_below(folder):
    "The files that are no code, relative to the checkout's package."
    paths = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT).as_posix() for p in paths if p.suffix not in (".py", ".pyc")}


def test_the_wheel_holds_the_package_and_its_notebooks(wheel):
    with ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("dr2seg_lib/")}
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dr2seg_lib").rglob("*.py")}
    notebooks = {
        f"dr2seg_lib/notebooks/{p.relative_to(ROOT / 'nbs').as_posix()}"
        for kind in ("experiments", "tours")
        for p in (ROOT / "nbs" / kind).glob("*.ipynb")
    }
    assert packed == code | files_below(ROOT / "dr2seg_lib") | notebooks


@pytest.mark.slow
def test_the_installed_package_is_not_the_checkout(installed, tmp_path):
    program = "import dr2seg_lib; print(dr2seg_lib.__file__)"
    place = run(installed / "bin" / "python", "-c", program, cwd=tmp_path, env=environment())
    assert Path(place.strip()).is_relative_to(installed)


@pytest.mark.slow
def test_the_installed_command_trains_in_an_empty_folder(installed, tmp_path):
    pairs = [text for name, value in FIRST_STEP.items() for text in ("-p", name, str(value))]
    dr2seg = installed / "bin" / "dr2seg"
    shown = run(dr2seg, "run", "train", *pairs, cwd=tmp_path, env=environment())
    (folder,) = (tmp_path / "runs").iterdir()
    assert "before" in shown
    assert (folder / "report.html").exists()
    assert "done" in run(dr2seg, "runs", cwd=tmp_path, env=environment())
