"The update by microbatches against the plain forward's loss; the check at a run's first step."

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import FAMILIES, make_policy, plain_logprobs

from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models import joined_attention
from dr2seg_lib.models.sampling import Completions
from dr2seg_lib.rollouts.two_stage import Rollouts
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.self_check import ROUNDING
from dr2seg_lib.training.trainer import build_training_state, train, train_step
from dr2seg_lib.training.update import (
    Microbatch,
    accumulate_gradients,
    grpo_loss,
    microbatches,
    score_by_reference,
    weigh_tokens,
)

SAMPLES = [MiniReasonSeg("val")[i] for i in range(2)]
OPTIM = TrainConfig(kl=0.1).optim


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request):
    return make_policy(request.param)


def asked(policy, lengths, seed=0):
    "A step's answers of these lengths, a list for each prompt, and their advantages."
    flat = list(itertools.chain(*lengths))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (len(flat), max(flat)), generator=generator)
    mask = torch.arange(max(flat)) < torch.tensor(flat)[:, None]
    samples = SAMPLES[: len(lengths)]
    texts = [dr2seg_prompt(s.query) for s in samples]
    completions = Completions(ids, mask, *torch.zeros(3, *ids.shape))
    rollouts = Rollouts([], texts, policy.encode([s.image for s in samples]), completions)
    return rollouts, torch.randn(len(lengths), len(lengths[0]), generator=generator)


def split(policy, rollouts, advantage, most):
    ids, attention, _ = policy.prompt_ids(rollouts.texts, rollouts.encoded)
    return microbatches(rollouts, advantage, attention.sum(1).tolist(), most)


def taken(policy):
    "The gradients, which are then forgotten."
    out = [p.grad for _, p in policy.trainable()]
    for _, p in policy.trainable():
        p.grad = None
    return out


def update(policy, rollouts, advantage, most, optim=OPTIM):
    "Loss, KL and gradients of one pass."
    batches = split(policy, rollouts, advantage, most)
    with policy.reference():
        score_by_reference(policy, rollouts, batches)
    accelerator = Accelerator(cpu=True)
    weigh_tokens(batches, accelerator, rollouts.completions.mask, optim.average)
    sums = accumulate_gradients(policy, accelerator, rollouts, batches, optim)
    return sums, taken(policy), batches


def plain_update(policy, rollouts, advantage):
    "The same by the model's own forward over everything at once."
    drawn = rollouts.completions
    inputs = policy, SAMPLES[: len(rollouts.texts)], rollouts.texts, rollouts.encoded, drawn
    with policy.reference():
        reference = plain_logprobs(*inputs)
    weights = drawn.mask / drawn.mask.sum()
    batch = Microbatch([], drawn.ids, drawn.mask, advantage.flatten(), weights, reference)
    loss, kl = grpo_loss(plain_logprobs(*inputs), batch, OPTIM)
    loss.backward()
    return (loss.item(), kl.item()), taken(policy)


def far_apart(ours, theirs):
    "The relative difference of all gradients."
    ours, theirs = (torch.cat([g.flatten() for g in part]) for part in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


LENGTHS = st.integers(2, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(1, 6), min_size=n, max_size=n), min_size=1, max_size=2)
)


@given(lengths=LENGTHS, seed=st.integers(0, 99), room=st.integers(1, 12))
@settings(max_examples=8)
def test_any_split_has_the_gradients_of_the_whole(policy, lengths, seed, room):
    "So few tokens at once that a group is split: its prompt's gradient gathers, then goes on."
    rollouts, advantage = asked(policy, lengths, seed)
    sums, gradients, whole = update(policy, rollouts, advantage, 10**6)
    longest = policy.prompt_ids(rollouts.texts, rollouts.encoded)[1].sum(1).max()
    few_sums, few, parts = update(policy, rollouts, advantage, int(longest) + room)
    assert len(whole) == 1
    assert len(parts) == len(lengths)  # no two prompts at once
    assert few_sums == pytest.approx(sums, abs=1e-6)
    assert far_apart(few, gradients) < 1e-5


def test_the_loss_and_gradients_of_the_plain_forward(policy):
    rollouts, advantage = asked(policy, [[5, 1, 3], [2, 6, 1]])
    sums, gradients, _ = update(policy, rollouts, advantage, 10**6)
    one_by_one, few, parts = update(policy, rollouts, advantage, 1)
    plain, theirs = plain_update(policy, rollouts, advantage)
    assert [len(shared) for shared in parts] == [3, 3]
    assert sums == pytest.approx(plain, abs=1e-6)
    assert one_by_one == pytest.approx(plain, abs=1e-6)
    assert far_apart(gradients, theirs) < 1e-5
    assert far_apart(few, theirs) < 1e-5


def test_splitting_changes_no_loss_by_answers_with_an_entropy_bonus(policy):
    optim = TrainConfig(kl=0.1, optim=dict(average="answers", entropy=1.0, kl_most=10.0)).optim
    rollouts, advantage = asked(policy, [[5, 1, 3], [2, 6, 1]])
    sums, gradients, _ = update(policy, rollouts, advantage, 10**6, optim)
    few_sums, few, parts = update(policy, rollouts, advantage, 1, optim)
    assert [len(shared) for shared in parts] == [3, 3]
    assert few_sums == pytest.approx(sums, rel=1e-6, abs=1e-6)
    assert far_apart(few, gradients) < 1e-5
    without = TrainConfig(kl=0.1, optim=dict(average="answers")).optim
    assert far_apart(update(policy, rollouts, advantage, 10**6, without)[1], gradients) > 1e-3


def looped_loss(drawn, lengths, optim, share):
    "The loss token by token, in plain numbers; share: what a token of answer i weighs."
    logp, old, reference, entropy, advantage = drawn
    high, total = 1 + (optim.clip_high or optim.clip), 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = math.exp(logp[i][t] - old[i][t])
            kept = min(max(ratio, 1 - optim.clip), high)
            surrogate = min(ratio * advantage[i], kept * advantage[i])
            delta = reference[i][t] - logp[i][t]
            kl = math.exp(delta) - delta - 1
            kl = min(kl, optim.kl_most) if optim.kl_most else kl
            total += share(i) * (optim.kl * kl - surrogate - optim.entropy * entropy[i][t])
    return total


SHARES = dict(
    tokens=lambda lengths: lambda i: 1 / sum(lengths),
    process=lambda lengths: lambda i: 1 / sum(lengths),  # of one process
    answers=lambda lengths: lambda i: 1 / lengths[i] / len(lengths),
)


@pytest.mark.parametrize("average", SHARES)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    seed=st.integers(0, 999),
    entropy=st.sampled_from([0.0, 1e-3, 0.5]),
    most=st.sampled_from([0.0, 0.3, 10.0]),
    high=st.sampled_from([0.0, 0.28]),
)
def test_every_choice_of_the_loss_against_a_loop(average, lengths, seed, entropy, most, high):
    choice = dict(average=average, kl=0.1, kl_most=most, entropy=entropy, clip_high=high)
    optim, generator = TrainConfig(optim=choice).optim, torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(4)]
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.double)
    logp, old, reference, entropies = numbers
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = Microbatch([], mask, mask, advantage, None, reference, old)
    weigh_tokens([[batch]], Accelerator(cpu=True), mask, average)
    loss, _ = grpo_loss(logp, batch, optim, entropies if entropy else None)
    plain = [x.tolist() for x in (logp, old, reference, entropies, advantage)]
    by_hand = looped_loss(plain, lengths, optim, SHARES[average](lengths))
    assert loss.item() == pytest.approx(by_hand, abs=1e-5)  # the weights are float32


@given(lengths=LENGTHS, most=st.integers(1, 700))
@settings(max_examples=60)
def test_every_answer_stands_in_one_microbatch(lengths, most):
    flat = list(itertools.chain(*lengths))
    ids = torch.arange(len(flat))[:, None].expand(-1, max(flat)).contiguous()
    mask = torch.arange(max(flat)) < torch.tensor(flat)[:, None]
    completions = Completions(ids, mask, *torch.zeros(3, *ids.shape))
    advantage = torch.arange(len(flat)).float().view(len(lengths), -1)
    prompts = [100] * len(lengths)
    shared = microbatches(Rollouts([], [], [], completions), advantage, prompts, most)
    parts = list(itertools.chain(*shared))
    assert torch.cat([part.ids[:, 0] for part in parts]).tolist() == list(range(len(flat)))
    assert torch.cat([part.advantage for part in parts]).tolist() == list(range(len(flat)))
    assert sum(int(part.mask.sum()) for part in parts) == sum(flat)
    assert all(part.mask.any(0).all() for part in parts)  # no column of padding alone
    for part in parts:
        tokens = sum(prompts[g] for g in part.groups) + int(part.mask.sum())
        assert tokens <= most or len(part.ids) == 1


# the check at the first step

SMALL = dict(steps=2, prompts=2, samples=3, rank=4, alpha=4, eval_samples=0, max_new_tokens=40)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return train(TrainConfig(**SMALL), tmp_path_factory.mktemp("checked") / "run").metrics()


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    config = TrainConfig(**SMALL | dict(steps=1), runtime=dict(self_check=False))
    return train(config, tmp_path_factory.mktemp("unchecked") / "run").metrics()


def test_the_first_step_logs_how_far_the_plain_forward_is(checked):
    assert 0 <= checked[0]["self_check"] < 1e-4


def test_later_steps_are_not_checked(checked):
    assert len(checked) == 2
    assert "self_check" not in checked[1]


def test_a_parameter_turns_it_off(unchecked, checked):
    assert "self_check" not in unchecked[0]
    assert unchecked[0]["loss"] == checked[0]["loss"]
    assert unchecked[0]["grad_norm"] == checked[0]["grad_norm"]


@pytest.fixture
def broken(monkeypatch):
    "An engine that forgets what lies above a node's own tokens."
    monkeypatch.setattr(joined_attention, "join", lambda outs, lses: (outs[0], lses[0]))


TOLD = (
    r"the engine's log-probabilities are up to [\d.]+ nats off the model's own forward; "
    r"try runtime.attention eager, or report it with the versions of torch and transformers "
    r"\(runtime.self_check false goes on regardless\)"
)


def test_a_broken_engine_stops_the_run_in_a_sentence(broken, tmp_path):
    with pytest.raises(ValueError, match=f"^{TOLD}$"):
        train(TrainConfig(**SMALL), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_broken_engine_updates_nothing(broken):
    config = TrainConfig(**SMALL)
    state = build_training_state(config)
    before = [p.detach().clone() for _, p in state.policy.trainable()]
    samples, _ = sample_batch(load_data("mini", "train"), config, 1)
    with pytest.raises(ValueError, match=TOLD):
        train_step(state, samples, config, 1)
    after = [p for _, p in state.policy.trainable()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.grad is None for p in after)
    assert not state.optimizer.state


def test_a_little_wrong_is_wrong_enough(monkeypatch, tmp_path):
    "The image's keys weighed a tenth more: nobody would see it in an answer."
    join = joined_attention.join

    def biased(outs, lses):
        return join(outs, [lses[0], *(x + 0.1 for x in lses[1:])])

    monkeypatch.setattr(joined_attention, "join", biased)
    with pytest.raises(ValueError, match=TOLD):
        train(TrainConfig(**SMALL), tmp_path / "run")
    assert ROUNDING[torch.float32] < 0.1
