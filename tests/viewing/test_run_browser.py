"Many runs: the list, the terminal's and the notebook's; curves and questions over the steps."

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import browser
import hostile_runs as hostile
import pytest
from invented_runs import make_run

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_json, write_json, write_jsonl
from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.data.mini import draw_sample
from dr2seg_lib.runs.overview import run_rows, select_rows, sort_rows
from dr2seg_lib.viewing.curve_browser import curves
from dr2seg_lib.viewing.question_view import question
from dr2seg_lib.viewing.run_browser import runs
from dr2seg_lib.viewing.run_diff import diff

SENTENCE = ValueError, FileNotFoundError


def by_hand(folder, name, parameters, steps=30, **record):
    "A run as somebody else's script might leave it: no file of it is ours."
    folder = folder / name
    folder.mkdir(parents=True)
    record = dict(status="done", parameters=parameters, started="2026-03-01T08:00:00") | record
    (folder / "run.json").write_text(json.dumps(record))
    rows = [dict(step=s, reward=s / steps, tokens=90 - s, accuracy=0.5) for s in range(1, steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def three(tmp_path):
    "Three runs below a folder, and what is no run."
    root = tmp_path / "runs"
    by_hand(root, "a", {"method": "dr2seg", "optim": {"lr": 1e-3}}, ended="2026-03-01T09:30:00")
    by_hand(root, "b", {"method": "dpad", "optim.lr": 1e-4}, started="2026-03-02T08:00:00")
    by_hand(root, "deep/c", {"method": "dpad"}, status="failed", error="ValueError: no")
    write_json(root / "b" / "results.json", dict(after=dict(gIoU=0.75, tokens=20)))
    (root / "photos").mkdir()
    (root / "photos" / "precious.jpg").write_bytes(b"x")
    return root


def said(capsys, *words):
    code = main(list(map(str, words)))
    shown = capsys.readouterr()
    return code, shown.out + shown.err


# ---- what is listed


def test_runs_of_somebody_else_are_rows(three):
    rows = {row["name"]: row for row in run_rows(three)}
    assert set(rows) == {"a", "b", "deep/c"}
    assert rows["a"]["parameters"] == {"method": "dr2seg", "optim.lr": 1e-3}
    assert rows["a"]["seconds"] == 5400
    assert (rows["a"]["tokens"], rows["a"]["gIoU"]) == (61, None), "those of its last step"
    assert (rows["b"]["tokens"], rows["b"]["gIoU"]) == (20, 0.75), "those of its evaluation"
    found = sort_rows(select_rows(list(rows.values()), "optim.lr<1"), "-optim.lr")
    assert [row["name"] for row in found] == ["a", "b"]


def test_five_hundred_runs_open_in_two_seconds(three, tmp_path):
    row = json.dumps(dict(step=1, reward=1.0, terms=dict(a=1.0, b=2.0), tokens=20, accuracy=0.5))
    for number in range(500):
        folder = tmp_path / "many" / f"run-{number}"
        shutil.copytree(three / "b", folder)
        (folder / "metrics.jsonl").write_text(f"{row}\n" * 40)
        write_json(folder / "run.json", read_json(folder / "run.json"))
    began = time.process_time()
    view = runs(tmp_path / "many")
    took = time.process_time() - began
    assert len(view.rows) == 500
    assert took < 2, f"{took:.2f} s"


def test_hostile_folders_are_rows_with_a_sentence(tmp_path, capsys):
    folders = list(hostile.cases(tmp_path / "runs", 60))
    view = runs(tmp_path / "runs")
    state = {k: v for k, v in view.get_state().items() if k in ("rows", "about", "differing")}
    json.dumps(state, allow_nan=False).encode()
    assert len(view.rows) >= sum((folder / "run.json").is_file() for folder in folders)
    unreadable = [row for row in view.rows if row["status"] == "unreadable"]
    assert unreadable
    assert all(row["error"] for row in unreadable)
    assert view.still()
    code, shown = said(capsys, "runs", tmp_path / "runs")
    assert code == 0
    assert len(shown.splitlines()) == len(view.rows) + 1
    assert all(line.isprintable() for line in shown.splitlines())


def test_hostile_folders_open_or_are_a_sentence(tmp_path):
    good = hostile.write(tmp_path / "good", hostile.training("visionreasoner"))
    opened = 0
    for folder in hostile.cases(tmp_path / "runs", 40):
        for look in (lambda f: str(diff(good, f)), curves, question):
            try:
                view = look(folder)
            except SENTENCE as error:
                assert "\n" not in str(error)
                continue
            opened += 1
            if not isinstance(view, str):
                assert view.still()._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")
                view.close()
    assert opened > 40


# ---- the terminal


def test_the_list_fits_and_answers_to_its_options(three, capsys, monkeypatch):
    code, shown = said(capsys, "runs", three)
    head, *lines = shown.splitlines()
    assert code == 0
    assert head.split()[:2] == ["run", "status"]
    assert "optim.lr" in head
    assert "▁" in lines[0]
    assert "█" in lines[0]
    assert said(capsys, "runs", three, "--where", "gIoU>0.7")[1].count("\n") == 2
    for sort, place in ("tokens", 1), ("-tokens", 3):
        line = said(capsys, "runs", three, "--sort", sort)[1].splitlines()[place]
        assert line.startswith(str(three / "b"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, said(capsys, "runs", three)[1].splitlines())) <= 60
    for wrong in ("--where", "colour=red"), ("--sort", "beauty"):
        code, shown = said(capsys, "runs", three, *wrong)
        assert code == 2
        assert shown.startswith("dr2seg: runs have no field")


def test_tags_names_and_the_trash(three, capsys):
    assert said(capsys, "runs", three, "--tag", "a", "good,paper")[0] == 0
    assert said(capsys, "runs", three, "--rename", three / "a", "best")[0] == 0
    assert read_json(three / "best" / "tags.json") == ["good", "paper"]
    assert "best" in said(capsys, "runs", three, "--where", "tag=good")[1]
    assert said(capsys, "runs", three, "--delete", "b", "--delete", "deep/c")[0] == 0
    assert [row["name"] for row in run_rows(three)] == ["best"]
    assert (three / ".trash" / "b" / "results.json").is_file(), "nothing is lost"


@pytest.mark.parametrize("name", ["photos", "deep", ".", "nowhere", "../runs", "photos/.."])
def test_what_is_no_run_is_never_deleted(name, three, capsys):
    before = sorted(three.rglob("*"))
    code, shown = said(capsys, "runs", three, "--delete", name)
    assert code == 2
    assert shown.startswith("dr2seg: ")
    assert sorted(three.rglob("*")) == before


HOLD = """import sys, time
from dr2seg_lib.runs.run_folder import Run
with Run.create(sys.argv[1], {}, bar=False):
    print("at work", flush=True)
    time.sleep(60)
"""


def test_a_run_at_work_stays_where_it_is(three, capsys):
    "Another process trains; it is tagged, and refused for all else."
    command = [sys.executable, "-c", HOLD, str(three / "busy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"at work\n"
            record = (three / "busy" / "run.json").read_bytes()
            for asked in ("--delete", "busy"), ("--rename", "busy", "idle"):
                code, shown = said(capsys, "runs", three, *asked)
                assert code == 2
                assert "busy is running; stop it first" in shown
            assert said(capsys, "runs", three, "--tag", "busy", "live")[0] == 0
            assert (three / "busy" / "run.json").read_bytes() == record
        finally:
            process.kill()
    assert said(capsys, "runs", three, "--delete", "busy")[0] == 0


def test_diff_on_the_command_line(three, capsys):
    code, shown = said(capsys, "diff", three / "a", three / "b")
    assert code == 0
    assert "optim.lr" in shown
    assert "0.0001" in shown
    code, shown = said(capsys, "diff", three / "a", three / "photos")
    assert code == 2
    assert "holds no run that can be read" in shown


# ---- over the steps


def held_out(folder, steps=(0, 20, 40), questions=5):
    "Answers on the way, written by hand."
    rows = []
    for step in steps:
        for number in range(questions):
            sample = draw_sample(2_000_000 + number)
            text = f"<think>at step {step}</think><answer>[]</answer>"
            row = dict(step=step, sample=sample.id, query=sample.query, text=text)
            row |= dict(iou=min(1.0, step / 50 + number / 10), tokens=60 - step + number)
            rows.append(row | dict(answer_entropy=0.4, rle=encode_rle(sample.mask)))
    write_jsonl(folder / "held_out.jsonl", rows)


def test_a_question_by_hand(three):
    held_out(three / "a")
    view = question(three / "a", "mini-2000003")
    assert [a["step"] for a in view.found["held-out"]["mini-2000003"]] == [0, 20, 40]
    assert view.html.count("<article") == 3
    assert "at step 20" in view.html
    assert view.html.count("l-prediction") == 3
    view.close()
    with open(three / "a" / "held_out.jsonl", "a") as f:
        f.write('{"step": "x"}\n{"step": 60, "sam')
    view = question(three / "a")
    assert "held_out.jsonl, line 16" in view.about["missing"]
    view.close()


def test_a_question_of_training_that_came_again(tmp_path):
    folder = make_run(tmp_path / "run", steps=8, samples=4)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    again = [row | dict(step=row["step"] + 100) for row in rows if row["step"] == 1]
    write_jsonl(folder / "rollouts.jsonl", rows + again)
    view = question(folder, again[0]["sample"])
    assert view.source == "training"
    assert view.rollouts == 8
    first = view.html
    view.rollout = 3
    assert view.html != first
    view.source = "held-out"
    assert view.sample.startswith("mini-2")
    view.close()


# ---- as it is used: JupyterLab in a browser

CELLS = [
    "from dr2seg_lib.viewing.run_browser import runs\nruns('runs')",
    "from dr2seg_lib.viewing.curve_browser import curves\ncurves(['runs/star', 'runs/vr'])",
    "from dr2seg_lib.viewing.question_view import question\nquestion('runs/star')",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The page of a notebook with the three views, and its folder."
    folder = tmp_path_factory.mktemp("lab")
    make_run(folder / "runs" / "star", steps=12, samples=8)
    make_run(folder / "runs" / "vr", steps=12, samples=8, recipe="visionreasoner", seed=1)
    make_run(folder / "runs" / "third", steps=4, samples=4, seed=2)
    held_out(folder / "runs" / "star", (0, 4, 8))
    browser.notebook(folder / "views.ipynb", CELLS)
    with browser.jupyterlab(folder) as address, browser.browser(1300, 1200) as page:
        page.errors = []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        browser.opened(page, address, "views.ipynb")
        browser.command(page, "notebook:run-all-cells")
        page.folder = folder / "runs"
        yield page


def brought(page, number, kind):
    "The view of a cell, in sight: JupyterLab draws no others."
    page.evaluate(
        """n => {
            const book = window.jupyterapp.shell.currentWidget.content;
            book.activeCellIndex = n;
            return book.scrollToItem(n, 'start');
        }""",
        number,
    )
    view = page.locator(f".d2-{kind}").first
    view.wait_for(state="attached")
    view.scroll_into_view_if_needed()
    return view


def rows_shown(view):
    return view.locator("tbody .d2-run").all_text_contents()


@pytest.mark.browser
def test_the_table_in_the_browser(lab):
    "Sort, filter, choose, compare, tag, rename, delete: as a hand does it."
    view = lab.locator(".d2-runs").first
    view.locator("tbody tr").first.wait_for()
    view.get_by_role("button", name="gIoU").click()
    cells = view.locator("tbody tr td:nth-child(5)").all_text_contents()
    assert cells == sorted(cells, reverse=True)
    view.locator(".d2-filter").fill('method="dr2seg"')
    assert set(rows_shown(view)) == {"star", "third"}
    view.locator(".d2-filter").fill("gIoU>much")
    assert "gIoU is a number; write gIoU>1, not much" in view.locator(".d2-wrong").text_content()
    view.locator(".d2-filter").fill("")
    for name in "star", "vr":
        view.locator("tbody tr", has_text=name).click()
    view.get_by_role("button", name="Compare").click()
    lab.locator(".d2-held .d2-compare h3").first.wait_for()
    view.locator(".d2-close").click()
    lab.wait_for_function("() => !document.querySelector('.d2-held .d2-compare')")
    view.get_by_role("button", name="Tag…").click()
    view.get_by_label("tags").fill("good")
    view.get_by_label("tags").press("Enter")
    view.locator(".d2-tag", has_text="good").nth(1).wait_for()
    assert read_json(lab.folder / "vr" / "tags.json") == ["good"]
    view.locator("tbody tr", has_text="vr").click()
    view.locator("tbody tr", has_text="star").click()
    view.locator("tbody tr", has_text="third").click()
    view.get_by_role("button", name="Rename…").click()
    view.get_by_label("new name").fill("a/b")
    view.get_by_role("button", name="Rename", exact=True).click()
    view.locator(".d2-notice", has_text="is no name for a run").wait_for()
    view.get_by_role("button", name="Rename…").click()
    view.get_by_label("new name").fill("short")
    view.get_by_role("button", name="Rename", exact=True).click()
    view.locator("tbody tr", has_text="short").wait_for()
    assert (lab.folder / "short" / "run.json").is_file()
    view.get_by_role("button", name="Delete…").click()
    view.get_by_role("button", name="Move it").click()
    lab.wait_for_function("() => document.querySelectorAll('.d2-runs tbody tr').length === 2")
    assert (lab.folder / ".trash" / "short" / "run.json").is_file()
    assert not lab.errors


def hovered(lab, view, text):
    "The first panel's point whose tooltip has a text, under the pointer."
    area = view.locator(".nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    for across in range(20, 90, 6):
        for down in range(3, 98, 4):
            x, y = box["x"] + box["width"] * across / 100, box["y"] + box["height"] * down / 100
            lab.mouse.move(x, y)
            lab.wait_for_timeout(50)
            if text in (view.locator(".hoverlayer").first.text_content() or ""):
                return
    raise AssertionError(f"no point of {text}")


@pytest.mark.browser
def test_a_point_of_a_curve_leads_to_its_step(lab):
    view = brought(lab, 1, "curves")
    view.locator(".scatterlayer .trace").first.wait_for(state="attached")
    traces = view.locator(".scatterlayer .trace").count()
    assert not view.locator(".d2-measures .d2-chip", has_text="loss").count()
    view.get_by_role("button", name="more").click()
    view.locator(".d2-measures .d2-chip", has_text="loss").click()
    view.get_by_role("button", name="fewer").click()
    assert view.locator(".d2-measures .d2-chip", has_text="loss").count()  # what is drawn stays
    lab.wait_for_function(
        "n => document.querySelectorAll('.d2-curves .scatterlayer .trace').length > n", arg=traces
    )
    view.get_by_role("slider", name="smoothing").fill("60")
    view.get_by_role("button", name="log values").click()
    view.locator("[aria-pressed=true]", has_text="log values").wait_for()
    lab.wait_for_timeout(1500)
    hovered(lab, view, "vr")
    lab.mouse.down()
    lab.mouse.up()
    view.locator(".d2-held .d2-inspect .d2-meta").first.wait_for()
    assert view.locator(".d2-held .d2-name").first.text_content() == "vr"
    assert view.locator(".d2-held .d2-meta").first.text_content().startswith("step ")
    assert not lab.errors


@pytest.mark.browser
def test_a_question_is_chosen_by_its_curve(lab):
    view = brought(lab, 2, "question")
    view.locator(".scatterlayer .trace").first.wait_for(state="attached")
    chosen = view.get_by_role("combobox").input_value()
    hovered(lab, view, "another question")
    lab.mouse.down()
    lab.mouse.up()
    lab.wait_for_function(
        "v => document.querySelector('.d2-question select').value !== v", arg=chosen
    )
    view.locator(".d2-shot").first.wait_for()
    pictures = view.locator(".d2-shot img").count()
    assert pictures == view.locator(".d2-shot").count() > 1
    assert not lab.errors


def test_pages_without_a_kernel_have_a_still(three):
    held_out(three / "a")
    for view in runs(three), curves([three / "a", three / "b"]), question(three / "a"):
        data, _ = view._repr_mimebundle_()
        assert data["image/png"].startswith(b"\x89PNG")
        assert "application/vnd.jupyter.widget-view+json" in data
        view.close()


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    for look in runs, curves, question:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            look(tmp_path / Path("nowhere"))


DRAWN = """([source, state]) => {
  document.body.replaceChildren();
  const module = new Function(source.replace('export default', 'const door =') + '; return door;');
  const nothing = () => {};
  const set = (k, v) => { state[k] = v; };
  const model = {get: k => state[k], set, on: nothing, send: nothing, save_changes: nothing};
  module().render({model, el: document.body});
}"""
SYNCED = "about rows differing chosen kind measures keep note source sample rollouts html".split()


@pytest.mark.browser
def test_nothing_of_a_stranger_runs_in_the_views(lab, tmp_path):
    "The drawing side itself, given what the kernel would send of hostile folders."
    folders = list(hostile.cases(tmp_path / "runs", 15))
    looks = [(runs, tmp_path / "runs")]
    looks += [(look, folder) for folder in folders for look in (curves, question)]
    drawn = 0
    with lab.context.browser.new_page() as page:  # one browser at a time
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if "pwned" in m.text else None)
        for look, folder in looks:
            try:
                view = look(folder)
            except SENTENCE:
                continue
            state = {k: v for k, v in view.get_state().items() if k in SYNCED}
            page.goto("about:blank")
            page.evaluate(DRAWN, [view._esm, json.loads(json.dumps(state, allow_nan=False))])
            page.wait_for_timeout(30)
            assert not page.evaluate("() => window.__pwned || document.title === 'pwned'")
            assert page.locator(".dr2seg").inner_text().strip()
            assert page.locator("script, iframe, [onerror], [onload], [onmouseover]").count() == 0
            drawn += 1
            view.close()
    assert drawn > 10
    assert not errors
