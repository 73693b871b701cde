"Questions by likeness: where they lie, what is refused, and a lasso drawn by hand."

import json

import browser
import numpy as np
import pytest
from invented_runs import make_run
from scipy.spatial.distance import pdist

from dr2seg_lib.viewing.embedding import embedding, principal_components
from dr2seg_lib.viewing.grid import Grid


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "star", steps=8, samples=16)


def test_components_keep_the_distances_of_a_plane():
    rng = np.random.default_rng(3)
    plane = np.linalg.qr(rng.normal(size=(40, 2)))[0]
    points = rng.normal(size=(60, 2)) @ plane.T + rng.normal(size=40)
    assert np.allclose(pdist(principal_components(points)), pdist(points))


def test_alike_questions_lie_together(run):
    view = embedding(run, "question")
    groups, places = view.places()
    queries = [view.run.groups["evaluation"][g][0]["query"] for g in groups]
    by_words = {}
    for query, place in zip(queries, places):
        by_words.setdefault(query, []).append(place)
    for same in by_words.values():
        assert np.allclose(same, same[0], atol=1e-5)
    assert len({tuple(p.round(4)) for p in places}) == len(by_words)


@pytest.mark.parametrize("feature", ["target", "picture", "question"])
def test_every_question_has_a_dot_once(run, feature):
    view = embedding(run, feature, source="rollouts")
    chart = view.charts()["embedding"]
    assert sum(len(mark.x) for mark in chart.panels[0].marks) == len(view.run.groups["rollouts"])
    assert sorted(g for own in view.traces for g in own) == list(
        range(len(view.run.groups["rollouts"]))
    )


def test_what_is_chosen_is_shown_in_a_grid(run):
    view = embedding(run)
    view.chosen = [1, 4]
    assert isinstance(view.held, Grid)
    assert {row["sample"] for row in map(view.held.table.record, view.held.fits)} == {
        view.run.groups["evaluation"][g][0]["sample"] for g in (1, 4)
    }
    view.held.filter = "lasso=yes iou<0.5"  # it is a field like others
    assert view.held.wrong == ""
    view.chosen = [2]
    assert {view.held.table.columns["group"][row] for row in view.held.fits} == {2}
    view.chosen = []
    assert view.held is None


@pytest.mark.parametrize(
    "words", [dict(feature="colour"), dict(projection="t"), dict(source="x"), dict(colour="x")]
)
def test_what_is_not_known_is_a_sentence(run, words):
    with pytest.raises(ValueError, match=f"{next(iter(words))} .* is not known; use "):
        embedding(run, **words)


def test_umap_that_is_not_installed_is_a_sentence(run):
    try:
        import umap  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install umap-learn, or use pca"):
            embedding(run, projection="umap").still()
    else:
        assert embedding(run, projection="umap").places()[1].shape == (16, 2)


def test_a_run_of_somebody_else_without_pictures(tmp_path):
    "Rows written by hand, of samples that nobody has."
    (tmp_path / "run.json").write_text(json.dumps(dict(status="done", parameters=dict(data="x"))))
    row = dict(
        query="<script>window.__pwned=1</script>{hover}", text="", iou=0.5, tokens=3, i=1, u=2
    )
    rows = [row | dict(sample=f"photo-{i}") for i in range(3)]
    for when in "before", "after":
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / f"predictions_{when}.jsonl").write_text(text)
    assert embedding(tmp_path).charts() == {}
    embedding(tmp_path).still()
    view = embedding(tmp_path, "question")
    assert len(view.places()[0]) == 3
    assert "<script>" not in view.charts()["embedding"].plotly().to_json()


def test_an_empty_folder_and_none(tmp_path):
    embedding(tmp_path).still()
    with pytest.raises(FileNotFoundError, match="check the run folder's name"):
        embedding(tmp_path / "nowhere")


# ---- as it is used: JupyterLab in a browser


@pytest.mark.browser
def test_a_lasso_shows_its_answers(run, tmp_path):
    cells = [
        "from dr2seg_lib.viewing.embedding import embedding\n"
        f"view = embedding({str(run)!r}, source='rollouts')\nview"
    ]
    browser.notebook(tmp_path / "views.ipynb", cells)
    with browser.jupyterlab(tmp_path) as address, browser.browser(1300, 1200) as page:
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        browser.opened(page, address, "views.ipynb")
        browser.command(page, "notebook:run-all-cells")
        plot = page.locator(".d2-embedding .plot-container .nsewdrag").first
        plot.wait_for()
        page.wait_for_timeout(500)
        box = plot.bounding_box()
        x, y, w, h = (box[k] for k in ("x", "y", "width", "height"))
        page.mouse.move(x + 2, y + 2)
        page.mouse.down()
        for right, down in (0.99, 0.01), (0.99, 0.99), (0.01, 0.99), (0.01, 0.02):
            page.mouse.move(x + right * w, y + down * h, steps=6)
        page.mouse.up()
        grid = page.locator(".d2-embedding .d2-browse")
        grid.wait_for()
        assert grid.get_by_label("filter").first.input_value() == "lasso=yes"
        page.get_by_text("questions chosen").wait_for()
        page.get_by_label("likeness of").select_option("question")  # another chart, nothing chosen
        grid.wait_for(state="detached")
        assert not errors
