"""What mkdocs needs to know of this repository.

A page's address is its path in the repository, so that a link that works on the web works on the
site. Notebooks are rendered by mkdocs-jupyter with the outputs that are committed; nothing is run.
Equations become MathML here, so that no script is fetched.
"""

import ast
import html
import re
from graphlib import TopologicalSorter
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SERVED = (
    "*.md",
    "docs/*.md",
    "docs/*.png",
    "docs/site/*.css",
    "nbs/**/*.ipynb",
    "benchmarks/results/*",
    "dr2seg_lib/weights/*/README.md",
)


def served_paths():
    "The files of the site, as paths in the repository."
    paths = sorted(path for pattern in SERVED for path in ROOT.glob(pattern))
    return [p.relative_to(ROOT) for p in paths if ".ipynb_checkpoints" not in p.parts]


def imported_siblings(module: Path, names: set):
    "The modules of the same folder that a module imports."
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            last = (node.module or "").rpartition(".")[2]
            yield from names & {last, *(alias.name for alias in node.names)}


def chapters(folder: str):
    "The notebooks of a folder in reading order: what imports another comes after it."
    notebooks = sorted(Path(ROOT, folder).glob("*.ipynb"))
    package = ROOT / "dr2seg_lib" / Path(folder).name
    exported = {p.stem for p in notebooks if (package / f"{p.stem}.py").exists()}
    graph = TopologicalSorter()
    for name in sorted(exported):
        siblings = set(imported_siblings(package / f"{name}.py", exported - {name}))
        graph.add(name, *sorted(siblings))
    others = [p.stem for p in notebooks if p.stem not in exported]
    return [f"{folder}/{name}.ipynb" for name in [*graph.static_order(), *others]]


def expanded(item):
    "A line of the navigation, with its folder in chapters."
    if isinstance(item, dict):
        return {title: expanded(target) for title, target in item.items()}
    if isinstance(item, list):
        return [expanded(entry) for entry in item]
    return chapters(item) if Path(ROOT, item).is_dir() else item


def on_config(config):
    config.nav = expanded(config.nav)
    return config


@event_priority(100)  # before mkdocs-jupyter, which takes the notebooks from these
def on_files(files, config):
    kept = [file for file in files if file.abs_src_path is None or file.generated_by]
    pages = [
        File(path.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in served_paths()
    ]
    return Files([*kept, *pages])


FENCED = re.compile(r"(<(pre|code|script|style|svg|textarea)\b.*?</\2>)", re.S)
MATH = re.compile(
    r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]"
    r"|\$\$(?P<block2>.+?)\$\$|\$(?P<inline2>[^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)",
    re.S,
)
CELL = re.compile(r'(<div class="[^"]*jp-RenderedMarkdown.*?</div>)', re.S)


def to_mathml(match):
    "One equation."
    kind, tex = next((k, v) for k, v in match.groupdict().items() if v)
    display = "block" if kind.startswith("block") else "inline"
    return convert(html.unescape(tex), display=display)


def with_mathml(page: str) -> str:
    "A page with its equations as MathML; code stays as it is."
    pieces = FENCED.split(page)
    texts = [MATH.sub(to_mathml, piece) for piece in pieces[::3]]
    codes = pieces[1::3] + [""]
    return "".join(text + code for text, code in zip(texts, codes))


def on_page_content(content, page, config, files):
    if not page.file.src_uri.endswith(".ipynb"):
        return with_mathml(content)
    content = re.sub(r'(href="(?!https?:)[^"#]*)\.(?:ipynb|md)(["#])', r"\1.html\2", content)
    content = content.replace('README.html"', 'index.html"')
    return CELL.sub(lambda cell: with_mathml(cell.group()), content)
