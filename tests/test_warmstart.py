"The embedded policy's making: lossless tokenizer, exact batches; and the quality of the one that ships."
import numpy as np
import pytest

from dr2seg_lib import dialogue
from dr2seg_lib.policy import EMBEDDED, Policy
from dr2seg_lib.scenes import draw_puzzle
from dr2seg_lib.warmstart import STAGES, Stage, lesson, make_tokenizer, soft_labels
from dr2seg_lib.warmstart import _draw_page


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer()


def test_tokenizer_gives_every_lesson_back_byte_for_byte(tokenizer):
    rng = np.random.default_rng(0)
    for seed in range(60):
        page = _draw_page(seed)
        for text in lesson(rng, page, .5, .2):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_tokenizer_of_the_weights_is_the_one_made_here(tokenizer):
    assert Policy.load().tokenizer.get_vocab() == tokenizer.get_vocab()


def test_prompts_are_short(tokenizer):
    assert len(tokenizer(dialogue.dr2seg(draw_puzzle(0).question.text))["input_ids"]) < 25


def test_soft_labels():
    rows = soft_labels(200, 5, 1.0)
    assert np.allclose(rows.sum(1), 1) and rows[40].argmax() == 45 and rows[40, 44] == rows[40, 46] and rows[:, :5].sum() == 0
    assert (soft_labels(200, 5, 0).max(1).values == 1).all()


def test_stages_run_linearly():
    s = Stage("x", 10, implicit=(0.2, 0.6))
    assert s.at(0)["implicit"] == 0.2 and s.at(0.5)["implicit"] == pytest.approx(0.4) and len({s.name for s in STAGES}) == len(STAGES)


def test_weights_are_small():
    assert (EMBEDDED / "model.safetensors").stat().st_size < 20 * 2**20
