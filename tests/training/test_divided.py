"Weights divided among processes: the numbers of one, and checkpoints that any number reads."

from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file

from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train

SMALL = dict(
    steps=2,
    prompts=6,
    samples=3,
    eval_samples=0,
    max_new_tokens=100,
    checkpoint_every=1,
    seed=3,
    norm_lr=0,
    kl=0.1,
)
# Clipped to a small norm: AdamW makes a whole step of a gradient near its 1e-8, and so of rounding.
FULL = SMALL | dict(tune="full", lr=1e-4, grad_norm=1e-3)
TWO = dict(shard=True, runtime=dict(processes=2, max_tokens=330))  # microbatches 2 1 2 and 2 2 1


def numbers(run):
    names = "reward", "loss", "kl", "grad_norm", "tokens", "answer_entropy"
    return [
        pytest.approx([row[name] for name in names], rel=1e-4, abs=1e-5) for row in run.metrics()
    ]


def weights(run):
    return load_file(str(latest_checkpoint(run.folder) / "weights.safetensors"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(TrainConfig(**FULL), tmp_path_factory.mktemp("full") / "alone")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return train(TrainConfig(**FULL | TWO), tmp_path_factory.mktemp("full") / "two")


def test_an_adapter_beside_divided_weights_learns_as_in_one_process(tmp_path):
    "Processes with different numbers of microbatches gather the layers together."
    asked = dict(samples=5, every=2, every_samples=5)
    small = SMALL | dict(rank=4, alpha=4, evaluation=asked)
    del small["eval_samples"]
    one = train(TrainConfig(**small), tmp_path / "one")
    two = train(TrainConfig(**small | TWO), tmp_path / "two")
    assert [list(row) for row in two.metrics()] == [list(row) for row in one.metrics()]
    assert numbers(two) == [row.expected for row in numbers(one)]
    kept, others = (read_jsonl(run.folder / "held_out.jsonl") for run in (one, two))
    assert [row["step"] for row in kept] == [0] * 5 + [2] * 5
    same = "step", "sample", "text", "words", "rle"
    assert [[row[k] for k in same] for row in others] == [[row[k] for k in same] for row in kept]


def test_all_weights_divided_learn_as_in_one_process(alone, two):
    assert numbers(two) == [row.expected for row in numbers(alone)]
    one, other, start = weights(alone), weights(two), dict(Policy.load().model.named_parameters())
    assert set(one) == set(other) == {n for n in start if "visual" not in n}
    moved = max((one[n] - start[n]).abs().max() for n in one)
    apart = max((one[n] - other[n]).abs().max() for n in one)
    assert moved > 1e-4 and apart < 0.05 * moved


def test_any_number_of_processes_goes_on(alone, two, tmp_path):
    "What two processes left after one step, one ends; the result is that of one all along."
    folder = tmp_path / "run"
    copytree(two.folder, folder)
    rmtree(folder / "checkpoints" / "step-000002")
    config = TrainConfig(**FULL | dict(shard=True, runtime=dict(max_tokens=330)))
    run = train(config, folder, resume=True)
    assert numbers(run) == [row.expected for row in numbers(alone)]
    one, other = weights(alone), weights(run)
    assert max((one[n] - other[n]).abs().max() for n in one) < 1e-5


def test_steps_too_small_for_bfloat16_are_kept(tmp_path):
    "The published rate, arithmetic in bfloat16: weights move by what bfloat16 cannot hold."
    config = TrainConfig(**FULL | dict(lr=1e-6, dtype="bfloat16", shard=True, steps=1))
    run = train(config, tmp_path / "run")
    trained, start = weights(run), dict(Policy.load(dtype=torch.bfloat16).model.named_parameters())
    assert {w.dtype for w in trained.values()} == {torch.float32}
    steps = torch.cat([(trained[n] - start[n].float()).abs().flatten() for n in trained])
    assert 0.5e-6 < steps.max() < 2e-6
    assert (steps > 0).float().mean() > 0.5
    lost = [(trained[n].bfloat16() == start[n]).float().mean() for n in trained]
    assert torch.stack(lost).mean() > 0.9
    read = load_policy("embedded", str(latest_checkpoint(run.folder)), device="cpu")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(read.model.named_parameters())[name], trained[name])
