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
from dr2seg_lib.models.pretrained import EMBEDDED
from dr2seg_lib.pretraining.lesson_batches import soft_number_labels
from dr2seg_lib.pretraining.lessons import draw_lesson_page, training_example
from dr2seg_lib.pretraining.policy import CURRICULUM, CurriculumStage
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


def test_weights_are_small():
    assert (EMBEDDED / "model.safetensors").stat().st_size < 20 * 2**20
