"The prefilled path against the plain forward of the real class, on random weights."
import cv2
import pytest
import torch
from transformers import LlamaConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

from dr2seg_lib import dialogue
from dr2seg_lib.policy import ATTENTION, Policy, Seen, image_features, look_mask
from dr2seg_lib.scenes import MiniReasonSeg
from dr2seg_lib.warmstart import CHAT_TEMPLATE, make_model, make_processor, make_tokenizer

def qwen3(tokenizer):
    "A small Qwen3-VL of random weights, two of its vision layers feeding DeepStack."
    token = lambda name: tokenizer.convert_tokens_to_ids(name)
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3], mrope_interleaved=True), tie_word_embeddings=True)
    vision = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=8, spatial_merge_size=2, temporal_patch_size=2,
                  out_hidden_size=64, num_position_embeddings=196, deepstack_visual_indexes=[0, 1])
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
                                                          vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True))
    with torch.no_grad(): # strong enough to be missed where it is left out
        for merger in model.model.visual.deepstack_merger_list: merger.linear_fc2.weight.normal_(std=0.5)
    parts = make_processor(tokenizer)
    video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    return model, Qwen3VLProcessor(image_processor=parts.image_processor, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def policy(request):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    policy = Policy(make_model(tokenizer), make_processor(tokenizer), 112) if request.param == "qwen2_5_vl" else Policy(*qwen3(tokenizer), 1000, 112)
    policy.add_lora(8, 8)
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
    for policy.seed in range(50): # random weights may say <|image_pad|>, behind which the oracle would look for an image
        done = policy.generate(policy.read(texts, seen), n=4, max_new_tokens=24, seed=policy.seed)
        if (done.ids != policy.model.config.image_token_id).all(): return samples, texts, seen, done


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


def test_answers_that_end_at_once(policy, asked):
    _, texts, seen, _ = asked
    prefix, ids = policy.read(texts, seen), torch.tensor([[1], [2], [3], [4], [5], [6]])
    logp = policy.logprobs(prefix, ids, torch.ones(6, 1, dtype=torch.bool))
    assert logp.shape == (6, 1) and torch.allclose(logp[:, 0], prefix.logits.log_softmax(-1).repeat_interleave(2, 0).gather(1, ids)[:, 0])
    logp.sum().backward()


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
    assert torch.equal(policy.generate(prefix, 4, 24, seed=policy.seed).ids, done.ids)
    assert not torch.equal(policy.generate(prefix, 4, 24, seed=policy.seed + 1).ids, done.ids)


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


def test_qwen3_vl_speaks_in_thousandths_and_needs_its_deep_features(tmp_path):
    "Saved in the layout of the hub and loaded by name."
    torch.manual_seed(0)
    model, processor = qwen3(make_tokenizer())
    model.save_pretrained(tmp_path); processor.save_pretrained(tmp_path)
    policy, sample = Policy.load(str(tmp_path)), MiniReasonSeg("val")[0]
    assert (policy.frame, policy.side) == (1000, 112)
    seen = policy.encode([sample.image])
    assert len(seen[0].deep) == 2 and seen[0].deep[0].shape == seen[0].tokens.shape == (49, 64)
    whole, blind = policy.read(["what is red"], seen), policy.read(["what is red"], [Seen(seen[0].tokens, seen[0].grid)])
    assert (whole.logits - blind.logits).abs().max() > 1e-3


def test_another_kind_of_model_is_named(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama; the workbench speaks with qwen2_5_vl and qwen3_vl"): Policy.load(str(tmp_path))


def test_attention_changes_time_not_answers():
    "Written out or torch's own: the same image tokens, answers, scores and gradients of the embedded policy, by the batched tower and by the tower's own way."
    samples = [MiniReasonSeg("val")[i] for i in range(3)]
    texts, found = [dialogue.dr2seg(s.query) for s in samples], {}
    for attention in ("sdpa", "eager"):
        policy = Policy.load(attention=attention).add_lora(4, 4)
        torch.manual_seed(0)
        for name, p in policy.trainable(): torch.nn.init.normal_(p, std=0.02)
        visual = policy.model.model.visual
        assert visual.config._attn_implementation == policy.model.model.language_model.config._attn_implementation == attention
        seen = policy.encode([s.image for s in samples])
        done = policy.generate(policy.read(texts, seen), 2, 40, seed=1)
        scores = policy.logprobs(policy.read(texts, seen), done.ids, done.mask)
        found[attention] = torch.cat([s.tokens for s in seen]), done.ids, scores, torch.autograd.grad(scores.sum(), [p for _, p in policy.trainable()])
        pixels = policy.processor.image_processor([cv2.resize(s.image, (112, 112), interpolation=cv2.INTER_AREA) for s in samples], do_resize=False, return_tensors="pt")
        own = visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        assert (found[attention][0] - own).abs().max() < 1e-5
    (tokens_a, ids_a, scores_a, grads_a), (tokens_b, ids_b, scores_b, grads_b) = found.values()
    assert (tokens_a - tokens_b).abs().max() < 1e-5 and torch.equal(ids_a, ids_b) and (scores_a - scores_b).abs().max() < 1e-4
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(grads_a, grads_b))


def test_flash_goes_to_the_vision_tower_alone(monkeypatch):
    "FlashAttention needs a GPU, so another implementation stands in its place."
    monkeypatch.setitem(ATTENTION, "flash", {k: v.replace("flash_attention_2", "eager") for k, v in ATTENTION["flash"].items()})
    core = Policy.load(attention="flash").model.model
    assert ATTENTION["flash"]["vision_config"] == "eager" and core.visual.config._attn_implementation == "eager" and core.language_model.config._attn_implementation == "sdpa"
