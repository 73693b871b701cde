"The prefilled path against the plain forward of the real class, on random weights."
import cv2
import pytest
import torch

from dr2seg_lib import dialogue
from dr2seg_lib.policy import Policy, look_mask
from dr2seg_lib.scenes import MiniReasonSeg
from dr2seg_lib.warmstart import make_model, make_processor, make_tokenizer

SEED = 2 # random weights may say <|image_pad|>, behind which the oracle would look for an image; not with this seed


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    policy = Policy(make_model(tokenizer), make_processor(tokenizer), 112).add_lora(8, 8)
    for name, p in policy.trainable():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.05)
    return policy


@pytest.fixture(scope="module")
def asked(policy):
    "Prompts of unequal length on several images, and four sampled answers to each."
    samples = [MiniReasonSeg("val")[i] for i in range(3)]
    texts = [dialogue.dr2seg(s.query) for s in samples]
    seen = policy.encode([s.image for s in samples])
    assert len({len(policy.tokenizer(t)["input_ids"]) for t in texts}) > 1
    done = policy.generate(policy.read(texts, seen), n=4, max_new_tokens=24, seed=SEED)
    assert (done.ids != policy.model.config.image_token_id).all()
    return samples, texts, seen, done


def plain_logprobs(policy, samples, texts, seen, done):
    "The oracle: one padded forward of the model's own `forward` for every answer, the prompt repeated."
    ids, attention = policy.tokenize(texts, seen)
    n = len(done.ids) // len(texts)
    squash = lambda s: cv2.resize(s.image, (112, 112), interpolation=cv2.INTER_AREA)
    images = policy.processor.image_processor([squash(s) for s in samples for _ in range(n)], do_resize=False, return_tensors="pt")
    full = torch.cat([ids.repeat_interleave(n, 0), done.ids], 1)
    mask = torch.cat([attention.repeat_interleave(n, 0), done.mask.long()], 1)
    logits = policy.model(input_ids=full, attention_mask=mask, mm_token_type_ids=(full == policy.model.config.image_token_id).int(), **images).logits
    logp = logits[:, -done.ids.shape[1] - 1:-1].log_softmax(-1)
    return logp.gather(2, done.ids[..., None])[..., 0] * done.mask


def test_shared_prefix_equals_plain_forward_in_values_and_gradients(policy, asked):
    samples, texts, seen, done = asked
    shared = policy.logprobs(policy.read(texts, seen), done.ids, done.mask)
    plain = plain_logprobs(policy, samples, texts, seen, done)
    assert (shared - plain).abs().max() < 1e-5
    weights, parameters = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)), [p for _, p in policy.trainable()]
    for a, b in zip(torch.autograd.grad((shared * weights).sum(), parameters), torch.autograd.grad((plain * weights).sum(), parameters)):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_sampling_records_what_scoring_finds(policy, asked):
    _, texts, seen, done = asked
    assert (policy.logprobs(policy.read(texts, seen), done.ids, done.mask) - done.logp * done.mask).abs().max() < 1e-5
    assert ((done.entropy >= 0) & (done.margin >= 0) & (done.margin <= 1)).all()
    assert (done.mask.int().diff(dim=1) <= 0).all() # a row, once ended, stays ended


def test_second_prompt_reads_only_its_text(policy, asked):
    "Behind the image of a first prompt, a second one gives the logits, answers and scores of a prompt read whole."
    _, texts, seen, done = asked
    of = torch.tensor([2, 0, 2, 1])
    again = [dialogue.vision_reasoner(d) for d in ("the ring", "the large red ball and the small blue star", "the black moon", "the cross")]
    prefix = policy.read(texts, seen)
    short, whole = policy.read(again, [seen[i] for i in of], prefix, of), policy.read(again, [seen[i] for i in of])
    assert (short.logits - whole.logits).abs().max() < 1e-5 and torch.equal(short.start, whole.start)
    assert torch.equal(policy.generate(short, 2, 16, seed=3).ids, policy.generate(whole, 2, 16, seed=3).ids)
    assert (policy.logprobs(short, done.ids[:8], done.mask[:8]) - policy.logprobs(whole, done.ids[:8], done.mask[:8])).abs().max() < 1e-5


def test_same_seed_same_answers(policy, asked):
    _, texts, seen, done = asked
    prefix = policy.read(texts, seen)
    assert torch.equal(policy.generate(prefix, 4, 24, seed=SEED).ids, done.ids)
    assert not torch.equal(policy.generate(prefix, 4, 24, seed=SEED + 1).ids, done.ids)


def test_reference_is_the_adapter_off(policy, asked):
    samples, texts, seen, done = asked
    with policy.reference(): still = policy.logprobs(policy.read(texts, seen), done.ids, done.mask)
    with policy.adapter.disable_adapter(): plain = plain_logprobs(policy, samples, texts, seen, done)
    assert (still - plain).abs().max() < 1e-5 and not still.requires_grad


def test_full_tuning_keeps_a_frozen_reference():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    policy = Policy(make_model(tokenizer), make_processor(tokenizer), 112).unfreeze()
    live = policy.model.model.language_model
    with torch.no_grad(): policy.trainable()[5][1].add_(1.0)
    with policy.reference(): assert policy.model.model.language_model is not live
    assert policy.model.model.language_model is live and all("language_model" in n or "lm_head" in n for n, _ in policy.trainable())


def test_look_mask_by_hand():
    mask = look_mask(torch.tensor([[True, False]]), 2)[0, 0]
    assert (mask == 0).tolist() == [[False, True, True, False], [False, True, True, True]]


def test_missing_files_are_named(tmp_path, policy):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"): policy.load_adapter(tmp_path)


def test_an_answer_depends_on_its_own_seed_alone(policy, asked):
    _, texts, seen, _ = asked
    prefix, seeds = policy.read(texts, seen), list(range(12))
    together = policy.generate(prefix, 4, 24, seed=seeds)
    alone = policy.generate(prefix.rows(torch.tensor([1])), 4, 24, seed=seeds[4:8])
    T = min(together.ids.shape[1], alone.ids.shape[1])
    assert torch.equal(together.ids[4:8, :T], alone.ids[:, :T]) and not torch.equal(together.ids[:4], together.ids[4:8])


def test_draws_follow_the_distribution(policy, asked):
    "First tokens of many answers against the softmax they are drawn from."
    _, texts, seen, _ = asked
    prefix = policy.read(texts[:1], seen[:1])
    first = policy.generate(prefix, 4096, 1, seed=5).ids[:, 0].bincount(minlength=prefix.logits.shape[1]) / 4096
    p = prefix.logits[0].softmax(-1)
    assert (first - p).abs().max() < 5 * (p.max() / 4096) ** 0.5
