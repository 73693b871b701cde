"Whole training steps by the engine, and by a plain loop without any sharing."

import sys
from pathlib import Path

import pytest
import torch

from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import build_training_state, train_step

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import embedded


@pytest.fixture(scope="module")
def both():
    "Two steps of DR²Seg with two updates each: rows, records and the adapter that comes of them."
    config = TrainConfig(
        rollout=dict(questions_per_step=2, group_size=3, max_new_tokens=60),
        optim=dict(updates=2, kl=0.1, max_grad_norm=1e-3),  # no step is made of rounding
        lora=dict(rank=4, alpha=4),
        evaluation=dict(samples=0),
    )
    data, out = load_data("mini", "train"), []
    for kind in (None, embedded.Plain):
        state = build_training_state(config)
        if kind:
            state.policy.__class__ = kind
        done = [train_step(state, sample_batch(data, config, s)[0], config, s) for s in (1, 2)]
        out.append((*zip(*done), dict(state.policy.trainable())))
    return out


def test_the_same_answers_and_rewards(both):
    (_, ours, _), (_, plain, _) = both
    for a, b in zip(sum(ours, []), sum(plain, []), strict=True):
        assert a["first"]["text"] == b["first"]["text"]
        assert (a["second"] or {}).get("text") == (b["second"] or {}).get("text")
        assert a["terms"] == b["terms"]
        assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-5)
        assert a["first"]["entropy"] == pytest.approx(b["first"]["entropy"], abs=2e-4)


def test_the_same_loss_and_the_same_step(both):
    (ours, _, a), (plain, _, b) = both
    for x, y in zip(ours, plain, strict=True):
        assert all(
            x[k] == pytest.approx(y[k], abs=1e-5)
            for k in ("loss", "kl", "grad_norm", "answer_entropy")
        )
    assert ours[1]["kl"] > 1e-7
    assert all(
        torch.allclose(p, b[name], atol=1e-3) for name, p in a.items()
    )  # AdamW's first steps are signs: a tiny gradient may turn
    moved = torch.cat([(p - b[name]).abs().flatten() for name, p in a.items()])
    assert (moved > 1e-5).float().mean() < 0.01
