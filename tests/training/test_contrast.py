"Groups whose answers are all worth the same give their place to other questions."

import json
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.models.sampling import Completions
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.contrast import has_contrast, pick_answers
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.run_reader import RunReader

SMALL = dict(
    steps=3,
    model=dict(dtype="float32"),
    rollout=dict(questions_per_step=6, group_size=2, max_new_tokens=96, redraws=2),
    lora=dict(rank=4, alpha=8),
    evaluation=dict(samples=0),
    runtime=dict(recorded_groups=6),
)


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


def rewards_of(run):
    "{(step, group): rewards}, in the order of the records."
    groups, found = RunReader(run).groups["rollouts"], []
    for group in groups:
        found.append((group[0]["step"], [r["reward"] for r in group], group[0].get("drawn")))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(TrainConfig(**SMALL), tmp_path_factory.mktemp("contrast") / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    rollout = SMALL["rollout"] | dict(redraws=0)
    config = TrainConfig(**SMALL | dict(rollout=rollout))
    return train(config, tmp_path_factory.mktemp("plain") / "run")


def test_flat_groups_are_replaced_and_others_stay(run, plain):
    "At the first step both policies are one: what has contrast is the same, to the last answer."
    before, after = rewards_of(plain.folder)[:6], rewards_of(run.folder)[:6]
    flat = [len(set(rewards)) == 1 for _, rewards, _ in before]
    assert any(flat) and not all(flat)
    for was_flat, old, new in zip(flat, before, after):
        if not was_flat:
            assert new == old
        elif new[2]:
            assert len(set(new[1])) > 1
    assert any(drawn for *_, drawn in after)
    row = run.metrics()[0]
    assert row["redrawn"] == sum(drawn is not None for *_, drawn in after)
    assert "redrawn" not in plain.metrics()[0]


def test_a_resumed_run_draws_the_same(run, tmp_path):
    short = TrainConfig(**SMALL | dict(steps=1, optim=dict(schedule="constant")))
    whole = train(short.model_copy(update=dict(steps=3)), tmp_path / "whole")
    train(short, tmp_path / "run")
    again = train(short.model_copy(update=dict(steps=3)), tmp_path / "run", resume=True)
    assert [timeless(r) for r in again.metrics()] == [timeless(r) for r in whole.metrics()]
    assert again.rollouts() == whole.rollouts()


@pytest.mark.slow
def test_two_processes_replace_their_own(tmp_path):
    config = TrainConfig(**SMALL | dict(runtime=dict(recorded_groups=6, processes=2), steps=1))
    run = train(config, tmp_path / "two")
    rows = rewards_of(run.folder)
    drawn = [tuple(d) for *_, d in rows if d]
    assert drawn and len(set(drawn)) == len(drawn)  # no draw stands in two places
    assert run.metrics()[0]["redrawn"] == len(drawn)
    assert all(len(set(rewards)) > 1 for _, rewards, d in rows if d)


def test_a_replacing_question_is_found_again(tmp_path):
    "In a folder of one's own, whose samples are known by their place alone."
    home = tmp_path / "own"
    home.mkdir()
    lines = []
    for k, s in enumerate(MiniReasonSeg("train", 12)):
        Image.fromarray(s.image).save(home / f"{k}.png")
        masks = [encode_rle(t.mask) for t in s.targets]
        row = dict(id=f"q{k}", image=f"{k}.png", query=s.query, mask=masks, split="train")
        lines.append(row)
    lines[4]["image"] = "gone.png"
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = train(TrainConfig(**SMALL | dict(data=str(home))), tmp_path / "run")
    reader, found = RunReader(run.folder), []
    for at, group in enumerate(reader.groups["rollouts"]):
        assert reader.sample("rollouts", at).query == group[0]["query"]
        found.append(group[0].get("drawn"))
    assert any(found)


def test_the_batch_of_a_step_is_as_before():
    "The other questions come from an order of their own: no step's own questions move."
    config, data = TrainConfig(**SMALL), load_data("mini", "train")
    plain = TrainConfig(**SMALL | dict(rollout=SMALL["rollout"] | dict(redraws=0)))
    for step in (1, 2, 7):
        a, b = (sample_batch(data, c, step)[0] for c in (config, plain))
        assert [s.id for s in a] == [s.id for s in b]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.randoms())
def test_rows_of_both_keep_their_values(R, S, T, U, random):
    def made(rows, length, first):
        lengths = [random.randint(1, length) for _ in range(rows)]
        mask = torch.tensor([[t < n for t in range(length)] for n in lengths])
        ids = torch.arange(first, first + rows * length).reshape(rows, length)
        return Completions(ids, mask, *(ids * s * 1.0 for s in (0.1, 0.2, 0.3)))

    a, b = made(R, T, 0), made(S, U, 1000)
    rows = [random.randrange(R + S) for _ in range(5)]
    picked = pick_answers(a, b, rows)
    for k, row in enumerate(rows):
        source, at = (a, row) if row < R else (b, row - R)
        n = int(source.mask[at].sum())
        assert int(picked.mask[k].sum()) == n
        for field in fields(Completions):
            theirs, own = getattr(source, field.name)[at, :n], getattr(picked, field.name)[k, :n]
            assert torch.equal(theirs, own)
    assert picked.mask.any(0).all()  # nothing is padded that need not be


def test_contrast_is_a_difference_however_small():
    reward = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 1e-6], [float("inf")] * 3])
    assert has_contrast(reward).tolist() == [False, True, False]
