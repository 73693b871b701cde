"Answers to masks to numbers; nothing is skipped."

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dr2seg_lib.cli import main
from dr2seg_lib.commands.parameters_cell import parameters_of
from dr2seg_lib.core.files import append_jsonl, read_json, read_jsonl, write_json
from dr2seg_lib.core.parameter_names import flat_parameters
from dr2seg_lib.core.statistics import bootstrap_interval
from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.records import BrokenRecord
from dr2seg_lib.evaluation.config import EvaluateConfig, check_evaluation
from dr2seg_lib.evaluation.evaluate import dataset_info, evaluate, run_evaluation
from dr2seg_lib.evaluation.metrics import result_row, summarize
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rollouts.parsing import parse_response, to_image_coordinates
from dr2seg_lib.rollouts.response import Group, Response
from dr2seg_lib.rollouts.two_stage import StageTimer
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.verify import validate_model
from dr2seg_lib.segmenters.base import Segmenter
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.training.config import TrainConfig, check_training
from dr2seg_lib.training.step_records import StepOutcome, step_metrics

SAMPLE = MiniReasonSeg("val")[0]


def said(text):
    return Response(text, parse_response(text), [text], [0.5], [1.0], 7)


def test_located_scales_back_to_the_image():
    text = '<think>x.</think><answer>[{"bbox_2d": [28,56,84,112], "point_2d": [14,0]}]</answer>'
    (t,) = to_image_coordinates(parse_response(text).objects, 112, (224, 448))
    assert t.box == (56, 224, 168, 448)
    assert t.point == (28, 0)
    assert to_image_coordinates(parse_response("nothing here").objects, 112, (224, 224)) == []


def test_an_unparsable_answer_is_a_miss_and_never_skipped():
    row = result_row(SAMPLE, said("I do not know"), np.zeros((224, 224), bool))
    assert row["i"] == 0
    assert row["u"] == SAMPLE.mask.sum()
    assert row["iou"] == 0
    assert row["format"] == 0


def test_summary_by_hand():
    rows = [
        dict(i=i, u=u, iou=i / u, tokens=t, answer_entropy=e, format=1.0, tags={"kind": k})
        for i, u, t, e, k in [(8, 10, 20, 0.1, "a"), (1, 2, 40, 0.3, "b"), (0, 8, 60, 0.5, "b")]
    ]
    s = summarize(rows)
    assert s["gIoU"] == pytest.approx((0.8 + 0.5) / 3)
    assert s["cIoU"] == pytest.approx(9 / 20)
    assert s["tokens"] == 40
    assert s["n"] == 3
    b = s["strata"]["kind"]["b"]
    assert (b["gIoU"], b["tokens"], b["n"]) == (0.25, 50, 2)
    assert b["cIoU"] == pytest.approx(0.1)
    assert b["gIoU_ci"] == [0, 0.5]
    assert "N_acc" not in s
    assert "broken" not in s
    assert s["strata"]["kind"]["a"].keys() == {
        "n",
        "gIoU",
        "cIoU",
        "tokens",
        "answer_entropy",
        "format",
        "cut",
    }, "one sample has no interval"
    assert s["cut"] is None, "rows of an older run do not say what was cut"
    assert s["gIoU_ci"][0] <= s["gIoU"] <= s["gIoU_ci"][1]


def test_the_share_of_cut_answers_by_hand():
    def row(cut):
        return dict(
            i=0,
            u=1,
            iou=0.0,
            tokens=5,
            answer_entropy=0.1,
            format=1.0,
            cut=cut,
            tags={"kind": "a" if cut else "b"},
        )

    s = summarize([row(True), row(False), row(False), row(None), row(False)])
    assert s["cut"] == 1 / 4, "a record that cannot be read has no answer to cut"
    assert s["cut_ci"][0] == 0 < s["cut_ci"][1]
    assert s["strata"]["kind"]["a"]["cut"] == 1


def test_a_limit_that_is_too_small_cuts_every_answer_and_a_large_one_none():
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    short, rows = evaluate(
        policy, segmenter, MiniReasonSeg("val", 3), dr2seg_prompt, max_new_tokens=5
    )
    assert [r["cut"] for r in rows] == [True] * 3
    assert short["cut"] == 1
    long, rows = evaluate(
        policy, segmenter, MiniReasonSeg("val", 3), dr2seg_prompt, max_new_tokens=256
    )
    assert [r["cut"] for r in rows] == [False] * 3
    assert long["cut"] == 0


def test_a_step_tells_the_share_of_its_cut_answers():
    def answer(cut):
        return Response("", parse_response(""), ["x"], [0.5], [1.0], 7, cut)

    groups = [Group(SAMPLE, [answer(True), answer(False)], [answer(True), None])]
    row = step_metrics(
        1,
        StepOutcome(
            groups, dict(accuracy=torch.ones(1, 2)), torch.ones(1, 2), torch.ones(1, 2), {}
        ),
        {},
        0.1,
        StageTimer(first=1.0, second=1.0),
    )
    assert row["cut"] == 2 / 3, "of both passes; no description, no answer"


def test_an_answer_of_exactly_the_limit_that_ends_there_is_not_cut():
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    samples = MiniReasonSeg("val", 1)
    with torch.no_grad():
        done = policy.generate(
            policy.prefill(
                [dr2seg_prompt(samples[0].query, eval=True)], policy.encode([samples[0].image])
            ),
            1,
            256,
            temperature=0,
        )
    n = int(done.mask.sum())
    for limit, cut in (n, False), (n - 1, True):
        assert (
            evaluate(policy, segmenter, samples, dr2seg_prompt, max_new_tokens=limit)[1][0]["cut"]
            is cut
        )


def test_questions_without_an_answer_by_hand():
    def row(u, targets):
        return dict(
            i=0,
            u=u,
            iou=float(u == 0),
            tokens=5,
            answer_entropy=0.1,
            format=1.0,
            targets=targets,
            tags={},
        )

    s = summarize([row(0, 0), row(7, 0), row(0, 0), row(9, 1)])
    assert s["N_acc"] == pytest.approx(2 / 3)
    assert s["gIoU"] == 0.5
    assert s["cIoU"] == 0


def test_a_record_that_cannot_be_read_is_a_miss():
    class Worn(list):
        def __getitem__(self, i):
            if i in (0, 3):
                raise BrokenRecord(f"record {i} is broken; mend it.")
            return super().__getitem__(i)

    data = Worn(MiniReasonSeg("val", 4))
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    summary, rows = evaluate(policy, segmenter, data, dr2seg_prompt, batch_size=3)
    whole, _ = evaluate(policy, segmenter, list(data)[1:3], dr2seg_prompt)
    assert [r["sample"] for r in rows] == ["#0", data[1].id, data[2].id, "#3"]
    assert rows[3]["error"] == "record 3 is broken; mend it."
    assert summary["n"] == 4
    assert summary["broken"] == 2
    assert summary["gIoU"] == pytest.approx(whole["gIoU"] / 2)
    assert summary["cIoU"] == whole["cIoU"]
    assert summary["tokens"] == whole["tokens"]
    assert summary["strata"].keys() == whole["strata"].keys()


def test_nothing_that_can_be_read_has_no_tokens():
    class Worn(list):
        def __getitem__(self, i):
            raise BrokenRecord("it is broken; mend it.")

    summary, _ = evaluate(Policy.load(), None, Worn([1, 2]), dr2seg_prompt)
    assert summary["gIoU"] == 0
    assert summary["tokens"] is None
    assert summary["broken"] == 2
    assert summary["strata"] == {}


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = bootstrap_interval(values).bounds
    assert low < 3 < high
    assert 0.15 < high - low < 0.25  # about 4 / sqrt(400)


def test_truth_drawn_by_an_oracle_scores_one():
    class Oracle(Segmenter):
        def masks(self, image, targets):
            return [next(s.mask for s in data if s.image is image)]

    data = [MiniReasonSeg("val")[i] for i in range(4)]
    summary, rows = evaluate(Policy.load(), Oracle(), data, dr2seg_prompt)
    drawn = [r for r in rows if r["format"]]
    assert len(rows) == 4
    assert drawn
    assert all(r["iou"] == 1 for r in drawn)


def test_same_answers_in_any_batch_size():
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    a, b = (
        evaluate(policy, segmenter, MiniReasonSeg("val", 6), dr2seg_prompt, batch_size=n)[1]
        for n in (2, 6)
    )
    assert [r["text"] for r in a] == [r["text"] for r in b]


def test_unknown_data_is_named():
    with pytest.raises(FileNotFoundError, match="data: coco does not exist.*called mini"):
        load_data("coco", "val")


# ---- runs of their own

SMALL = dict(samples=7, batch=2, segmenter="grabcut", max_new_tokens=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_evaluation(EvaluateConfig(**SMALL), tmp_path_factory.mktemp("whole") / "run").folder


def bytes_of(folder):
    return [(folder / n).read_bytes() for n in ("predictions.jsonl", "results.json")]


def test_a_run_leaves_predictions_and_summary(whole):
    rows, results, data = (
        read_jsonl(whole / "predictions.jsonl"),
        read_json(whole / "results.json"),
        MiniReasonSeg("val"),
    )
    assert [r["sample"] for r in rows] == [data[i].id for i in range(7)]
    assert all(len(r["query"]) and len(r["text"]) for r in rows)
    for i, r in enumerate(rows):
        drawn = coco.decode(r["rle"]) > 0
        assert (r["i"], r["u"]) == ((drawn & data[i].mask).sum(), (drawn | data[i].mask).sum())
    assert results["gIoU"] == pytest.approx(np.mean([r["i"] / r["u"] for r in rows]))
    assert results["cIoU"] == pytest.approx(sum(r["i"] for r in rows) / sum(r["u"] for r in rows))
    assert results["evaluation"] == dict(
        data="mini", format="MiniReasonSeg", split="val", protocol="lisa"
    )
    assert results["n"] == 7
    assert sum(v["n"] for v in results["strata"]["difficulty"].values()) == 7


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_stopped_after_a_batch_and_resumed_is_unbroken_to_the_byte(
    whole, tmp_path, monkeypatch, batches
):
    "Stopped after some batches; the fourth is the last, and only the summary is left."
    written, append = [], append_jsonl

    def appended(path, rows):
        append(path, rows)
        written.append(len(rows))
        if len(written) == batches:
            (path.parent / "stop").touch()
        if batches == 4 and len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("dr2seg_lib.evaluation.evaluate.append_jsonl", appended)
    try:
        run = run_evaluation(EvaluateConfig(**SMALL), tmp_path / "run")
    except KeyboardInterrupt:
        run = Run.open(tmp_path / "run")
    assert run.status == "interrupted"
    assert not (run.folder / "results.json").exists()
    first = (run.folder / "predictions.jsonl").read_bytes()
    run_evaluation(EvaluateConfig(**SMALL), run.folder, resume=True)
    assert bytes_of(run.folder) == bytes_of(whole)
    assert bytes_of(run.folder)[0].startswith(first)
    assert sum(written) == 7, "nothing was asked twice"


@pytest.mark.parametrize("cut", [0.1, 0.37, 0.5, 0.95, 1.0])
def test_killed_anywhere_and_resumed_is_unbroken_to_the_byte(whole, tmp_path, cut):
    text = (whole / "predictions.jsonl").read_bytes()
    with Run.create(tmp_path / "run", EvaluateConfig(**SMALL).model_dump(), bar=False):
        pass
    (tmp_path / "run/predictions.jsonl").write_bytes(text[: int(len(text) * cut)])
    run_evaluation(EvaluateConfig(**SMALL), tmp_path / "run", resume=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


# ---- in several processes


@pytest.fixture
def one_thread():
    "As `torchrun` gives each of its processes; more threads may add up in another order."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def alone(one_thread, tmp_path):
    return run_evaluation(EvaluateConfig(**SMALL), tmp_path / "alone").folder


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_predictions_of_one_to_the_byte(
    alone, processes, tmp_path, monkeypatch
):
    "Seven samples, three batches and a half: some processes have less in the last round."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = run_evaluation(EvaluateConfig(**SMALL, processes=processes), tmp_path / "run")
    assert run.status == "done"
    assert bytes_of(run.folder) == bytes_of(alone)
    assert run.info["parameters"]["runtime"]["processes"] == processes
    assert run_evaluation(EvaluateConfig(**SMALL), tmp_path / "one").info["status"] == "done", (
        "this process is still one of its own"
    )


def test_killed_with_all_its_processes_and_resumed_with_another_number(
    alone, tmp_path, monkeypatch
):
    "SIGKILL to both processes after the first round; three go on, are stopped; one ends it."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, config = tmp_path / "run", EvaluateConfig(**SMALL | dict(batch=1), processes=2)
    bytes_one = bytes_of(
        run_evaluation(EvaluateConfig(**SMALL | dict(batch=1)), tmp_path / "one").folder
    )
    imports = (
        "from dr2seg_lib.evaluation.config import EvaluateConfig; "
        "from dr2seg_lib.evaluation.evaluate import run_evaluation; "
    )
    asked = f"EvaluateConfig.model_validate_json({config.model_dump_json()!r})"
    code = f"{imports}run_evaluation({asked}, {str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (
        (folder / "predictions.jsonl").exists() and (folder / "predictions.jsonl").stat().st_size
    ):
        assert process.poll() is None, "it ended before its first row"
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that it neither ends nor changes while it is looked at
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):  # ended with its parent
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.time() + 30
    while Run.open(folder).status == "running" and time.time() < deadline:
        time.sleep(0.1)
    assert Run.open(folder).status == "failed"
    assert not (folder / "results.json").exists()
    rows = (folder / "predictions.jsonl").read_bytes().count(b"\n")
    if rows < 4:  # the stop file is looked at after each round, here of three
        timer = threading.Timer(0, stop_when, [folder, rows])
        timer.start()
        run = run_evaluation(
            EvaluateConfig(**SMALL | dict(batch=1), processes=3), folder, resume=True
        )
        timer.join()
        assert run.status in ("interrupted", "done")
    if Run.open(folder).status != "done":
        run_evaluation(EvaluateConfig(**SMALL | dict(batch=1)), folder, resume=True)
    assert bytes_of(folder) == bytes_one


def descendants(pid):
    "All processes below one, as /proc tells them."
    children = [
        int(c)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for c in (task / "children").read_text().split()
    ]
    return children + [d for c in children for d in descendants(c)]


def stop_when(folder, rows):
    "Ask for an end once a round has been written."
    for _ in range(3000):
        if (folder / "predictions.jsonl").read_bytes().count(b"\n") > rows:
            return (folder / "stop").touch()
        time.sleep(0.02)


def test_under_a_launcher_of_ones_own(alone, tmp_path, monkeypatch):
    "As on a cluster: torchrun starts the module, and the configuration says nothing of processes."
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "dr2seg_lib.evaluation.evaluate",
        EvaluateConfig(**SMALL).model_dump_json(),
        str(tmp_path / "run"),
    ]
    subprocess.run(
        command, check=True, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True
    )
    assert bytes_of(tmp_path / "run") == bytes_of(alone)


def test_what_goes_wrong_in_several_processes_is_the_sentence_of_one(tmp_path):
    config = EvaluateConfig(**SMALL | dict(model="nobody/nothing"), processes=2)
    with pytest.raises(
        ValueError, match="^model nobody/nothing cannot be loaded .*connect to the hub$"
    ):
        run_evaluation(config, tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed"
    with pytest.raises(ValueError, match="already holds a run .failed.; choose another folder"):
        run_evaluation(config, tmp_path / "run")


def test_each_process_needs_a_gpu_where_there_are_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_evaluation(EvaluateConfig(processes=2))
    with pytest.raises(
        ValueError,
        match="processes: 4 need a GPU each, and this machine has 2; ask for no more",
    ):
        check_evaluation(EvaluateConfig(processes=4))


def reasonseg(root, n):
    "A ReasonSeg split of scenes: pixels to ignore, a file without polygons, a broken one."
    folder = root / "ReasonSeg" / "val"
    folder.mkdir(parents=True)

    def corners(x1, y1, x2, y2):
        return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]

    for i, s in enumerate(MiniReasonSeg("val", n)):
        Image.fromarray(s.image).save(folder / f"{i:03}.jpg", quality=95)
        shapes = [dict(label="target", points=corners(*t.box)) for t in s.targets] + [
            dict(label="ignore", points=corners(0, 0, 20, 20 + i % 5))
        ]
        (folder / f"{i:03}.json").write_text(
            json.dumps(
                dict(text=[s.query], is_sentence=bool(i % 2), shapes=shapes if i != 1 else [])
            )
        )
    (folder / "002.json").write_text("{")
    return root


def test_200_samples_of_reasonseg_end_to_end(tmp_path, monkeypatch):
    "Counted by hand under both protocols; answers give the true box, so this is about the data."
    root = reasonseg(tmp_path / "data", 200)

    def true_box(sample, frame):
        if not sample.targets:
            return ""
        box = [int(v * frame / sample.size[k % 2]) for k, v in enumerate(sample.targets[0].box)]
        return f'<think>x.</think><answer>[{{"bbox_2d": {box}, "point_2d": [50, 50]}}]</answer>'

    def answers(policy, samples, prompt, max_new_tokens, parse):
        return [said(true_box(sample, policy.frame)) for sample in samples]

    class Boxes(Segmenter):
        def masks(self, image, targets):
            found = []
            for t in targets:
                found.append(np.zeros(image.shape[:2], bool))
                x1, y1, x2, y2 = map(int, t.box)
                found[-1][y1 : y2 + 1, x1 : x2 + 1] = True
            return found

    monkeypatch.setattr("dr2seg_lib.evaluation.evaluate.answer_greedily", answers)
    monkeypatch.setattr("dr2seg_lib.evaluation.evaluate.load_segmenter", lambda name: Boxes())
    for protocol in ("lisa", "visionreasoner"):
        run = run_evaluation(EvaluateConfig(data=str(root), protocol=protocol), tmp_path / protocol)
        rows, results = (
            read_jsonl(run.folder / "predictions.jsonl"),
            read_json(run.folder / "results.json"),
        )
        inter = union = total = 0
        for i, (r, s) in enumerate(zip(rows, MiniReasonSeg("val", 200))):
            if i == 2:
                assert "002.json" in r["error"]
                continue
            canvas, boxes = (
                np.zeros((224, 224), np.uint8),
                [(*t.box, 1) for t in s.targets] + [(0, 0, 20, 20 + i % 5, 255)],
            )
            for x1, y1, x2, y2, label in (
                sorted(boxes, key=lambda b: (b[0] - b[2] - 1) * (b[3] - b[1] + 1)) if i != 1 else []
            ):
                canvas[y1 : y2 + 1, x1 : x2 + 1] = label
            true, ignored = (
                (canvas > 0, canvas < 0)
                if protocol == "visionreasoner"
                else (canvas == 1, canvas == 255)
            )
            drawn = coco.decode(r["rle"]) > 0
            i_, u_ = (true & drawn & ~ignored).sum(), ((true | drawn) & ~ignored).sum()
            assert (r["i"], r["u"]) == (i_, u_), (protocol, i)
            inter, union, total = (
                inter + i_,
                union + u_,
                total + (i_ / u_ if u_ else protocol == "lisa"),
            )
        assert results["n"] == 200
        assert results["broken"] == 1
        assert results["evaluation"]["protocol"] == protocol
        assert results["evaluation"]["format"] == "ReasonSeg"
        assert results["gIoU"] == pytest.approx(total / 200)
        assert results["cIoU"] == pytest.approx(inter / union)
        assert results["N_acc"] == 1
        assert set(results["strata"]["query"]) == {"long", "short"}


# ---- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "checkpoints" / "step-000002"
    policy = Policy.load().add_lora(4, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.normal_(std=0.3)
    policy.adapter.save_pretrained(str(folder))
    return folder


def test_an_adapter_changes_the_answers(adapter, whole, tmp_path):
    run = run_evaluation(
        EvaluateConfig(**SMALL | dict(samples=2, adapter=str(adapter))), tmp_path / "run"
    )
    rows = read_jsonl(run.folder / "predictions.jsonl")
    assert [r["text"] for r in rows] != [
        r["text"] for r in read_jsonl(whole / "predictions.jsonl")[:2]
    ]
    assert run.info["parameters"]["model"]["adapter"] == str(adapter)
    theirs, _ = evaluate(
        Policy.load().load_adapter(adapter),
        load_segmenter("grabcut"),
        MiniReasonSeg("val", 2),
        dr2seg_prompt,
        2,
        100,
    )
    assert theirs["gIoU"] == read_json(run.folder / "results.json")["gIoU"]


def test_tuned_weights_are_loaded_too(tmp_path):
    policy = Policy.load().unfreeze()
    with torch.no_grad():
        policy.trainable()[0][1].add_(1)
    save_file(
        {n: p.detach().clone() for n, p in policy.trainable()},
        str(tmp_path / "weights.safetensors"),
    )
    loaded = load_policy("embedded", str(tmp_path))
    a, b = policy.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_wrong_adapter_is_one_sentence(adapter, tmp_path):
    def told(name):
        config = EvaluateConfig(adapter=str(name))
        return str(pytest.raises(ValueError, check_evaluation, config).value)

    assert (
        told(tmp_path / "nowhere") == f"adapter {tmp_path}/nowhere does not exist; "
        "name a checkpoint such as runs/x/checkpoints/step-000060"
    )
    assert (
        told(adapter.parents[1])
        == f"adapter {adapter.parents[1]} holds no adapter; name a checkpoint such as {adapter}"
    )
    weights = load_file(str(adapter / "adapter_model.safetensors"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(
        {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in weights.items()},
        str(other / "adapter_model.safetensors"),
    )
    with pytest.raises(
        ValueError,
        match=f"adapter {other} was made for another model than embedded; "
        "name the model it was trained on",
    ):
        load_policy("embedded", str(other))
    write_json(other / "manifest.json", dict(step=1, files={"adapter_model.safetensors": "0"}))
    assert (
        told(other)
        == f"adapter {other} is damaged (adapter_model.safetensors differs from its manifest); "
        "name another checkpoint"
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    "The embedded policy as large models are laid out: an index and several files."
    policy, folder = Policy.load(), tmp_path_factory.mktemp("sharded")
    for part in policy.model, policy.processor:
        part.save_pretrained(folder, max_shard_size="6MB")
    assert len(list(folder.glob("model-*"))) > 2
    return folder


def without_layer_1(folder):
    for file in folder.glob("model-*"):
        save_file(
            {k: v for k, v in load_file(str(file)).items() if "layers.1." not in k},
            str(file),
            metadata=dict(format="pt"),
        )


@pytest.mark.parametrize(
    "harm, at_once, later",
    [
        (
            lambda f: (f / "config.json").unlink(),
            "is not whole (config.json is missing); fetch it again",
            "cannot be loaded (Unrecognized model",
        ),
        (
            lambda f: min(f.glob("model-*")).unlink(),
            ".safetensors is missing); fetch it again",
            "cannot be loaded (No such file or directory: ",
        ),
        (
            lambda f: os.truncate(min(f.glob("model-*")), 999),
            ".safetensors is cut short or no safetensors file: ",
            "cannot be loaded (Error while deserializing header",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            "model.safetensors.index.json does not map weights to files",
            "cannot be loaded (Expecting property name",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "is not whole (tokenizer.json is missing)",
            None,
        ),
        (
            lambda f: (f / "config.json").write_text(
                re.sub(
                    '"image_token_id": \\d+', '"image_token_id": 9', (f / "config.json").read_text()
                )
            ),
            None,
            "has not the tokenizer of its config.json; fetch tokenizer.json again",
        ),
        (
            lambda f: (f / "config.json").write_text(
                (f / "config.json")
                .read_text()
                .replace('"intermediate_size": 704', '"intermediate_size": 700')
            ),
            None,
            "lacks weights of the size that its config.json says, "
            "model.language_model.layers.0.mlp.down_proj.weight for one",
        ),
        (
            without_layer_1,
            None,
            "lacks weights of the size that its config.json says, model.language_model.layers.1.",
        ),
    ],
    ids=["config", "missing", "cut", "index", "tokenizer", "other tokenizer", "sizes", "weights"],
)
def test_a_checkpoint_that_is_not_whole_is_one_sentence(sharded, harm, at_once, later, tmp_path):
    "Told at once where the files show it, else when it is loaded; no weights are made up."
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    assert validate_model(str(folder)) == str(folder)
    harm(folder)
    if at_once:
        with pytest.raises(ValueError) as told:
            check_evaluation(EvaluateConfig(model=str(folder)))
        assert at_once in str(told.value)
    if later is None:
        return
    with pytest.raises(ValueError) as told:
        load_policy(str(folder))
    assert f"model {folder} " in str(told.value)
    assert later in str(told.value)
    assert "\n" not in str(told.value)


def test_a_checkpoint_of_several_files_answers_as_its_one(sharded):
    samples = [MiniReasonSeg("val")[i] for i in range(2)]
    a, b = (
        evaluate(load_policy(name), load_segmenter("grabcut"), samples, dr2seg_prompt, 2, 60)[1]
        for name in ("embedded", str(sharded))
    )
    assert [(r["text"], r["rle"]) for r in a] == [(r["text"], r["rle"]) for r in b]


def test_a_cut_adapter_is_told_at_once(adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    os.truncate(folder / "adapter_model.safetensors", 500)
    with pytest.raises(
        ValueError,
        match="is damaged .adapter_model.safetensors is cut short.*name another checkpoint",
    ):
        check_evaluation(EvaluateConfig(adapter=str(folder)))


@pytest.mark.parametrize(
    "config, check",
    [
        (EvaluateConfig, check_evaluation),
        (functools.partial(TrainConfig, norm_lr=0), check_training),
    ],
    ids=["evaluate", "train"],
)
def test_flash_attention_is_told_before_anything_starts_where_it_cannot_be(
    config, check, monkeypatch
):
    with pytest.raises(
        ValueError,
        match="attention flash needs a GPU and the package flash_attn; "
        "install it with pip install flash-attn, or use sdpa",
    ):
        check(config(attention="flash", dtype="bfloat16"))
    monkeypatch.setattr("dr2seg_lib.models.requirements.has_flash_attention", lambda: True)
    with pytest.raises(
        ValueError,
        match="attention flash does not compute in float32; use dtype bfloat16, or attention sdpa",
    ):
        check(config(attention="flash"))
    asked = config(attention="flash", dtype="bfloat16")
    check(asked)
    assert asked.runtime.attention == "flash"
    with pytest.raises(
        ValidationError, match="attention\n  Input should be 'sdpa', 'eager' or 'flash'"
    ):
        config(attention="fast")


def test_attention_reaches_the_model(tmp_path):
    a, b = (
        run_evaluation(
            EvaluateConfig(**SMALL | dict(samples=2, attention=attention)), tmp_path / attention
        ).folder
        for attention in ("sdpa", "eager")
    )
    rows_a, rows_b = (read_jsonl(f / "predictions.jsonl") for f in (a, b))
    assert [(r["text"], r["rle"]) for r in rows_a] == [(r["text"], r["rle"]) for r in rows_b]
    assert (
        load_policy("embedded", attention="eager").model.model.visual.config._attn_implementation
        == "eager"
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(smaples=3), "smaples"),
        (dict(recipe="dr3seg"), "method .dr3seg. is unknown; use one of"),
        (dict(model="embeded"), "use embedded"),
        (
            dict(model="/nowhere/Qwen"),
            "model '/nowhere/Qwen' is unknown; use embedded, a local folder",
        ),
        (dict(model="~/Qwen"), "is unknown"),
        (dict(protocol="lissa"), "lisa"),
        (dict(data="coco"), "data: coco does not exist.*called mini"),
        (dict(split="tset"), "no split 'tset'"),
        (dict(batch=0), "batch"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        check_evaluation(EvaluateConfig(**wrong))


def test_the_notebook_declares_the_config():
    declared = parameters_of(Path(__file__).parents[2] / "nbs/experiments/evaluate.ipynb")
    assert declared == dict(preset="", config={}, out="", resume=False)


def test_the_command(tmp_path, capsys):
    args = [
        "run",
        "evaluate",
        "-p",
        "segmenter",
        "grabcut",
        "-p",
        "samples",
        "3",
        "-p",
        "max_new_tokens",
        "60",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "mini, split val, protocol lisa" in out
    assert "| all | 3 |" in out
    assert "| difficulty: " in out
    assert main([*args, "--resume"]) == 2
    assert "only a run that ended early" in capsys.readouterr().err
    assert main(["run", "evaluate", "-p", "adapter", str(tmp_path)]) == 2
    assert "holds no adapter; name a checkpoint" in capsys.readouterr().err


def test_a_checkpoint_is_judged_as_it_was_trained(adapter, tmp_path, capsys):
    "Given nothing but the checkpoint; what it took from the run is printed and recorded."
    folder = tmp_path / "runs" / "x" / "checkpoints" / "step-000002"
    shutil.copytree(adapter, folder)
    write_json(
        folder.parents[1] / "run.json",
        dict(
            status="done",
            parameters=TrainConfig(
                recipe="visionreasoner",
                segmenter="grabcut",
                max_new_tokens=20,
                max_question_tokens=200,
            ).model_dump(),
        ),
    )
    assert (
        main(
            [
                "run",
                "evaluate",
                "-p",
                "adapter",
                str(folder),
                "-p",
                "samples",
                "2",
                "-p",
                "max_question_tokens",
                "300",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    out, recorded = capsys.readouterr().out, Run.open(tmp_path / "run").info["parameters"]
    assert (
        f"from {folder.parents[1]}: model embedded, method visionreasoner, segmenter grabcut, "
        "model.dtype float32, model.quantize none, rollout.max_new_tokens 20\n" in out
    )
    taken = {
        "model": "embedded",
        "method": "visionreasoner",
        "segmenter": "grabcut",
        "rollout.max_new_tokens": 20,
        "data.max_question_tokens": 300,
    }
    assert flat_parameters(recorded).items() >= taken.items()
    assert "100.0 % of the questions got an answer that max_new_tokens cut short" in out
    assert read_json(tmp_path / "run" / "results.json")["cut"] == 1


def test_how_the_split_was_made_is_in_the_results():
    class Hashed(MiniReasonSeg):
        split_note = "a tenth of the ids, held out by their hash"

    assert (
        dataset_info(Hashed("val", 1), "mine", "val")["split_note"]
        == "a tenth of the ids, held out by their hash"
    )
    assert "split_note" not in dataset_info(MiniReasonSeg("val", 1), "mini", "val")


def test_an_adapter_whose_file_holds_more_than_it_says_is_one_sentence(tmp_path):
    "The length is right by the manifest, which whoever altered the file has written anew."
    folder = tmp_path / "adapter"
    load_policy("embedded").add_lora(2, 2).adapter.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(1000))
    with pytest.raises(ValueError, match="adapter .* cannot be read .*name another checkpoint"):
        load_policy("embedded", str(folder))


@pytest.mark.parametrize(
    "field, value",
    [("use_bdlora", "False"), ("r", "8"), ("target_modules", 7), ("peft_type", None)],
)
def test_an_adapter_with_an_odd_configuration_is_one_sentence(tmp_path, field, value):
    load_policy("embedded").add_lora(2, 2).adapter.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match="^adapter [^\n]*$"):
        load_policy("embedded", str(tmp_path))
