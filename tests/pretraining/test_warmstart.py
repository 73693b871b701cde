"The making of the embedded policy: its tokenizer, its batches, and the quality of what ships."

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dr2seg_lib.core.files import read_json
from dr2seg_lib.data.mini import draw_problem
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.requirements import EMBEDDED
from dr2seg_lib.pretraining import precision
from dr2seg_lib.pretraining.curriculum import CURRICULUM, CurriculumStage
from dr2seg_lib.pretraining.lesson_batches import soft_number_labels
from dr2seg_lib.pretraining.lessons import draw_lesson_page, draw_pool, training_example
from dr2seg_lib.pretraining.policy import warm_start
from dr2seg_lib.pretraining.policy_model import make_model
from dr2seg_lib.pretraining.tokenizer import WORLD_FRAME, make_tokenizer
from dr2seg_lib.runs.run_folder import Run


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_tokenizer_gives_every_lesson_back_byte_for_byte(tokenizer):
    rng = np.random.default_rng(0)
    for seed in range(60):
        page = draw_lesson_page(seed)
        for text in training_example(rng, page, 0.5, 0.2):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids


def test_drawing_the_pool_tells_how_far_it_is():
    told = []
    pages = draw_pool(3, seed=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    for page, seed in zip(pages, (5, 6, 7), strict=True):
        assert (page.picture == draw_lesson_page(seed).picture).all()


def test_tokenizer_of_the_weights_is_the_one_made_here(tokenizer):
    assert Policy.load().tokenizer.get_vocab() == tokenizer.get_vocab()


def test_prompts_are_short(tokenizer):
    assert len(tokenizer(dr2seg_prompt(draw_problem(0).question.text))["input_ids"]) < 25


def test_soft_labels():
    rows = soft_number_labels(1.0)
    assert np.allclose(rows.sum(1), 1)
    assert rows[40].argmax() == 40
    assert rows[40, 39] == rows[40, 41]
    assert (soft_number_labels(0).argmax(1) == torch.arange(WORLD_FRAME + 1)).all()


def test_near_numbers_begin_alike(tokenizer):
    zero = tokenizer.convert_tokens_to_ids("0")
    rows = make_model(tokenizer).get_input_embeddings().weight[zero : zero + WORLD_FRAME + 1]
    close = (
        torch.nn.functional.cosine_similarity(rows[:-1], rows[1:]),
        torch.nn.functional.cosine_similarity(rows[:-20], rows[20:]),
    )
    assert close[0].min() > close[1].max()
    assert close[0].max() < 0.999


def test_the_experiment_makes_a_policy_that_loads(tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("dr2seg"),
            "run",
            "warmstart_policy",
            "-p",
            "effort",
            "0.002",
            "-p",
            "pool",
            "64",
            "-p",
            "quality_samples",
            "4",
            "--out",
            tmp_path / "run",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Policy.load(str(tmp_path / "run" / "policy")).frame == WORLD_FRAME
    rows, quality = (
        Run.open(tmp_path / "run").metrics(),
        read_json(tmp_path / "run" / "results.json")["quality"],
    )
    assert rows[-1]["stage"] == "finish"
    assert set(quality) == {
        "referring",
        "implicit",
        "implicit, no description",
    }


def test_stages_run_linearly():
    s = CurriculumStage("x", 10, implicit=(0.2, 0.6))
    assert s.at(0)["implicit"] == 0.2
    assert s.at(0.5)["implicit"] == pytest.approx(0.4)
    assert len({s.name for s in CURRICULUM}) == len(CURRICULUM)


class Stopped(Exception):
    pass


def test_a_stopped_warm_start_ends_as_one_that_was_not(tokenizer, tmp_path):
    pool = [draw_lesson_page(seed) for seed in range(8)]
    stages = [
        CurriculumStage("see", 6, 2, "vision", sigma=(1.0, 1.0)),
        CurriculumStage("think", 6, 2, implicit=(1.0, 1.0), concise=(0.5, 0.5)),
        CurriculumStage("finish", 4, 2, "both", implicit=(1.0, 1.0), lr=(1.0, 0.0)),
    ]
    options = dict(dtype=torch.float32, every=5)

    def stop(step, row):
        if step == 10:
            raise Stopped

    def started():
        torch.manual_seed(0)
        return make_model(tokenizer)

    whole = warm_start(started(), tokenizer, pool, stages, **options)
    progress = tmp_path / "progress.pt"
    with pytest.raises(Stopped):
        warm_start(started(), tokenizer, pool, stages, log=stop, progress=progress, **options)
    rows = []
    keep = dict(log=lambda step, row: rows.append(step), progress=progress)
    rest = warm_start(started(), tokenizer, pool, stages, **keep, **options)
    assert rows == [15, 16]
    for a, b in zip(whole.parameters(), rest.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_warm_start_says_what_it_will_take(tokenizer, capsys):
    pool = [draw_lesson_page(seed) for seed in range(4)]
    stages = [CurriculumStage("see", 2, 2, "vision", sigma=(1.0, 1.0))]
    warm_start(make_model(tokenizer), tokenizer, pool, stages, dtype=torch.float32)
    assert "2 steps in float32, about 0 minutes" in capsys.readouterr().out


def test_slow_bf16_is_not_chosen(monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.9}
    monkeypatch.setattr(precision, "multiply_seconds", seconds.get)
    assert precision.probe_dtype() == torch.float32
    seconds[torch.bfloat16] = 0.3
    assert precision.probe_dtype() == torch.bfloat16


def test_weights_are_small():
    assert (EMBEDDED / "model.safetensors").stat().st_size < 20 * 2**20
