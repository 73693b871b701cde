"DPAD's measures of finished runs, from the command line; one is of a set written by hand."

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.parameters import EvaluateConfig, TrainConfig
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.experiments.evaluated import answered
from dr2seg_lib.scorers.clip import load_scorer
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.paper_rows import rows_of_run

DR2SEG = Path(sys.executable).parent / "dr2seg"


def dr2seg(*words):
    return subprocess.run([DR2SEG, *map(str, words)], capture_output=True, text=True)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "An evaluation on a set of the hub's form, of whose five rows one is broken; and a training."
    tmp, rows = tmp_path_factory.mktemp("discriminate"), []
    for k, s in enumerate(MiniReasonSeg("val", 5)):
        image = dict(bytes=b"no picture" if k == 2 else png(s.image), path=None)
        more = dict(image_id=f"{k}", ann_id="0", img_height=224, img_width=224)
        rows.append(dict(image=image, text=s.query, mask=s.mask.tolist(), **more))
    (tmp / "Set_val").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp / "Set_val" / "test-00000-of-00001.parquet")
    data = dict(name=str(tmp / "Set_val"), split="test", protocol="visionreasoner")
    run_evaluation(EvaluateConfig(data=data), tmp / "hub")
    small = dict(questions_per_step=2, group_size=2, max_new_tokens=32)
    held_out = dict(samples=3, every=0)
    train(TrainConfig(method="dpad", steps=1, rollout=small, evaluation=held_out), tmp / "dpad")
    return tmp


def test_a_broken_record_is_left_out(runs):
    rows, samples = answered(runs / "hub")
    assert len(read_jsonl(runs / "hub" / "predictions.jsonl")) == 5
    assert [r["sample"] for r in rows] == [s.id for s in samples]
    assert len(rows) == 4


def test_a_training_has_two_ends(runs):
    for when in "before", "after", "":
        rows, samples = answered(runs / "dpad", when)
        assert [r["sample"] for r in rows] == [s.id for s in samples]
        assert len(rows) == 3


def test_runs_are_measured_and_stand_beside_the_papers(runs):
    named = json.dumps([str(runs / "hub"), str(runs / "dpad")])
    done = dr2seg("run", "discriminate", "-p", "runs", named, "--out", runs / "measured")
    assert done.returncode == 0, done.stderr
    found = read_json(runs / "measured" / "results.json")["discrimination"]
    assert list(found) == ["hub", "dpad"]
    assert found["hub"]["n"] == 4
    rows = dict(rows_of_run(runs / "measured"))["Discrimination"]
    assert rows["SNR"] is None or rows["SNR"].mean > 0  # of captions, which a policy may not give
    told = [row for _, row in rows_of_run(runs / "measured")]
    assert [row["on"] for row in told][0].startswith("Set_val")
    assert [row["TSNR"].mean for row in told] == [found[k]["TSNR"] for k in found]


def test_the_ratio_is_that_of_open_clip_asked_by_hand(runs):
    "One row: the reasoning with the crop of the target's box, over that with the whole picture."
    import torch

    rows, samples = answered(runs / "hub")
    measured = read_jsonl(runs / "measured" / "measured_hub.jsonl")
    scorer = load_scorer()
    short = [scorer.tokens(row["parsed"]["think"]) <= 77 for row in rows]  # a longer one is cut up
    k = short.index(True)
    row, sample = rows[k], samples[k]
    ys, xs = np.nonzero(sample.mask)
    crop = sample.image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    with torch.no_grad():
        text = scorer.model.encode_text(scorer.tokenizer([row["parsed"]["think"]]))
        seen = [
            scorer.model.encode_image(scorer.preprocess(Image.fromarray(p))[None])
            for p in (crop, sample.image)
        ]
        s1, s2 = (torch.cosine_similarity(text, image).item() for image in seen)
    assert measured[k]["tsnr"] == pytest.approx(s1 / s2, abs=1e-4)


@pytest.mark.parametrize(
    ("runs_given", "said"),
    [([], "none is named"), (["nowhere"], "name a finished run")],
)
def test_what_is_no_run_is_told(runs_given, said, tmp_path):
    done = dr2seg(
        "run", "discriminate", "-p", "runs", json.dumps(runs_given), "--out", tmp_path / "o"
    )
    assert done.returncode != 0
    assert said in done.stderr
