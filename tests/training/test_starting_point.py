"A training that starts from another's checkpoint, and one that goes on after its end."

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.training.trainer import build_training_state, train

SMALL = dict(
    method="visionreasoner",
    steps=2,
    model=dict(dtype="float32"),
    rollout=dict(questions_per_step=2, group_size=3, max_new_tokens=24),
    lora=dict(rank=4, alpha=8),
    optim=dict(lr=1e-2, norm_lr=0.02),
    evaluation=dict(samples=0),
)


def logits(policy):
    "What a policy would say first to a held-out question."
    sample = MiniReasonSeg("val")[0]
    with torch.no_grad():
        encoded = policy.encode([sample.image])
        return policy.prefill([visionreasoner_prompt(sample.query)], encoded).logits


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    run = train(TrainConfig(**SMALL), tmp_path_factory.mktemp("start") / "first")
    return latest_checkpoint(run.folder)


@pytest.fixture(scope="module")
def second(first):
    config = TrainConfig(**SMALL, start=str(first), seed=1)
    return train(config, first.parents[2] / "second")


def by_hand(first):
    "The model's weights plus alpha/r B A of each layer, and the norm's gain: peft is not asked."
    policy = Policy.load()
    weights, state = load_file(str(first / "adapter_model.safetensors")), policy.model.state_dict()
    for name, A in weights.items():
        plain = name.removeprefix("base_model.model.")
        if plain.endswith("lora_A.weight"):
            B = weights[name.replace("lora_A", "lora_B")]
            key = plain.replace("lora_A.weight", "weight")
            state[key] += (8 / 4 * B.double() @ A.double()).float()
        elif "lora" not in plain:
            state[plain] = A
    policy.model.load_state_dict(state)
    return policy


def test_a_merged_start_is_the_weights_with_the_adapter_added(first, tmp_path):
    config = TrainConfig(**SMALL, start=str(first))
    state = build_training_state(config, tmp_path)
    expected = logits(by_hand(first))
    assert (logits(state.policy) - expected).abs().max() < 1e-4
    assert (logits(Policy.load()) - expected).abs().max() > 1e-3  # training has moved it
    with state.policy.reference():  # the KL is to the start
        assert (logits(state.policy) - expected).abs().max() < 1e-4
    adapters = [p for n, p in state.policy.trainable() if "lora_B" in n]
    assert adapters and not any(p.any() for p in adapters)


def test_sums_are_rounded_once_in_bf16(first):
    policy, exact = load_policy("embedded", str(first), "bfloat16", device="cpu"), by_hand(first)
    policy.fold_adapter()
    for name, w in policy.model.state_dict().items():
        if name.endswith("q_proj.weight") and "language" in name:
            rounded = Policy.load().model.state_dict()[name].bfloat16().float()
            delta = exact.model.state_dict()[name] - Policy.load().model.state_dict()[name]
            wanted = (rounded + delta).bfloat16()
            assert (w != wanted).float().mean() < 0.01  # the delta itself is off by its rounding


def test_a_checkpoint_on_a_merged_start_brings_both(first, second):
    last = latest_checkpoint(second.folder)
    assert json.loads((last / "start.json").read_text()) == {"start": "../../start"}
    loaded = load_policy("embedded", str(last), device="cpu")
    on_top = by_hand(first)
    on_top.load_adapter(last)
    assert (logits(loaded) - logits(on_top)).abs().max() < 1e-4


def test_the_run_does_not_need_the_other_run_any_more(first, second, tmp_path):
    shutil.copytree(second.folder, tmp_path / "moved")
    loaded = load_policy("embedded", str(latest_checkpoint(tmp_path / "moved")), device="cpu")
    kept = load_policy("embedded", str(latest_checkpoint(second.folder)), device="cpu")
    assert torch.equal(logits(loaded), logits(kept))


def test_without_its_start_a_checkpoint_is_refused(second, tmp_path):
    shutil.copytree(latest_checkpoint(second.folder), tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="was trained on top of .*; put it back"):
        load_policy("embedded", str(tmp_path / "alone"))


def test_a_start_may_have_a_start(second, tmp_path):
    config = TrainConfig(**SMALL, start=str(latest_checkpoint(second.folder)), seed=2)
    third = train(config, tmp_path / "third")
    state = build_training_state(config, tmp_path / "other")
    below = load_policy("embedded", str(latest_checkpoint(second.folder)), device="cpu")
    assert (logits(state.policy) - logits(below)).abs().max() < 1e-4
    assert (third.folder / "start" / "start" / "adapter_config.json").is_file()
    load_policy("embedded", str(latest_checkpoint(third.folder)), device="cpu")


def test_a_continued_start_is_the_same_adapter(first, tmp_path):
    config = TrainConfig(**SMALL, start=str(first), start_form="continued")
    state = build_training_state(config, tmp_path)
    saved = load_file(str(first / "adapter_model.safetensors"))
    mine = [p for n, p in sorted(state.policy.trainable())]
    assert len(mine) == len(saved)
    with state.policy.reference():  # the KL is to the model, as it was
        assert torch.equal(logits(state.policy), logits(Policy.load()))
    run = train(config, tmp_path / "on")
    assert not (latest_checkpoint(run.folder) / "start.json").exists()  # it stands alone


def test_a_resume_is_bit_exact_and_asks_for_no_other_run(first, second, tmp_path):
    gone = tmp_path / "gone" / "step-000002"
    shutil.copytree(first, gone)
    constant = SMALL | dict(optim=dict(lr=1e-2, norm_lr=0.02, schedule="constant"))
    config = TrainConfig(**constant, start=str(gone), seed=1)
    unbroken = train(config, tmp_path / "unbroken")
    train(config.model_copy(update=dict(steps=1)), tmp_path / "run")
    shutil.rmtree(gone.parent)
    with pytest.raises(FileNotFoundError, match="is no checkpoint of a run"):
        train(config, tmp_path / "new")
    resumed = train(config, tmp_path / "run", resume=True)
    assert [timeless(r) for r in resumed.metrics()] == [timeless(r) for r in unbroken.metrics()]
    same = [latest_checkpoint(r.folder) / "adapter_model.safetensors" for r in (resumed, unbroken)]
    a, b = map(load_file, map(str, same))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(start="/nowhere"), "is no checkpoint of a run; name one, as RUN/checkpoints"),
        (dict(lora=dict(rank=8, alpha=8)), "ask for lora.rank 4"),
        (dict(optim=dict(norm_lr=0)), "ask for optim.norm_lr above 0"),
        (dict(model=dict(tune="full")), "only an adapter can be continued"),
    ],
)
def test_what_does_not_fit_is_a_sentence(first, tmp_path, change, sentence):
    given = SMALL | dict(start=str(first), start_form="continued") | change
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        train(TrainConfig(**given), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_that_has_ended_goes_on(tmp_path):
    "At a constant rate four steps at once and two steps twice are the same, to the bit."
    config = TrainConfig(
        **SMALL
        | dict(steps=4, evaluation=dict(samples=2, every=1), optim=dict(schedule="constant"))
    )
    short = config.model_copy(update=dict(steps=2))
    whole, run = train(config, tmp_path / "whole"), train(short, tmp_path / "run")
    early = json.loads((run.folder / "results.json").read_text())["after"]
    run = train(config, tmp_path / "run", resume=True)
    assert [timeless(r) for r in run.metrics()] == [timeless(r) for r in whole.metrics()]
    for name in ("results.json", "predictions_after.jsonl"):
        mine, theirs = ((r.folder / name).read_text() for r in (run, whole))
        assert mine == theirs
    assert json.loads((run.folder / "results.json").read_text())["after"] != early
    assert run.info["resumed"][0]["changed"] == {"steps": [2, 4]}


def test_a_run_does_not_become_shorter(tmp_path):
    config = TrainConfig(**SMALL)
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="less than the 2 that the run has taken"):
        train(config.model_copy(update=dict(steps=1)), tmp_path / "run", resume=True)
