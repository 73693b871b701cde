"The tours: they run, and what they show is whole."

import json
import re
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import pytest
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from dr2seg_lib.commands.execute import kernel_class
from dr2seg_lib.commands.parameters_cell import parameters_of

TOURS = sorted((Path(__file__).parents[1] / "nbs" / "tours").glob("*.ipynb"))
LITTLE = {
    "00_tour": dict(steps=1),
    "01_idea": dict(questions=2),
    "04_grpo_step_by_step": dict(steps=1, prompts=1),
    "05_your_own_reward": dict(steps=1, prompts=2),
    "06_your_own_data": dict(steps=1),
}  # a smaller budget than a reader's
each = pytest.mark.parametrize("path", TOURS, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def prose(path):
    return ["".join(c["source"]) for c in cells(path, "markdown")]


def outputs(path):
    return list(chain.from_iterable(c["outputs"] for c in cells(path, "code")))


def text_of(output):
    "All text of an output, with the JSON of its text formats."
    formats = {k: v for k, v in output.get("data", {}).items() if k.startswith("text/")}
    return "".join(output.get("text", "")) + json.dumps(formats)


def local_links(text):
    "The links of a text that do not lead to the web."
    return [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]


@pytest.mark.slow
@each
def test_tour_runs(path):
    "From top to bottom in a kernel of its own."
    nb = load_notebook_node(str(path))
    if path.stem in LITTLE:
        assert LITTLE[path.stem].keys() <= parameters_of(path).keys()
        nb = parameterize_notebook(nb, LITTLE[path.stem])
    NotebookClient(
        nb,
        timeout=600,
        kernel_manager_class=kernel_class(),
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()


@each
def test_what_a_tour_shows_is_whole(path):
    "The committed outputs: there, without errors, warnings and paths, and not too heavy."
    shown = outputs(path)
    assert shown
    assert not [o for o in shown if o["output_type"] == "error" or o.get("name") == "stderr"]
    texts = "".join(map(text_of, shown))
    assert not re.search(r"/(tmp|home|root|work)/", texts), "a path of the machine it ran on"
    assert path.stat().st_size < 800_000


@each
def test_a_tour_says_what_it_is_and_where_to_go(path):
    first, *_, last = prose(path)
    assert re.match(r"# (?!#).+\n\n", first), "a title, then what the reader will know"
    assert "## Where to go next" in last


@each
def test_links_of_a_tour_lead_somewhere(path):
    links = list(chain.from_iterable(map(local_links, prose(path))))
    assert links
    assert not [link for link in links if not (path.parent / unquote(link)).exists()]
