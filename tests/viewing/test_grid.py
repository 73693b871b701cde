"The grid of answers: one filter in two languages, files that stay whole, and a person at it."

import csv
import json
import os
import random
import time

import browser
import hostile_runs as hostile
import pytest
from browser import chromium
from invented_runs import make_run

from dr2seg_lib.core.files import read_json, read_jsonl, write_json
from dr2seg_lib.runs.annotations import read_annotations
from dr2seg_lib.viewing.grid import grid
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.row_filter import filter_rows
from dr2seg_lib.viewing.run_reader import RunReader
from dr2seg_lib.viewing.view import view_script


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run-1", steps=12, samples=24)


def sent(view):
    "The view's state as it goes to the browser; JSON, without numbers that are none."
    names = "about source filter sort fields selected views known histograms found wrong".split()
    state = view.get_state()
    return json.dumps({name: state[name] for name in names}, allow_nan=False)


def drawn(view, rows):
    "What the painter sends of some rows."
    told = []
    view.send = lambda content, buffers=None: told.append((content, buffers))
    view._asked(view, dict(ask="thumbs", rows=rows), [])
    until = time.monotonic() + 120
    while view.painter.thread and time.monotonic() < until:
        time.sleep(0.02)
    return told


# ---- the kernel's side


def test_what_fits_is_what_the_records_say(whole):
    view, rows = grid(whole), read_jsonl(whole / "rollouts.jsonl")
    view.filter, view.sort, view.down = "reward>2 tokens<120", "reward", True
    fitting = [
        i for i, r in enumerate(rows) if r["reward"] > 2 and r["first"]["think_tokens"] < 120
    ]
    assert sorted(view.fits) == fitting
    rewards = [rows[i]["reward"] for i in view.fits]
    assert rewards == sorted(rewards, reverse=True)
    counts = next(h for h in view.histograms if h["field"] == "reward")
    assert sum(counts["fit"]) == len(fitting)
    assert sum(counts["every"]) == len(rows)
    view.source = "evaluation"
    assert view.filter == ""
    assert view.found["every"] == 48


def test_a_brush_is_words_of_the_filter(whole):
    view = grid(whole)
    view.filter = "difficulty=easy"
    view._asked(view, dict(ask="brush", field="tokens", low=20.0, high=40.0), [])
    view._asked(view, dict(ask="brush", field="tokens", low=10.0, high=60.0), [])
    assert view.filter == "difficulty=easy tokens>=10 tokens<60"
    asked = {h["field"]: h["asked"] for h in view.histograms}
    assert asked["tokens"] == {">=": "10", "<": "60"}
    view._asked(view, dict(ask="clear", field="tokens"), [])
    assert view.filter == "difficulty=easy"
    kept = view.fits
    view.filter = "nonsense>1"
    assert "there is no field" in view.wrong
    assert view.fits == kept


def test_exports_and_links_lead_back(whole, tmp_path):
    view = grid(whole)
    view.filter = "reward>2"
    view.select(1, 3)
    path = view.export(tmp_path / "some.csv")
    table = list(csv.DictReader(path.open()))
    chosen = [read_jsonl(whole / "rollouts.jsonl")[row] for row in view.selected]
    assert [(int(t["step"]), t["sample"], float(t["reward"])) for t in table] == [
        (r["step"], r["sample"], r["reward"]) for r in chosen
    ]
    assert view.selection == read_jsonl(view.export(tmp_path / "some.jsonl"))
    there = eval(view.link(view.selected[2]), dict(inspect=inspect))  # the line itself
    assert there.step == chosen[2]["step"]
    assert there.selected["first"]["text"] == chosen[2]["first"]["text"]
    with pytest.raises(ValueError, match=r"run-1 has no sample 'mini-7'; its steps are 1 to 12"):
        inspect(whole, sample="mini-7")
    with pytest.raises(ValueError, match="neither CSV nor JSON lines; end its name in"):
        view.export(tmp_path / "some.xlsx")


def test_a_folder_that_cannot_be_written_says_so(whole, tmp_path):
    "Exports do not leave the run's folder through a link, and nothing is lost where none can be."
    run = make_run(tmp_path / "run", steps=12, samples=2)
    (tmp_path / "elsewhere").mkdir()
    (run / "exports").symlink_to(tmp_path / "elsewhere")
    view, told = grid(run), []
    view.send = lambda content, buffers=None: told.append(content)
    view._asked(view, dict(ask="export", suffix=".csv"), [])
    assert "exports is a link; remove it" in told[0]["told"]
    assert not os.listdir(tmp_path / "elsewhere")
    (run / "views.json").mkdir()
    view._asked(view, dict(ask="save", name="mine"), [])
    assert told[1]["failed"]
    assert view.views == {}


def test_views_of_a_stranger(whole, tmp_path):
    "What fits of views.json is offered; another's view of another run is a sentence."
    run = make_run(tmp_path / "run", steps=12, samples=2)
    good = dict(source="rollouts", filter="mood=good", sort="nowhere", fields=["nothing"])
    write_json(run / "views.json", dict(views=dict(good=good, bad=dict(filter=3)), mine=1))
    view = grid(run)
    assert list(view.views) == ["good"]
    assert "views.json" in view.about["missing"]
    view.load_view("good")
    assert view.wrong.startswith("there is no field")
    assert len(view.fits) == len(view.table)
    (run / "views.json").write_text("[")
    assert grid(run).views == {}


def test_hostile_runs_open(tmp_path):
    "Whatever a folder holds: a grid of what fits, with pictures or the reason why there is none."
    for folder in hostile.cases(tmp_path, 25):
        view = grid(folder)
        sent(view)
        for source in view.about["sources"]:
            view.source = source
            view.fields = view.known
            sent(view)
            some = view.fits[:2]
            for content, buffers in drawn(view, some):
                assert buffers or content["note"]
            view._on_cells(0, 5)
            view.selected = view.fits
            view.export(folder / "out.csv")
        assert view.still()._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")


# ---- the drawing side


@pytest.mark.skipif(not chromium(), reason="no Chromium is installed")
def test_both_filters_are_one_language():
    "The inspector's filter in the browser and the grid's in the kernel take the same rows."
    rng = random.Random(0)
    n = 40
    columns = dict(
        query=[rng.choice(["the red ring", "a Box", "what is round?"]) for _ in range(n)],
        sample=[f"s-{i}" for i in range(n)],
        note=[rng.choice(["", "Odd one"]) for _ in range(n)],
        iou=[rng.choice([None, 0.0, 0.25, 0.5, 1]) for _ in range(n)],
        kind=[rng.choice([None, "Shape", "two words", "x"]) for _ in range(n)],
        tag=[rng.choice([[], ["odd"], ["odd", "late"]]) for _ in range(n)],
    )
    words = ["ring", "BOX", "odd", '"red ring"', "s-1", "kind=shape", 'kind="two words"']
    words += ["kind!=x", "kind<t", "tag=odd", "tag!=late", "round?", 'say"', "=x"]
    words += [f"iou{sign}{v}" for sign in ("<", ">", "<=", ">=", "=", "!=") for v in (0, 0.25, 1)]
    texts = [*words, *(" ".join(rng.sample(words, 2)) for _ in range(60)), ""]
    script = view_script().replace("export default", "const door =")
    with browser.browser() as page:
        found = page.evaluate(
            """([script, texts, columns]) => {
                const matcher = new Function(script + '; return matcher')();
                const rows = columns.sample.map((_, i) => i);
                return texts.map(text => rows.filter(matcher(text, columns)));
            }""",
            [script, texts, columns],
        )
    for text, rows in zip(texts, found):
        assert filter_rows(text, columns) == rows, text


class Person:
    "Someone who looks at a grid in JupyterLab; the notebook writes down what Python is told."

    def __init__(self, page, folder):
        self.page, self.folder = page, folder
        self.view = page.locator(".d2-browse").first

    def sees(self, selector, text):
        condition = "([s, t]) => (document.querySelector('.d2-browse ' + s)?.textContent || '')"
        self.page.wait_for_function(f"{condition}.includes(t)", arg=[selector, text])

    def types(self, selector, text):
        self.view.locator(selector).fill(text)
        self.view.locator(selector).press("Enter")

    def drags(self, field, share):
        "From the left of a histogram."
        box = self.view.locator(f"[data-field={field}] svg").bounding_box()
        self.page.mouse.move(box["x"] + 2, box["y"] + 20)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * share, box["y"] + 20, steps=5)
        self.page.mouse.up()
        self.sees(f"[data-field={field}]", "clear")

    def python(self):
        "What Python has been told."
        self.page.wait_for_timeout(500)
        return read_json(self.folder / "state.json")


def narrow(person, rows):
    "A range of a histogram, then a bar of another, then the order: Python has the same rows."
    person.view.locator("[data-source=evaluation]").click()
    person.sees(".d2-count", f"{len(rows)} of {len(rows)} fit")
    person.drags("iou", 0.6)
    kind = person.view.locator("[data-field=kind] .d2-kind").first
    wanted = kind.locator("span").inner_text()
    kind.click()
    person.sees("[data-field=kind] figcaption", "clear")
    person.view.get_by_label("sort by").select_option("iou")
    now = person.python()
    high = float(now["filter"].split("iou<")[1].split()[0])
    fitting = [i for i, r in enumerate(rows) if r["iou"] < high and r["tags"]["kind"] == wanted]
    assert 0 < len(fitting) < len(rows)
    assert sorted(now["fits"]) == fitting
    assert [rows[i]["iou"] for i in now["fits"]] == sorted(rows[i]["iou"] for i in fitting)


def collect(person, rows, run):
    "Chooses three by hand, tags them and exports them."
    person.types(".d2-filter", "")
    person.sees(".d2-count", f"{len(rows)} of {len(rows)} fit")
    tiles = person.view.locator(".d2-cell[data-row]")
    tiles.nth(0).click()
    tiles.nth(2).click(modifiers=["Shift"])
    person.sees(".d2-chosen b", "3 chosen")
    person.types(".d2-tagall", "blurred")
    person.sees(".d2-told", "blurred")
    person.view.locator("[data-suffix='.csv']").click()
    person.sees(".d2-told", "exports")
    now = person.python()
    assert now["selected"] == now["fits"][:3]
    table = list(csv.DictReader((run / "exports" / "selection-1.csv").open()))
    assert [t["sample"] for t in table] == [rows[i]["sample"] for i in now["selected"]]
    assert {t["tag"] for t in table} == {"blurred"}
    assert len(read_annotations(run)) == 3


def come_back(person, rows, run):
    "A saved view is there after another filter, and a line of Python opens one answer."
    person.types(".d2-filter", "tag=blurred")
    person.sees(".d2-count", "3 of")
    person.types(".d2-viewname", "not sharp")
    person.sees(".d2-saved select", "not sharp")
    person.types(".d2-filter", "iou>2")
    person.view.locator(".d2-nothing").wait_for()
    person.view.get_by_label("saved views", exact=True).select_option("not sharp")
    person.sees(".d2-count", "3 of")
    assert read_json(run / "views.json")["views"]["not sharp"]["filter"] == "tag=blurred"
    person.view.locator(".d2-cell[data-row]").nth(1).click()
    person.sees(".d2-open code", "inspect(")
    there = eval(person.view.locator(".d2-open code").inner_text(), dict(inspect=inspect))
    assert there.sample == rows[person.python()["fits"][1]]["sample"]


@pytest.mark.skipif(not chromium(), reason="no Chromium is installed")
def test_a_person_looks_at_many(tmp_path):
    run, errors = make_run(tmp_path / "run", steps=12, samples=24), []
    names = "fits filter selected sort source".split()
    cells = [
        f"from dr2seg_lib.viewing.grid import grid\ng = grid({str(run)!r})",
        f"import json\ndef told(_):\n    state = {{n: getattr(g, n) for n in {names}}}\n"
        "    open('state.json', 'w').write(json.dumps(state))\ng.observe(told)\ng",
    ]
    browser.notebook(tmp_path / "grid.ipynb", cells)
    rows = [row for pair in RunReader(run).groups["evaluation"] for row in pair]
    with browser.jupyterlab(tmp_path) as address, browser.browser() as page:
        page.on("pageerror", lambda e: errors.append(str(e)))
        browser.opened(page, address, "grid.ipynb")
        browser.command(page, "notebook:run-all-cells")
        person = Person(page, tmp_path)
        person.view.locator(".d2-thumb img").first.wait_for()
        person.sees(".d2-count", "64 of 64 fit")
        narrow(person, rows)
        collect(person, rows, run)
        come_back(person, rows, run)
    assert not errors
