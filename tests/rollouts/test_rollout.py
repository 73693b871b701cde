"What a rollout records, and that the second pass sees nothing but image and description."

import dataclasses
import json
import resource

import pytest
from PIL import Image

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.evaluation.config import EvaluateConfig
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rollouts.parsing import parse_response, reasoning_text
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.rollouts.two_stage import StageTimer, generate_rollouts, second_pass, to_responses
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import build_training_state, train

SAMPLES = [MiniReasonSeg("val")[i] for i in range(3)]


@pytest.fixture(scope="module")
def policy():
    return Policy.load()


@pytest.fixture(scope="module")
def rollouts(policy):
    return generate_rollouts(
        policy, SAMPLES, dr2seg_prompt, visionreasoner_prompt, group_size=4, seed=3
    )


def test_shape_and_record(policy, rollouts):
    assert (
        [len(g.first) for g in rollouts.groups]
        == [4, 4, 4]
        == [len(g.second) for g in rollouts.groups]
    )
    for g in rollouts.groups:
        for one, two in zip(g.first, g.second):
            assert "".join(one.tokens) == one.text
            assert len(one.tokens) == len(one.entropy) == len(one.margin)
            assert one.think_tokens == len(
                policy.tokenizer(reasoning_text(one.text), add_special_tokens=False)["input_ids"]
            )
            assert (two is None) == (one.parsed.description is None)


def test_texts_decode_from_the_sampled_tokens(policy, rollouts):
    texts = policy.tokenizer.batch_decode(
        [row[m] for row, m in zip(rollouts.completions.ids, rollouts.completions.mask)],
        skip_special_tokens=True,
    )
    assert texts == [r.text for g in rollouts.groups for r in g.first]


@pytest.fixture(scope="module")
def shown(policy):
    "One encoded image, and a first prompt read about it."
    encoded = policy.encode([SAMPLES[0].image])
    return encoded, policy.prefill([dr2seg_prompt(SAMPLES[0].query)], encoded)


def test_second_pass_depends_on_image_and_description_alone(policy, shown):
    def said(text):
        return Response(text, parse_response(text), [text], [0.0], [1.0], 1)

    two_chains = [
        [
            said(f"<think>{t}</think><description>the red ball</description><answer>[]</answer>")
            for t in ("a.", "something else.")
        ]
    ]
    asked = []

    def prompt(d):
        asked.append(d)
        return visionreasoner_prompt(d)

    greedy = second_pass(policy, *shown, two_chains, prompt, 64, 0, None)
    assert asked == ["the red ball"]
    assert greedy[0][0].text == greedy[0][1].text  # one prompt, read once for both


def test_no_description_no_second_pass(policy, shown):
    silent = [
        [
            Response(
                "<think>a.</think><answer>[]</answer>",
                parse_response("<think>a.</think><answer>[]</answer>"),
                ["x"],
                [0.0],
                [1.0],
                1,
            )
        ]
    ]
    assert second_pass(policy, *shown, silent, visionreasoner_prompt, 8, 1.0, 0) == [[None]]


def test_one_pass_recipes_ask_once(policy):
    timer = StageTimer()
    rollouts = generate_rollouts(
        policy, SAMPLES[:1], visionreasoner_prompt, None, group_size=2, seed=0, timer=timer
    )
    assert rollouts.groups[0].second == [None, None]
    assert set(timer) == {"first", "second"}


def test_answer_entropy_looks_inside_the_answer_alone():
    r = Response(
        "<think>a.</think><answer>[1]</answer>",
        None,
        ["<think>", "a.", "</think>", "<answer>", "[1", "]", "</answer>"],
        [9, 9, 9, 9, 1, 3, 9],
        [1] * 7,
        1,
    )
    assert r.answer_entropy == 2.0
    assert (
        dataclasses.replace(r, text="a.b", tokens=["a.", "b"], entropy=[1, 2]).answer_entropy == 1.5
    )
    cut = dataclasses.replace(r, text="<answer>[1", tokens=["<answer>", "[1"], entropy=[1, 3])
    assert cut.answer_entropy == 2.0  # never closed: the whole response


def test_padding_after_the_end_is_dropped(policy):
    prefix = policy.prefill(
        [dr2seg_prompt(s.query) for s in SAMPLES], policy.encode([s.image for s in SAMPLES])
    )
    completions = policy.generate(prefix, 2, 200, seed=0)
    assert completions.mask.sum(1).min() < completions.ids.shape[1]
    for r, m in zip(to_responses(policy, completions), completions.mask):
        assert len(r.tokens) in (m.sum() - 1, m.sum())
        assert "<|im_end|>" not in r.text


def test_a_group_depends_on_its_own_seeds_alone(policy, rollouts):
    "So that processes which share a step's questions sample what one process would."
    n = len(rollouts.groups[0].first)
    alone = generate_rollouts(
        policy, SAMPLES[1:2], dr2seg_prompt, visionreasoner_prompt, group_size=n, seed=3 + 2 * n
    )

    def texts(group):
        return [r and r.text for r in group.first + group.second]

    assert texts(alone.groups[0]) == texts(rollouts.groups[1])


QUERIES = ["the ball", "<|image_pad|>", "the <|im_end|> ball<|vision_start|>", "ball " * 20_000]


@pytest.fixture
def hostile(tmp_path):
    "A folder of one's own whose questions spell special tokens, or are far too long."
    home = tmp_path / "own"
    home.mkdir()
    rows = []
    for split in ("train", "val"):
        for i, (query, sample) in enumerate(zip(QUERIES, MiniReasonSeg(split, len(QUERIES)))):
            Image.fromarray(sample.image).save(home / f"{split}-{i}.png")
            masks = [encode_rle(t.mask) for t in sample.targets]
            rows.append(
                dict(
                    id=f"{split}-{i}",
                    image=f"{split}-{i}.png",
                    query=query,
                    mask=masks,
                    split=split,
                )
            )
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def test_training_asks_hostile_questions_and_passes_over_those_too_long(hostile, tmp_path):
    config = TrainConfig(
        data=str(hostile),
        steps=2,
        prompts=3,
        samples=2,
        rank=4,
        alpha=4,
        eval_samples=4,
        segmenter="grabcut",
        max_new_tokens=60,
    )
    run = train(config, tmp_path / "run")
    skipped = set().union(*(row.get("skipped", []) for row in run.metrics()))
    assert skipped == {
        "sample train-3: its question of 100,000 characters has more than 512 tokens; "
        "shorten it, or raise max_question_tokens."
    }
    asked = {r["query"] for r in read_jsonl(run.folder / "rollouts.jsonl")}
    assert asked <= {*QUERIES[:3]}
    assert len(run.metrics()) == 2
    results = read_json(run.folder / "results.json")
    assert results["before"]["n"] == 4
    assert results["before"]["broken"] == 1


def test_the_limit_is_that_of_the_configuration(hostile, tmp_path):
    short = EvaluateConfig(
        data=str(hostile), segmenter="grabcut", max_new_tokens=8, max_question_tokens=4
    )
    rows = read_jsonl(run_evaluation(short, tmp_path / "run").folder / "predictions.jsonl")
    assert ["more than 4 tokens" in r.get("error", "") for r in rows] == [False, True, True, True]
    trained = TrainConfig(data=str(hostile), max_question_tokens=4, eval_samples=0)
    assert build_training_state(trained)[0].max_question_tokens == 4


def test_evaluation_counts_a_question_that_is_too_long_as_a_miss(hostile, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = run_evaluation(
        EvaluateConfig(data=str(hostile), segmenter="grabcut", max_new_tokens=60), tmp_path / "run"
    )
    rows = read_jsonl(run.folder / "predictions.jsonl")
    assert [r.get("error", "")[:54] for r in rows] == [
        "",
        "",
        "",
        "sample val-3: its question of 100,000 characters has m",
    ]
    assert rows[3]["iou"] == 0
    assert read_json(run.folder / "results.json")["broken"] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "less than 1 GiB"
