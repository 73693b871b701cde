"The report: all that is there, nothing that is not, nothing from outside, nothing unescaped."

import re
import shutil

import browser
import numpy as np
import pytest
from invented_runs import BAD, Reader, make_run, metrics, prediction, rollout, summary

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_json, read_jsonl, write_json, write_jsonl
from dr2seg_lib.core.masks import encode_rle, iou, ratio
from dr2seg_lib.data.samples import Sample
from dr2seg_lib.rollouts.parsing import format_response
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import update_record
from dr2seg_lib.viewing.report import report_html, write_report
from dr2seg_lib.viewing.report_data import RUN_FILES, SHOWN_LATER, gather_run
from dr2seg_lib.viewing.report_rollouts import contrast, reward_bar, some_groups
from dr2seg_lib.viewing.report_samples import select_samples
from dr2seg_lib.viewing.reward_terms import term_colours
from dr2seg_lib.viewing.run_groups import group_rollouts
from dr2seg_lib.viewing.run_samples import sample_by_id


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "dr2seg-1", steps=24, samples=24)


def test_whole_report(whole):
    path = write_report(whole)
    html = path.read_text()
    assert path == whole / "report.html"
    assert path.stat().st_size < 5_000_000
    page = Reader(html)
    assert not page.open
    sections = re.findall(r"<section id=[^>]*><h2>(.*?)</h2>", html)
    assert sections == [
        "Before and after",
        "Training",
        "Reward terms",
        "Health",
        "Time",
        "Strata",
        "Samples",
        "Rollouts",
        "What was asked",
    ]
    assert "Not shown" not in html
    assert page.tags.count("article") == 9 + 4


def test_nothing_from_outside(whole):
    html = write_report(whole).read_text()
    page = Reader(html)
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", html)
    assert set(re.findall(r"https?://[\w./]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_same_run_same_report(whole):
    assert write_report(whole, "a.html").read_bytes() == write_report(whole, "b.html").read_bytes()


def test_what_a_model_says_is_escaped(whole, tmp_path):
    "A model's words reach the page in texts, tokens, queries, ids, tags, parameters and errors."
    folder = tmp_path / "bad<b>"
    with Run.create(folder, {"recipe": BAD[:-2], "data": BAD[:-2]}, bar=False):
        pass
    update_record(folder, error=BAD[:-2])
    row = dict(
        sample=BAD,
        query=BAD,
        text=f"<think>{BAD}</think><description>{BAD}</description><answer>{BAD}</answer>",
        i=0,
        u=1,
        iou=0.0,
        tokens=3,
        tags={"difficulty": BAD},
        rle=None,
    )
    said = dict(text=BAD, tokens=[BAD, BAD], entropy=[0.1, 9.0], think_tokens=2)
    record = dict(
        step=1,
        sample=BAD,
        query=BAD,
        tags={},
        rollout=0,
        first=said,
        second=said,
        description=BAD,
        terms={BAD: 1.0},
        reward=1.0,
        advantage=0.0,
    )
    run = gather_run(folder) | dict(
        before=[row],
        after=[row, dict(row, sample="b", text=BAD), dict(row, sample="c")],
        rollouts=[record],
    )
    run["results"] = {
        "after": {"gIoU": 0.0, "strata": {BAD: {BAD: dict(gIoU=0.0, tokens=1.0, n=1)}}}
    }
    html = report_html(run, cards=1)
    page = Reader(html)
    assert not page.open
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert sum("alert(1)" in w for w in page.words) > 10
    (tmp_path / "predictions").write_text(html.encode("utf-8", "replace").decode())


def test_a_plan_stands_beside_what_was_measured(whole, tmp_path):
    "What `dr2seg plan` writes into a run's folder is a section of its report; half of it is none."
    folder = copied_run(whole, tmp_path)
    given = ["-p", "rollout.max_new_tokens", "40", "-p", "rollout.questions_per_step", "2"]
    assert (
        main(["plan", "train", *given, "--answer", "30", "--out", str(folder / "plan.json")]) == 0
    )
    html = write_report(folder, cards=1).read_text()
    part = html[html.index('<section id="plan">') :]
    part = part[: part.index("</section>")]
    assert "Rehearsed for 1 × H200." in part
    assert "GPU-hours" in part
    assert part.count("<svg") == 1
    since = part[part.index("Since then") :]
    for stage in "first pass", "second pass", "update":
        assert f"<td>{stage}</td>" in since
    plan = read_json(folder / "plan.json")
    del plan["stages"][0]["peak_gib"]
    write_json(folder / "plan.json", plan)
    html = write_report(folder, cards=1).read_text()
    assert '<section id="plan">' not in html
    assert "plan.json" in html


def test_half_a_character_is_written(tmp_path):
    with Run.create(tmp_path / "run", {}, bar=False):
        pass
    (tmp_path / "run/predictions_after.jsonl").write_text(
        '{"sample": "x", "query": "\\ud83d", "text": "\\ud83d", "iou": 0, "tokens": 1}\n'
    )
    assert "<h4>?</h4>" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("name", [RUN_FILES[k] for k in SHOWN_LATER["training"]])
def test_one_file_missing(whole, tmp_path, name):
    for p in whole.iterdir():
        if p.name in RUN_FILES.values() and p.name != name:
            (tmp_path / p.name).write_bytes(p.read_bytes())
    html = write_report(tmp_path, cards=1).read_text()
    assert f"Not shown: {name} is not there" in html
    assert not Reader(html).open


def test_broken_files_are_named(whole, tmp_path):
    for p in whole.iterdir():
        if p.name in RUN_FILES.values():
            (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    html = write_report(tmp_path, cards=1).read_text()
    assert "results.json is not valid JSON" in html
    assert "metrics.jsonl, line 2 is not valid JSON" in html
    assert str(tmp_path) not in html


def test_empty_folder_and_no_folder(tmp_path):
    assert write_report(tmp_path).read_text().count("<section") == 0
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; check"):
        write_report(tmp_path / "nowhere")


def test_run_without_evaluation_or_second_pass(tmp_path):
    "eval_samples = 0 writes nulls; a recipe of one pass has neither N² nor a description."
    rng = np.random.default_rng(0)
    with Run.create(tmp_path / "vr", {"recipe": "visionreasoner", "steps": 3}, bar=False) as run:
        for step in (1, 2, 3):
            run.log(metrics(rng, step) | dict(tokens_second=None, accuracy=None))
        run.record(
            [
                rollout(rng, 1, 1_000_007, k, 1.0)
                | dict(second=None, description=None, advantage=0.0, reward=0.0)
                for k in range(2)
            ]
        )
        run.results(dict(before=None, after=None))
    html = write_report(tmp_path / "vr").read_text()
    assert "no second pass" in html
    assert html.count("<section") == 6
    assert "that evaluation did not run" in html
    assert not Reader(html).open


def test_interrupted_run_says_so(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(KeyboardInterrupt):
        with Run.create(tmp_path / "cut", {"recipe": "dr2seg", "steps": 60}, bar=False) as run:
            run.log(metrics(rng, 1))
            raise KeyboardInterrupt
    html = write_report(tmp_path / "cut").read_text()
    assert '<span class="pill interrupted">interrupted</span>' in html
    assert "1 of 60 steps" in html


def test_sample_without_picture_shows_text_only(whole):
    html = write_report(whole, "plain.html", lookup=lambda id: None).read_text()
    assert "<img" not in html
    assert html.count("<article") == 13


def test_own_pictures(whole, tmp_path):
    "Another data set gives its pictures by `lookup`; large ones shrink."
    sample = sample_by_id("mini-2000000")
    large = Sample("x", np.repeat(np.repeat(sample.image, 9, 0), 9, 1), sample.query, ())
    html = write_report(whole, tmp_path / "own.html", lookup=lambda id: large).read_text()
    assert html.count("<img") == 9 * 3 + 4 * 8
    assert len(html) < 2_000_000


def test_rollouts_stand_still_as_the_inspector_shows_them(whole):
    "Each rollout has its picture in layers, both passes, and a bar that adds up to the reward."
    html = write_report(whole).read_text()
    part = html[html.index('<section id="rollouts">') : html.index('<section id="what-was-asked">')]
    assert re.findall(r"<h3>(.*?)</h3>", part) == [
        "Widest contrast",
        "Best",
        "Worst",
        "Drawn by lot",
    ]
    assert part.count("<article") == 4
    assert part.count("<img") == 32
    assert part.count("class=heat") == 64
    assert part.count("l-truth") == 32
    assert part.count("l-prompts") >= 30
    assert "l-missed" in part
    assert "l-extra" in part
    records = read_jsonl(whole / "rollouts.jsonl")
    groups = some_groups(records)

    def means(gs):
        return [np.mean([r["reward"] for r in g]) for g in gs]

    every = group_rollouts(records)
    widest = max(every, key=contrast)
    assert groups["widest contrast"] == [widest]
    others = means([g for g in every if g is not widest])
    assert means(groups["best"]) == [max(others)]
    assert means(groups["worst"]) == [min(others)]
    assert len({id(g[0]) for gs in groups.values() for g in gs}) == 4
    terms = dict(thinking_format=1.0, accuracy=3.0, description=1.0, length=0.4)
    bar = reward_bar(terms, "length", term_colours(terms), (0, 8))
    widths = [segment["width"] for segment in bar]
    assert [segment["lost"] for segment in bar] == [False, False, False, True]
    assert sum(widths[:-1]) * 8 / 100 == pytest.approx(5 * 0.4, abs=0.02)
    assert sum(widths) * 8 / 100 == pytest.approx(5, abs=0.02)


def candidate_row(seed, k):
    "A row of a Rea2Seg run: the direct answer is `k` pixels off, the second candidate is right."
    sample = sample_by_id(f"mini-{seed}")
    said = [
        dict(
            source=source,
            score=float(score),
            iou=ratio(*iou(mask, sample.mask)),
            text=f"<think>{source} it is</think><score>{score}</score>",
            rle=encode_rle(mask),
        )
        for source, score, mask in (
            ("direct", 3, np.roll(sample.mask, k, 0)),
            ("peak", 9, sample.mask),
        )
    ]
    box = sample.targets[0].box
    return dict(
        sample=sample.id,
        query=sample.query,
        tags=sample.tags,
        text=format_response(
            "so.", "the thing", [type(sample.targets[0])(tuple(v // 2 for v in box), (5, 5))]
        ),
        grid=(np.eye(7) / 9).tolist(),
        candidates=said,
        direct=said[0]["iou"],
        chosen=1.0,
        oracle=1.0,
        best=1,
        tokens_direct=30,
        tokens_scoring=20,
        seconds=dict(direct=1.0, scoring=0.5),
    )


def test_rea2seg_run(tmp_path):
    rows = [candidate_row(2_000_000 + i, 9 + i) for i in range(8)]
    line = dict(
        n=8,
        direct=[0.4, 0.3, 0.5],
        oracle=[1.0, 1.0, 1.0],
        chosen=[1.0, 1.0, 1.0],
        change=[0.6, 0.5, 0.7],
        candidates=[2.0, 2.0, 2.0],
        tokens_direct=[30.0, 30.0, 30.0],
        tokens_scoring=[20.0, 20.0, 20.0],
        seconds_direct=[1.0, 1.0, 1.0],
        seconds_more=[0.5, 0.5, 0.5],
    )
    with Run.create(
        tmp_path / "r",
        dict(candidates=8, overlap=0.8, data="mini", split="val", samples=8, recipe="dr2seg"),
        bar=False,
    ) as run:
        write_jsonl(run.folder / "predictions.jsonl", rows)
        run.results(dict(table="", summary=dict(spatial=line, all=line)))
    html = write_report(tmp_path / "r").read_text()
    page = Reader(html)
    assert not page.open
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["The choice", "Candidates", "What was asked"]
    assert "Not shown" not in html
    assert "<h1>Rea2Seg" in html
    assert "0.400 ± 0.100" in html
    assert "+0.600 ± 0.100" in html
    assert "8 of 8 questions" in html
    assert page.tags.count("article") == 6
    assert page.tags.count("img") == 6 * 3
    assert html.count("class=picked") == 6
    assert html.count("peak it is") == 6
    (tmp_path / "r/predictions.jsonl").unlink()
    assert "Not shown: predictions.jsonl is not there" in write_report(tmp_path / "r").read_text()


def test_evaluation_run(tmp_path):
    "One answer a sample, and one record that could not be read."
    rng = np.random.default_rng(0)
    rows = [prediction(rng, 2_000_000 + i, 0.5, 2) for i in range(6)]
    broken = dict(
        sample="#6",
        query="",
        text="",
        i=0,
        u=0,
        iou=0.0,
        tokens=None,
        answer_entropy=None,
        tags={},
        rle=None,
        error="x.json is broken",
    )
    with Run.create(
        tmp_path / "e",
        dict(protocol="lisa", data="mini", split="val", samples=7, recipe="dr2seg"),
        bar=False,
    ) as run:
        write_jsonl(run.folder / "predictions.jsonl", rows + [broken])
        run.results(summary(rows))
    html = write_report(tmp_path / "e", cards=1).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["What came out", "Samples", "What was asked"]
    assert "Not shown" not in html
    assert "7 of 7 questions" in html
    assert html.count("<article") == 3
    assert "difficulty: easy" in html
    assert not Reader(html).open


def test_conditioning_run(tmp_path):
    h = {
        k: np.linspace(a, a + 0.2, 30).tolist()
        for k, a in (("I, Q", 0.3), ("I, Q, D", 0.31), ("I, D", 0.25))
    }
    with Run.create(
        tmp_path / "c", dict(adapters=[BAD[:9]], data="mini", split="val", samples=30), bar=False
    ) as run:
        run.results({"start": h, BAD[:9]: h})
    html = write_report(tmp_path / "c").read_text()
    assert "<h2>Entropy of the answer</h2>" in html
    assert "−0.050 ± 0.000" in html
    assert "+0.010 ± 0.000" in html
    assert "Not shown" not in html
    assert not Reader(html).open
    assert "script" not in Reader(html).tags


def copied_run(folder, to):
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, to / path.name)
    return to


@pytest.mark.browser
def test_layers_are_shown_and_hidden_in_a_browser(whole):
    "Offline, without JavaScript: a ticked box shows its layer in its section, and in no other."
    path = write_report(whole)
    with browser.browser() as page:
        page.context.set_offline(True)
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("requestfailed", lambda r: errors.append(r.url))
        page.goto(path.as_uri())

        def seen(section, layer):
            return page.locator(f"#{section} .l-{layer}").evaluate_all(
                "es => es.filter(e => getComputedStyle(e).display !== 'none').length"
            )

        def total(section, layer):
            return page.locator(f"#{section} .l-{layer}").count()

        assert seen("samples", "truth") == total("samples", "truth") > 20
        assert seen("samples", "missed") == 0 < total("samples", "missed")
        page.locator("#samples .k-truth").uncheck()
        page.locator("#samples .k-difference").check()
        assert seen("samples", "truth") == 0
        assert seen("samples", "missed") == total("samples", "missed")
        assert seen("rollouts", "truth") == total("rollouts", "truth")
        assert seen("rollouts", "missed") == 0
        assert not errors

        def paint(section):
            return page.locator(f"#{section} path.l-prediction").first.evaluate(
                "e => getComputedStyle(e).fill"
            )

        outline = paint("rollouts")
        page.locator("#rollouts .fill-strong").check()
        assert paint("rollouts") != outline

        def ink():
            return page.evaluate("getComputedStyle(document.body).color")

        light = ink()
        page.emulate_media(color_scheme="dark")
        assert ink() != light


def test_arms_of_an_ablation(tmp_path):
    folder = tmp_path / "ablate-1"
    with Run.create(folder, {"seeds": [0, 1]}, bar=False) as run:
        run.results(dict(table="| arm |", arms={}, failed={}))
        for recipe, end in ("visionreasoner", 66.0), ("dr2seg", 30.0):
            for seed in (0, 1):
                make_run(folder / f"{recipe}-{seed}", 6, 6, recipe, seed, end)
    html = write_report(folder).read_text()
    assert "<h2>Arms</h2>" in html
    assert ">visionreasoner</td><td class=num>2</td>" in html
    assert "Not shown" not in html
    assert "4 runs" in html
    assert not Reader(html).open
    assert "<h3>Before training</h3>" in html
    assert "<h2>Arms by stratum</h2>" in html
    assert "<h3>Difficulty</h3>" in html
    assert html.count("<svg") == 2


def test_cards_choose_without_repetition():
    rows = [dict(sample=i, iou=v) for i, v in enumerate(np.random.default_rng(0).random(20))]
    picks = select_samples([], rows, n=4)
    ids = [r["sample"] for rs in picks.values() for r in rs]
    assert len(ids) == len(set(ids)) == 12
    assert (
        min(r["iou"] for r in picks["best"])
        > max(r["iou"] for r in picks["drawn by lot"])
        > max(r["iou"] for r in picks["worst"])
    )


@pytest.mark.browser
def test_a_telephone_and_a_printer_show_all_of_it(whole, tmp_path):
    "Nothing is cut at 400 pixels, pictures are there without scrolling, the print is short."
    rows = read_jsonl(whole / "metrics.jsonl")
    rows[6]["kl"] = 1.5
    write_jsonl(copied_run(whole, tmp_path) / "metrics.jsonl", rows)
    path = write_report(tmp_path)
    with browser.browser(400, 800) as page:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        cut = """es => es.filter(e => e.scrollWidth > e.clientWidth + 1
          && getComputedStyle(e).overflowX === 'visible').length"""
        assert page.locator(".panel").evaluate_all(cut) == 0
        assert page.locator(".columns .panel").evaluate_all(
            "es => es.every(e => e.scrollWidth <= e.clientWidth + 1)"
        )
        assert page.locator("img").evaluate_all("es => es.every(e => e.complete)")
        assert "rose to 1.5 at step 7" in page.locator("#health .notice").inner_text()
        asked = page.locator("#what-was-asked dl").first.inner_text()
        assert "'" not in asked
        assert "True" not in asked
        pages = page.pdf(format="A4").count(b"/Type /Page\n")
        assert 1 < pages <= 14
