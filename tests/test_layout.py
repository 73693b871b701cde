"The repository as a whole, without running any of it: exports, packages, prose, links."

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from urllib.parse import unquote

import pytest

from dr2seg_lib.core.parameters import EvaluateConfig, Rea2SegConfig, TrainConfig
from dr2seg_lib.core.settings import SweepSettings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
LIBRARY = [p for p in NOTEBOOKS if "#| default_exp" in p.read_text()]
MODULES = [
    p for p in (ROOT / "dr2seg_lib").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
]
TOURS = [p for p in NOTEBOOKS if p.parent.name == "tours"]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# A package imports only from those before it; the list is the reading order.
ORDER = (
    "core data runs models segmenters scorers rollouts methods evaluation training rehearsal "
    "experiments viewing commands cli pretraining"
).split()
README_WORDS = 900
CELL_LINES = 25


def from_root(path):
    return str(path.relative_to(ROOT))


# ---- what nbdev writes


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
        from_root(p)
        for p in NOTEBOOKS
        if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()
    ]
    assert not dirty, f"run nbdev_clean: {dirty}"


# ---- packages


def module_files(base, names):
    "The files that `from base import names` reads: a module's, or those of a package's modules."
    for name in names:
        candidates = (base / name).with_suffix(".py"), base.with_suffix(".py")
        yield from [file.resolve() for file in candidates if file.exists()][:1]


def imports_of(path):
    "The modules of the library that a module imports, as file paths."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".")
        if not node.level and parts[0] != "dr2seg_lib":
            continue
        base = path.parents[node.level - 1] if node.level else ROOT
        yield from module_files(base.joinpath(*parts), [alias.name for alias in node.names])


def package_of(path):
    return path.relative_to(ROOT / "dr2seg_lib").with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=from_root)
def test_a_package_imports_only_from_packages_before_it(path):
    own = ORDER.index(package_of(path))
    upward = [from_root(p) for p in imports_of(path) if ORDER.index(package_of(p)) > own]
    assert not upward


def test_no_module_imports_itself_by_a_detour():
    graph = {p: set(imports_of(p)) for p in MODULES}
    TopologicalSorter(graph).prepare()  # raises a CycleError


def public_definitions(path):
    "The functions and classes of a module; what is patched into a class has its class's name."
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not any("patch" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield node.name


def test_a_public_name_means_one_thing():
    places = {}
    for path in MODULES:
        for name in public_definitions(path):
            places.setdefault(name, set()).add(from_root(path))
    rewards = "dr2seg_lib/methods/visionreasoner.py", "dr2seg_lib/methods/seg_zero.py"
    assert places.pop("score") == {*rewards}  # each paper's reward, by its module's name
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert not twice, f"another name for one of them: {twice}"


def packages_in(text, pattern):
    "The packages that a text names, in its order."
    names = re.findall(pattern, text, re.M)
    return [name for name in names if name in ORDER]


def test_the_readme_names_the_packages_in_reading_order():
    readme = (ROOT / "README.md").read_text()
    assert packages_in(readme, r"\]\(nbs/(\w+)(?:\.ipynb)?\)") == ORDER


def test_the_site_has_the_packages_in_reading_order():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert packages_in(navigation, r"^ +- (\w+): nbs/") == ORDER


# ---- notebooks as chapters


def exported_cells(path):
    "The non-empty lines of each exported cell of a notebook, without its directives."
    for cell in json.loads(path.read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "code" and any(re.match(r"#\|\s*export", x) for x in lines):
            yield [line for line in lines if line.strip() and not line.startswith("#|")]


@pytest.mark.parametrize("path", LIBRARY, ids=from_root)
def test_an_exported_cell_can_be_seen_at_once(path):
    long = [(lines[0], len(lines)) for lines in exported_cells(path) if len(lines) > CELL_LINES]
    assert not long, f"{path.name}: at most {CELL_LINES} lines, else it has two jobs: {long}"


@cache
def prose(path):
    "The Markdown cells of a notebook."
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=from_root)
def test_the_title_is_the_one_heading_of_first_rank(path):
    "Prose behind a stray # would be shown as headings, line by line."
    texts = [re.sub(r"```.*?```", "", text, flags=re.S) for text in prose(path)]
    titles = [line for text in texts for line in text.splitlines() if re.match(r"# |#$", line)]
    assert titles == texts[0].splitlines()[:1], f"{path.name}: {titles[1:] or titles}"


@pytest.mark.parametrize("path", LIBRARY, ids=from_root)
def test_a_chapter_says_in_a_line_what_it_is(path):
    assert re.match(r"# .+\n\n> .+", prose(path)[0])


def citations(text):
    "The sections of docs/methods.md that a text cites."
    for listed in re.findall(r"docs/methods\.md ((?:§[\w.]+(?:, | and )?)+)", text):
        yield from re.findall(r"§(\d+)", listed)


@pytest.mark.parametrize("folder", ["nbs", "tests", "benchmarks", "docs"])
def test_every_cited_section_of_the_methods_exists(folder):
    headings = re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "methods.md").read_text(), re.M)
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".ipynb", ".py", ".md")]
    cited = {section for p in files for section in citations(p.read_text())}
    assert cited <= set(headings)


def test_nothing_cites_a_page_that_is_not_here():
    outside = [from_root(p) for p in NOTEBOOKS if re.search(r"\bMETHODS §", p.read_text())]
    assert not outside


# ---- pages


def links(text):
    "The relative links and pictures of a page, without anchors."
    code = re.sub(r"```.*?```", "", text, flags=re.S)
    targets = re.findall(r"\]\(([^)#\s]+)", code) + re.findall(r'(?:src|href)="([^"#]+)"', code)
    return [unquote(t) for t in targets if "://" not in t]


@pytest.mark.parametrize("path", PAGES, ids=from_root)
def test_links_of_a_page_lead_somewhere(path):
    assert not [t for t in links(path.read_text()) if not (path.parent / t).exists()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=from_root)
def test_links_of_a_chapter_lead_somewhere(path):
    targets = [t for text in prose(path) for t in links(text)]
    assert not [t for t in targets if not (path.parent / t).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


@pytest.mark.parametrize("path", PAGES, ids=from_root)
def test_commands_of_a_page_exist(path):
    text = path.read_text()
    experiments = set(re.findall(r"dr2seg run (\w+)", text))
    targets = set(re.findall(r"^(?:`)?make (\w+)", text, re.M))
    known = {p.stem for p in (ROOT / "nbs" / "experiments").glob("*.ipynb")}
    assert experiments - known <= {"EXPERIMENT"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def parameters_of(config):
    "The dotted names of a configuration, and of each group with a `name` the short one."
    for name, field in config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None or "name" in inner:
            yield name
        yield from (f"{name}.{part}" for part in inner or ())


@cache
def known_parameters():
    "Every parameter that some experiment takes."
    kinds = TrainConfig, EvaluateConfig, Rea2SegConfig, SweepSettings
    names = set().union(*map(parameters_of, kinds))
    for path in (ROOT / "nbs" / "experiments").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                names |= set(re.findall(r"^(\w+) =", "".join(cell["source"]), re.M))
    return names


@pytest.mark.parametrize("path", [*PAGES, *TOURS], ids=from_root)
def test_parameters_of_a_page_exist(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("it names what is gone")
    text = "\n".join(prose(path)) if path.suffix == ".ipynb" else path.read_text()
    names = set(re.findall(r"(?<![\w-])-p\s+([a-z_][\w.]*)", text))
    assert names - known_parameters() <= {"stpes"}


def test_the_changelog_knows_this_version():
    settings = (ROOT / "settings.ini").read_text()
    version = re.search(r"^version = (\S+)", settings, re.M)[1]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- the site


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is missing; run make install")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "docs" / "methods.html").exists()
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    fetching = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?:|embed-amd|mermaid.esm')
    assert not [page[:200] for page in pages if fetching.search(page)]
