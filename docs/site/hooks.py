"""What mkdocs needs to know of this repository.

A page's address is its path in the repository, so that a link that works on the web works on the
site. Notebooks are rendered by mkdocs-jupyter with the outputs that are committed; nothing is run.
Equations become MathML here, and notebooks share one style sheet, so that no page fetches a script
and none carries half a megabyte of styles.
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
    "docs/*.gif",
    "docs/site/*.css",
    "nbs/**/*.ipynb",
    "benchmarks/results/*",
    "scripts/slurm/*.sbatch",
    "tests/rehearsal/*.py",
    "dr2seg_lib/weights/*/README.md",
)


def served_paths():
    "The files of the site, as paths in the repository."
    paths = sorted(path for pattern in SERVED for path in ROOT.glob(pattern))
    return [p.relative_to(ROOT) for p in paths if ".ipynb_checkpoints" not in p.parts]


def imported_siblings(module: Path, names: set):
    "The modules of the same folder that a module imports."
    package = f"dr2seg_lib.{module.parent.name}"
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = "." * node.level + (node.module or "")
        if name in (".", package):
            yield from names & {alias.name for alias in node.names}
        elif name.startswith(package + ".") or node.level == 1:
            yield from names & {name.rpartition(".")[2]}


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
    kept = [file for file in files if file.src_dir != config.docs_dir]  # the theme's own
    pages = [
        File(path.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in served_paths()
    ]
    return Files([*kept, *pages])


FENCED = re.compile(r"(<(pre|code|script|style|svg|textarea)\b.*?</\2>)", re.S)
MATH = re.compile(
    r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]"
    r"|\$\$(?P<notebook_block>.+?)\$\$|\$(?P<notebook_inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)",
    re.S,
)
ONE = re.compile(r"\\mathbb\s*(?:\{1\}|1)")  # browsers have no double-struck digit but this letter


def to_mathml(match):
    "One equation."
    kind, tex = next((k, v) for k, v in match.groupdict().items() if v)
    display = "block" if kind.endswith("block") else "inline"
    return convert(ONE.sub("𝟙", html.unescape(tex)), display=display)


def with_mathml(page: str) -> str:
    "A page with its equations as MathML; code stays as it is."
    pieces = FENCED.split(page)  # text, code, the code's tag, text, …
    texts = [MATH.sub(to_mathml, piece) for piece in pieces[::3]]
    codes = pieces[1::3] + [""]
    return "".join(text + code for text, code in zip(texts, codes, strict=True))


MARKDOWN_CELL = re.compile(r'<div class="[^"]*jp-RenderedMarkdown.*?</div>', re.S)
STYLE_OR_SCRIPT = re.compile(r"<(style|script)\b[^>]*>(.*?)</\1>", re.S)
STYLE_SHEET = "assets/notebook.css"
FETCHING = "MathJax", "mermaid", "jupyter-widgets"  # scripts of nbconvert that load others
styles = {}  # what the notebooks' pages share, in order


def without_shared_parts(content: str, root: str) -> str:
    "A notebook's page that links to the shared style sheet and fetches no script."

    def shared(match):
        kind, text = match.groups()
        if kind == "script":
            is_empty = 'src=""' in match[0] and not text.strip()
            fetches = is_empty or any(name in text for name in FETCHING)
            return "" if fetches else match.group()
        if len(text) < 50_000:
            return match.group()
        styles[text] = True
        return f'<link rel="stylesheet" href="{root}{STYLE_SHEET}">'

    return STYLE_OR_SCRIPT.sub(shared, content)


def with_page_links(content: str) -> str:
    "A notebook's page whose links to notebooks and pages lead to their pages on the site."
    content = re.sub(r'(href="(?!https?:)[^"#]*)\.(?:ipynb|md)(["#])', r"\1.html\2", content)
    return content.replace('README.html"', 'index.html"')


def on_page_markdown(markdown, page, config, files):
    "A link to a folder of notebooks leads to its first chapter."
    return re.sub(r"\]\((nbs/\w+)\)", lambda m: f"]({chapters(m.group(1))[0]})", markdown)


def on_page_content(content, page, config, files):
    if not page.file.src_uri.endswith(".ipynb"):
        return with_mathml(content)
    root = "../" * page.file.src_uri.count("/")
    content = with_page_links(without_shared_parts(content, root))
    return MARKDOWN_CELL.sub(lambda cell: with_mathml(cell.group()), content)


def on_post_build(config):
    sheet = Path(config.site_dir, STYLE_SHEET)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.write_text("\n".join(styles))
