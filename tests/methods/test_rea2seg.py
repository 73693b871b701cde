"Rea2Seg: attention against the model's own, candidates on maps by hand, scores, the whole."

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.masks import decode_rle, iou, ratio
from dr2seg_lib.core.parameters import Rea2SegConfig
from dr2seg_lib.data.mini import SPLIT_SEEDS, MiniReasonSeg, draw_problem
from dr2seg_lib.data.samples import Target
from dr2seg_lib.evaluation.config import check_rea2seg
from dr2seg_lib.evaluation.rea2seg import cost_table, run_rea2seg, summarize_rea2seg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.rea2seg import (
    EMBEDDED_JUDGE,
    SCORE_TOKENS,
    SCORING,
    Rea2SegResult,
    add_score_tokens,
    best_candidate,
    highlight_candidate,
    load_judge,
    rea2seg,
    read_score,
    score_candidates,
    scoring_prompt,
)
from dr2seg_lib.methods.rea2seg_candidates import (
    Candidate,
    attention_grid,
    coordinate_tokens,
    distinct_candidates,
    otsu_regions,
    peaks,
    propose_candidates,
    refine_prompts,
)
from dr2seg_lib.models.attention_maps import answer_attention, attention_overlay, heat_map
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.pretraining.judge import (
    JUDGE_SEEDS,
    judge_example,
    judge_quality,
    save_judge,
    spoil_prompt,
    train_judge,
)
from dr2seg_lib.pretraining.policy_model import make_model
from dr2seg_lib.pretraining.tokenizer import make_processor, make_tokenizer
from dr2seg_lib.rollouts.parsing import find_block, parse_response
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.segmenters.base import Segmenter
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.viewing.rea2seg import gallery, gallery_picks

ANSWER = (
    "<think>it is at the top.</think>"
    '<answer>[{"bbox_2d": [10,20,30,44], "point_2d": [20,32]}]</answer>'
)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return Policy(make_model(tokenizer), make_processor(tokenizer), 112)


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter("embedded")


@pytest.fixture(scope="module")
def samples():
    return [MiniReasonSeg("train")[i] for i in range(4)]


def disc(x, y, r, side=96):
    yy, xx = np.mgrid[0:side, 0:side]
    return np.hypot(xx - x, yy - y) <= r


def hill(x, y, r, height, side=96):
    yy, xx = np.mgrid[0:side, 0:side]
    return height * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * r**2))


def says(*texts):
    return [Response(t, parse_response(t), [t], [0.0], [1.0], 1) for t in texts]


# attention


def test_attention_equals_what_the_model_itself_returns(tiny, samples):
    "Against one plain forward: prompts of unequal length, upper half of the layers, all heads."
    some = samples[:2]
    texts, seen = (
        [dr2seg_prompt("where"), dr2seg_prompt(some[1].query)],
        tiny.encode([s.image for s in some]),
    )
    ids, attention = tiny.tokenize(texts, seen)
    assert (attention == 0).any()  # one of them is padded
    said = torch.tensor([coordinate_tokens(tiny.tokenizer, ANSWER)[0]] * 2)
    ours = answer_attention(tiny, tiny.prefill(texts, seen), said)
    assert ours.shape == (2, said.shape[1] - 1, ids.shape[1] + said.shape[1] - 1)
    assert torch.allclose(ours.sum(-1), torch.ones(ours.shape[:2]), atol=1e-5)

    def squash(s):
        return cv2.resize(s.image, (112, 112), interpolation=cv2.INTER_AREA)

    images = tiny.processor.image_processor(
        [squash(s) for s in some], do_resize=False, return_tensors="pt"
    )
    full = torch.cat([ids, said], 1)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = tiny.model(
            input_ids=full,
            attention_mask=torch.cat([attention, torch.ones_like(said)], 1),
            output_attentions=True,
            mm_token_type_ids=(full == tiny.model.config.image_token_id).int(),
            **images,
        ).attentions
    tiny.model.set_attn_implementation("sdpa")
    plain = torch.stack(whole[len(whole) // 2 :]).mean((0, 2))[:, ids.shape[1] : -1, :-1]
    for row, other, pad in zip(ours, plain, (attention == 0).sum(1).tolist()):
        end = ids.shape[1] - pad  # a prefix holds its prompts' padding behind them
        other = torch.cat([other[:, pad : pad + end], other[:, :pad], other[:, pad + end :]], 1)
        assert (row - other).abs().max() < 1e-5


def test_grid_is_the_coordinates_attention_to_the_image(tiny, samples):
    text, seen = dr2seg_prompt(samples[0].query), tiny.encode([samples[0].image])
    prefix = tiny.prefill([text], seen)
    grid = attention_grid(tiny, text, seen[0], prefix, ANSWER)
    ids, on = coordinate_tokens(tiny.tokenizer, ANSWER)
    rows = answer_attention(tiny, prefix, torch.tensor([ids]))[0]
    columns = (tiny.tokenize([text], seen)[0][0] == tiny.model.config.image_token_id).nonzero()[
        :, 0
    ]
    by_hand = np.mean(
        [rows[t - 1, columns].numpy() for t, o in enumerate(on) if o], axis=0
    ).reshape(7, 7)  # token t was written at t - 1
    assert grid.shape == (7, 7)
    assert np.allclose(grid, by_hand, atol=1e-6)
    assert 0 < grid.sum() < 1


def test_implementation_is_restored_even_after_an_error(tiny, samples):
    prefix, core = (
        tiny.prefill(["where"], tiny.encode([samples[0].image])),
        tiny.model.model.language_model,
    )
    answer_attention(tiny, prefix, torch.tensor([[5, 6, 7]]))
    assert core.config._attn_implementation == "tree_sdpa"
    with pytest.raises(IndexError):
        answer_attention(tiny, prefix, torch.tensor([[10**6, 6, 7]]))
    assert core.config._attn_implementation == "tree_sdpa"


def test_other_frames_have_other_grids(samples):
    "The grid comes from the processor: a frame of 160 has 10 x 10 image tokens."
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    wide = Policy(make_model(tokenizer), make_processor(tokenizer), 160)
    text, seen = dr2seg_prompt(samples[0].query), wide.encode([samples[0].image])
    assert attention_grid(wide, text, seen[0], wide.prefill([text], seen), ANSWER).shape == (10, 10)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "<answer></answer>",
        "<answer>",
        "</answer><answer>",
        "nothing here",
        "<answer>[]</answer>",
        "<|im_end|>",
        "<|image_pad|>",
        "\ud800",
        "é" * 50,
    ],
)
def test_any_response_gives_a_grid(tiny, samples, text):
    prompt, seen = dr2seg_prompt(samples[0].query), tiny.encode([samples[0].image])
    text = text.encode("utf-8", "replace").decode()  # what a tokenizer decodes is always text
    assert np.isfinite(
        attention_grid(tiny, prompt, seen[0], tiny.prefill([prompt], seen), text)
    ).all()


def test_coordinates_are_whole_numbers_of_the_answer(tiny):
    ids, on = coordinate_tokens(
        tiny.tokenizer, "<think>there are 3 of them.</think>" + ANSWER[ANSWER.find("<answer>") :]
    )
    assert [tiny.decode_token(i) for i, o in zip(ids, on) if o] == [
        "10",
        "20",
        "30",
        "44",
        "20",
        "32",
    ]
    ids, on = coordinate_tokens(
        tiny.tokenizer, "<think>so.</think><answer>the ball</answer>"
    )  # none: the whole answer
    assert "".join(tiny.decode_token(i) for i, o in zip(ids, on) if o) == "the ball"
    assert all(
        coordinate_tokens(tiny.tokenizer, "the ball is red")[1]
    )  # no answer: the whole response


# maps and candidates


def test_heat_map_by_hand():
    grid = np.zeros((4, 5))
    grid[1, 3] = 2.0
    heat = heat_map(grid, (100, 80))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert heat.shape == (80, 100)
    assert heat.min() == 0
    assert heat.max() == 1
    assert abs(x - 69.5) <= 1
    assert abs(y - 29.5) <= 1  # the centre of cell (3, 1)
    assert not heat_map(np.full((4, 5), 0.3), (100, 80)).any()
    assert np.allclose(heat_map(grid * 7, (100, 80)), heat, atol=1e-6)
    assert attention_overlay(np.full((80, 100, 3), 200, np.uint8), heat).dtype == np.uint8


def test_peaks_and_regions_of_three_hills():
    heat = np.maximum.reduce([hill(20, 20, 5, 1.0), hill(70, 30, 6, 0.7), hill(40, 75, 5, 0.015)])
    found = peaks(heat, (14, 14))
    assert [t.point for t in found] == [(20, 20), (70, 30)]  # the third is below the floor
    assert found[0].box == (15, 15, 25, 25)
    assert found[1].box == (
        63,
        23,
        77,
        37,
    )  # half height is 1.18 sigma away
    regions = otsu_regions(heat)
    assert [t.point for t in regions] == [(20, 20), (70, 30)]
    assert all(t.box[0] < t.point[0] < t.box[2] for t in regions)


def test_a_peak_reaches_three_quarters_of_a_cell():
    assert peaks(hill(48, 48, 30, 1.0), (12, 8))[0].box == (39, 42, 57, 54)


def test_a_plateau_is_one_peak_and_nothing_gives_nothing():
    flat = disc(48, 48, 10).astype(float)
    assert len(peaks(flat, (12, 12))) == 1 == len(otsu_regions(flat))
    assert peaks(np.zeros((8, 8)), (2, 2)) == otsu_regions(np.zeros((8, 8))) == []


def test_peaks_of_a_map_are_its_local_maxima():
    rng = np.random.default_rng(0)
    for _ in range(20):
        heat = heat_map(rng.random((6, 6)) ** 3, (60, 60))
        found = peaks(heat, (12, 12))
        heights = [heat[t.point[1], t.point[0]] for t in found]
        assert heights == sorted(heights, reverse=True)
        assert heights[0] == 1
        for t, h in zip(found, heights):
            x, y = t.point
            assert h == heat[max(0, y - 9) : y + 10, max(0, x - 9) : x + 10].max()
            assert t.box[0] <= x <= t.box[2]
            assert t.box[1] <= y <= t.box[3]


def test_duplicates_go_and_eight_stay():
    a, b, empty = disc(30, 30, 12), disc(31, 30, 12), np.zeros((96, 96), bool)
    assert ratio(*iou(a, b)) > 0.8
    kept = distinct_candidates(
        [
            Candidate(m, s)
            for m, s in ((a, "direct"), (empty, "peak"), (b, "region"), (disc(60, 60, 9), "peak"))
        ]
    )
    assert [c.source for c in kept] == ["direct", "peak"]
    assert kept[0].mask is a
    assert (
        len(distinct_candidates([Candidate(a, "direct"), Candidate(b, "peak")], overlap=0.95)) == 2
    )
    many = [Candidate(disc(8 + 9 * i, 40, 3), "peak") for i in range(10)]
    assert distinct_candidates(many) == many[:8]
    assert len(distinct_candidates(many, limit=3)) == 3
    assert distinct_candidates([]) == []


class Boxes(Segmenter):
    "A segmenter of plain boxes; a box of one pixel draws nothing."

    def masks(self, image, targets):
        out = []
        for t in targets:
            m = np.zeros(image.shape[:2], bool)
            x1, y1, x2, y2 = (int(v) for v in t.box)
            if x2 > x1:
                m[y1 : y2 + 1, x1 : x2 + 1] = True
            out.append(m)
        return out


def test_candidates_start_with_the_direct_answer():
    image, heat = (
        np.zeros((96, 96, 3), np.uint8),
        np.maximum(hill(20, 20, 5, 1.0), hill(70, 30, 6, 0.9)),
    )
    found = propose_candidates(
        Boxes(),
        image,
        heat,
        (14, 14),
        [Target((60, 60, 80, 80), (70, 70)), Target((2, 60, 20, 80), (9, 70))],
    )
    assert found[0].source == "direct"
    assert found[0].mask.sum() == 21 * 21 + 19 * 21
    assert found[1].source == "regions"
    assert found[1].mask[20, 20]
    assert found[1].mask[30, 70]  # both at once
    assert {"region", "peak"} >= {c.source for c in found[2:]}
    assert not any(
        c.source == "direct" for c in propose_candidates(Boxes(), image, heat, (14, 14), [])
    )  # an answer that cannot be parsed


def test_no_candidate_is_no_error():
    image, cold = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96))
    assert propose_candidates(Boxes(), image, cold, (14, 14), []) == []
    assert (
        propose_candidates(Boxes(), image, cold, (14, 14), [Target((5, 5, 5, 5), (5, 5))]) == []
    )  # drew nothing
    assert [
        c.source
        for c in propose_candidates(Boxes(), image, cold, (14, 14), [Target((5, 5, 9, 9), (7, 7))])
    ] == ["direct"]


def test_a_second_drawing_is_prompted_by_the_first():
    drawn, old = (
        [disc(40, 40, 10), np.zeros((96, 96), bool)],
        [Target((0, 0, 95, 95), (3, 3)), Target((1, 1, 9, 9), (5, 5))],
    )
    tight = refine_prompts(drawn, old)
    assert tight[0].box == (30, 30, 50, 50)
    assert tight[0].point == (40, 40)
    assert tight[1] is old[1]


# marks and scores


def test_mark_leaves_the_candidate_alone():
    image = np.random.default_rng(0).integers(0, 200, (96, 96, 3), dtype=np.uint8)
    mask = disc(50, 40, 14)
    marked = highlight_candidate(image, mask)
    assert np.array_equal(marked[mask], image[mask])
    assert (marked[0, 0] <= image[0, 0] * 0.81).all()
    ring = (marked == 255).all(-1)
    assert ring.any()
    assert not (ring & mask).any()
    assert ring.sum() < mask.sum()
    assert (highlight_candidate(image, np.zeros((96, 96), bool)) <= image * 0.81).all()


@pytest.mark.parametrize(
    "text, value",
    [
        ("<score>7</score>", 7),
        ("<think>well</think><score> 10 </score>", 10),
        ("<score>6.5</score>", 6.5),
        ("<score>8/10</score>", 8),
        ("<score>8 / 10</score>", 8),
        ("<score>0</score>", 0),
        ("<score>3</score><score>9</score>", 3),
        ("junk <score>4</score> junk", 4),
        ("<score>07</score>", 7),
        ("", 0),
        ("7", 0),
        ("<score>", 0),
        ("</score>5<score>", 0),
        ("<score>7", 0),
        ("<score></score>", 0),
        ("<score>eleven</score>", 0),
        ("<score>11</score>", 0),
        ("<score>10.1</score>", 0),
        ("<score>-3</score>", 0),
        ("<score>1e1</score>", 0),
        ("<score>nan</score>", 0),
        ("<score>inf</score>", 0),
        ("<score>٧</score>", 0),
        ("<score>7/9</score>", 0),
        ("<score>" + "9" * 10**6 + "</score>", 0),
        ("<score>" * 10**5, 0),
        ("<score>7.</score>", 0),
        ("<score><score>7</score></score>", 0),
        ("\x00<score>7</score>\ud800", 7),
    ],
)
def test_scores_are_read_by_the_rules(text, value):
    assert read_score(text) == value


@given(st.text() | st.text(alphabet="<score>/ 0123456789.").map(lambda t: f"<score>{t}</score>"))
def test_reading_a_score_never_raises(text):
    assert 0 <= read_score(text) <= 10


def test_ties_go_to_the_first():
    assert best_candidate([5, 5, 5]) == 0
    assert best_candidate([0, 0, 4, 4]) == 2
    assert best_candidate([]) is None


def verdict(sample, candidates, texts):
    drawn = candidates[0].mask if candidates else np.zeros(sample.image.shape[:2], bool)
    return Rea2SegResult(
        sample,
        says(ANSWER)[0],
        drawn,
        np.zeros((7, 7)),
        candidates,
        says(*texts),
        dict(direct=1.0, candidates=0.5, scoring=0.5),
    )


def test_the_truth_is_chosen_when_the_scores_say_so(samples):
    sample = samples[0]
    wrong = Candidate(np.roll(sample.mask, 90, 1), "direct")
    v = verdict(
        sample, [wrong, Candidate(sample.mask, "peak")], ["<score>3</score>", "<score>9</score>"]
    )
    row = json.loads(json.dumps(v.row(), default=lambda a: a.tolist()))
    assert v.iou(v.mask) == 1 == row["chosen"] == row["oracle"]
    assert row["best"] == 1
    assert row["direct"] < 0.5
    assert np.array_equal(decode_rle(row["candidates"][1]["rle"]), sample.mask)
    tied = verdict(
        sample, [wrong, Candidate(sample.mask, "peak")], ["<score>9</score>", "<score>9</score>"]
    )
    assert tied.mask is wrong.mask
    assert tied.row()["oracle"] == 1


def test_without_candidates_the_mask_is_empty(samples):
    row = verdict(samples[0], [], []).row()
    assert row["chosen"] == row["oracle"] == row["direct"] == 0
    assert row["best"] is None
    assert row["candidates"] == []
    assert cost_table(summarize_rea2seg([row])).markdown


# the scorer


def test_prompt_keeps_the_question_and_shows_the_form():
    text = scoring_prompt("Which one is Red?", eval=True)
    assert text == SCORING[0] + "which one is red" + SCORING[1]
    assert SCORING[1].endswith("<score>7</score>")


def test_a_word_level_tokenizer_learns_the_phrases(tiny):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    fresh = add_score_tokens(Policy(make_model(tokenizer), make_processor(tokenizer), 112))
    asked, said = judge_example(JUDGE_SEEDS, load_segmenter("embedded"))[1:]
    ids = fresh.tokenizer(asked + said)["input_ids"]
    assert fresh.tokenizer.unk_token_id not in ids
    assert fresh.tokenizer.decode(ids) == asked + said
    assert len({*fresh.tokenizer.convert_tokens_to_ids(list(SCORE_TOKENS))}) == len(SCORE_TOKENS)
    for text in (
        dr2seg_prompt("which object has twelve corners"),
        ANSWER,
    ):  # everything else reads as before
        assert fresh.tokenizer(text)["input_ids"] == tiny.tokenizer(text)["input_ids"]


def test_lessons_are_honest(segmenter):
    "The score is that of the marked mask; scenes are nobody else's; every word is known."
    tokenizer, points = make_tokenizer(), []
    assert all(not lo <= JUDGE_SEEDS < lo + n for lo, n in SPLIT_SEEDS.values())
    for i in range(40):
        picture, asked, said = judge_example(JUDGE_SEEDS + i, segmenter)
        q = draw_problem(JUDGE_SEEDS + i).question
        points.append(read_score(said))
        assert asked == scoring_prompt(q.text)
        assert all(fact in said for fact in q.reason)
        assert tokenizer.unk_token_id not in tokenizer(find_block(said, "think"))["input_ids"]
        assert ("no, that does not fit" in said) == (points[-1] == 0)
        assert ("but not as well" in said) == (0 < points[-1] < 8)
    assert {0, 10} <= set(points)
    assert len(set(points)) > 4


def test_spoiled_boxes_hold_their_point():
    rng = np.random.default_rng(0)
    for _ in range(100):
        t = spoil_prompt(rng, Target((20, 30, 60, 50), (40, 40)))
        assert t.box[0] <= t.point[0] <= t.box[2]
        assert t.box[1] <= t.point[1] <= t.box[3]


def test_training_moves_the_adapter_alone_and_it_survives_saving(segmenter, tmp_path):
    lessons = [judge_example(JUDGE_SEEDS + i, segmenter) for i in range(8)]

    def fresh():
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        return Policy(make_model(tokenizer), make_processor(tokenizer), 112)

    losses, policy = [], fresh()
    train_judge(
        policy,
        lessons,
        steps=6,
        batch=4,
        rank=4,
        lr=1e-2,
        log=lambda s, row: losses.append(row["loss"]),
    )
    assert losses[-1] < losses[0]
    assert all("lora" in n or "trainable_tokens" in n for n, _ in policy.trainable())
    again = add_score_tokens(fresh()).load_adapter(save_judge(policy, tmp_path / "scorer"))
    seen, text = policy.encode([lessons[0][0]]), [lessons[0][1]]
    with torch.no_grad():
        assert (
            policy.prefill(text, seen).logits - again.prefill(text, seen).logits
        ).abs().max() < 2e-2  # half precision
        assert (
            policy.prefill(text, seen).logits - add_score_tokens(fresh()).prefill(text, seen).logits
        ).abs().max() > 0.1
    assert judge_quality(again, lessons)["n"] == 8


def test_the_scorer_that_ships(segmenter):
    assert sum(f.stat().st_size for f in EMBEDDED_JUDGE.iterdir()) < 3 * 2**20
    quality = judge_quality(
        load_judge(), [judge_example(JUDGE_SEEDS + 500_000 + i, segmenter) for i in range(96)]
    )
    assert quality["format"] > 0.97
    assert quality["apart"] > 0.5  # 0.57: it knows little, see its README


def test_a_missing_scorer_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("dr2seg_lib.methods.rea2seg.EMBEDDED_JUDGE", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="adapter_config.json is missing; restore it with git"
    ):
        load_judge()


def test_answerer_and_scorer_are_loaded_as_everywhere(monkeypatch, tmp_path, tiny):
    "By `load_policy`, which moves them to the GPU and tells a failure in a sentence."
    loaded = []
    for module in "methods", "evaluation":
        monkeypatch.setattr(
            f"dr2seg_lib.{module}.rea2seg.load_policy",
            lambda name, *how, **more: loaded.append(name) or tiny,
        )
    run_rea2seg(
        Rea2SegConfig(model="some/model", scorer="some/scorer", samples=1, max_new_tokens=4),
        tmp_path / "run",
    )
    assert loaded == ["some/model", "some/scorer"]
    monkeypatch.undo()
    for config in Rea2SegConfig(model="nobody/nothing"), Rea2SegConfig(scorer="nobody/nothing"):
        with pytest.raises(
            ValueError, match="model nobody/nothing cannot be loaded .*connect to the hub"
        ) as told:
            run_rea2seg(config, tmp_path / "none")
        assert "\n" not in str(told.value)
        assert not (tmp_path / "none").exists()


# the whole


def test_four_samples_from_end_to_end(segmenter, samples):
    policy, scorer = Policy.load(), load_judge()
    for sample in samples:
        v = rea2seg(policy, scorer, segmenter, sample, dr2seg_prompt)
        row = v.row()
        assert 1 <= len(v.candidates) <= 8
        assert len(v.responses) == len(v.candidates)
        assert row["oracle"] >= max(row["chosen"], row["direct"])
        assert any(np.array_equal(v.mask, c.mask) for c in v.candidates)
        assert all(0 <= s <= 10 for s in v.scores)
        for i, a in enumerate(v.candidates):
            assert all(ratio(*iou(a.mask, b.mask)) <= 0.8 for b in v.candidates[:i])


def test_scored_in_one_batch_as_alone(segmenter, samples):
    scorer, sample = load_judge(), samples[1]
    some = [Candidate(t.mask, "peak") for t in sample.targets] + [
        Candidate(disc(112, 112, 20, 224), "peak")
    ]
    together = [r.text for r in score_candidates(scorer, sample.image, sample.query, some)]
    assert together == [
        score_candidates(scorer, sample.image, sample.query, [c])[0].text for c in some
    ]
    assert score_candidates(scorer, sample.image, sample.query, []) == []


def test_a_policy_may_score_itself_and_babble(tiny, segmenter, samples):
    "Random weights say nothing that can be read: all scores 0, and nothing raises."
    row = rea2seg(tiny, tiny, segmenter, samples[0], dr2seg_prompt, max_new_tokens=8).row()
    assert row["direct"] == 0
    assert all(c["score"] == 0 for c in row["candidates"])
    assert row["best"] in (0, None)


def test_a_run_goes_on_where_it_was(tmp_path):
    config = Rea2SegConfig(samples=3)
    whole = run_rea2seg(config, tmp_path / "whole")
    cut = Run.create(tmp_path / "cut", config.model_dump())
    lines = (whole.folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (cut.folder / "predictions.jsonl").write_text(lines[0] + lines[1][:50])
    cut.finish("interrupted")
    done = run_rea2seg(config, tmp_path / "cut", resume=True)

    def strip(run):
        return [
            {k: v for k, v in r.items() if k != "seconds"}
            for r in read_jsonl(run.folder / "predictions.jsonl")
        ]

    assert strip(done) == strip(whole)
    assert len(strip(whole)) == 3
    assert "oracle gIoU" in read_json(done.folder / "results.json")["table"]
    rows = read_jsonl(done.folder / "predictions.jsonl")
    find = {s.id: s for s in MiniReasonSeg("val", 3)}
    assert gallery(
        gallery_picks(rows, 1),
        {k: s.image for k, s in find.items()},
        {k: s.mask for k, s in find.items()},
    )._repr_mimebundle_()[0]["image/png"]


def test_the_summary_has_both_ious_and_older_rows_do_without(tmp_path):
    "cIoU: sums of pixels, by hand; a checkpoint and a protocol are given as to evaluate."
    config = Rea2SegConfig(data=dict(samples=3, protocol="visionreasoner"))
    run = run_rea2seg(config, tmp_path / "run")
    rows = read_jsonl(run.folder / "predictions.jsonl")
    found = summarize_rea2seg(rows)["all"]
    for which in "direct", "chosen":
        i, u = (sum(row[f"{which}_areas"][k] for row in rows) for k in (0, 1))
        assert found[f"{which}_cIoU"][0] == pytest.approx(i / u)
        assert [ratio(*row[f"{which}_areas"]) for row in rows] == [row[which] for row in rows]
    old = [{k: v for k, v in row.items() if not k.endswith("_areas")} for row in rows]
    assert "direct_cIoU" not in summarize_rea2seg(old)["all"]
    assert "cIoU" not in cost_table(summarize_rea2seg(old)).markdown
    with pytest.raises(ValueError, match="adapter nowhere"):
        check_rea2seg(Rea2SegConfig(model=dict(adapter="nowhere")))


def test_the_experiment_runs_from_the_command_line(tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("dr2seg"),
            "run",
            "rea2seg",
            "-p",
            "samples",
            "4",
            "--out",
            tmp_path / "run",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chosen gIoU" in done.stdout
    assert (tmp_path / "run" / "candidates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("recipe", "dr3seg", "method 'dr3seg' is unknown"),
        ("model", "nowhere", "model 'nowhere' is unknown"),
        ("scorer", "nowhere", "scorer 'nowhere' is unknown"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(name, value, words):
    with pytest.raises(ValueError, match=words):
        check_rea2seg(Rea2SegConfig(**{name: value}))
