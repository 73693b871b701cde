"The tree of keys and values against the plain forward, over random shapes; what it holds; vision."

import itertools
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from policies import FAMILIES, make_policy, plain_logprobs, qwen3
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.lora import MergedLinear
from dr2seg_lib.models.parallel import recompute_in_backward
from dr2seg_lib.models.plain_forward import plain_logprobs as scored_plainly
from dr2seg_lib.models.prefix_tree import detach_prefix
from dr2seg_lib.models.sampling import Completions
from dr2seg_lib.models.vision import image_features
from dr2seg_lib.pretraining.policy_model import VISION_SIZES
from dr2seg_lib.pretraining.tokenizer import make_tokenizer

SAMPLES = [MiniReasonSeg("val")[i] for i in range(3)]
QUERIES = [
    "the ring",
    "the large red ball and the small blue star left of the moon",
    "what is black",
]


def answers(lengths, seed=0):
    "Answers of these lengths, of ordinary tokens."
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Completions(ids, mask, *torch.zeros(3, *ids.shape))


def checkpointed(policy, monkeypatch):
    for layer in policy.model.model.language_model.layers:
        monkeypatch.setattr(layer, "forward", recompute_in_backward(layer.forward))


def far_apart(policy, ours, theirs):
    "The relative difference of all parameters' gradients by two scores."
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    parameters = [p for _, p in policy.trainable()]
    pairs = zip(*(torch.autograd.grad((x * weights).sum(), parameters) for x in (ours, theirs)))
    ours, theirs = (torch.cat([g.flatten() for g in part]) for part in zip(*pairs))
    return float((ours - theirs).norm() / theirs.norm())


SHAPES = dict(
    lengths=st.integers(1, 3).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(1, 7), min_size=n, max_size=n), min_size=1, max_size=3
        )
    ),
    images=st.permutations(range(3)),
    seed=st.integers(0, 99),
)


@given(**SHAPES, behind=st.booleans(), checkpointing=st.booleans(), fused=st.booleans())
@settings(max_examples=8)
def test_the_plain_forward_in_values_and_gradients(
    policy, lengths, images, seed, behind, checkpointing, fused
):
    "Any number of prompts and answers, of any length, also behind the image of another prompt."
    B, drawn = len(lengths), answers(list(itertools.chain(*lengths)), seed)
    samples = [SAMPLES[i] for i in images[:B]]
    encoded = policy.encode([s.image for s in samples])
    texts = [visionreasoner_prompt(QUERIES[(seed + i) % 3]) for i in range(B)]
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:
        if fused:
            stack.enter_context(policy.fused_adapter())
        if checkpointing:
            checkpointed(policy, monkeypatch)
        prefix = policy.prefill(texts, encoded)
        if behind:  # the images in another order than their questions
            rows = torch.arange(B).flip(0)
            texts = [visionreasoner_prompt(q) for q in QUERIES[:B]]
            samples, encoded = samples[::-1], encoded[::-1]
            prefix = policy.prefill(texts, encoded, prefix, rows)
        shared = policy.logprobs(prefix, drawn.ids, drawn.mask)
        plain = plain_logprobs(policy, samples, texts, encoded, drawn)
        assert (shared - plain).abs().max() < 1e-5
        assert far_apart(policy, shared, plain) < 1e-5


def test_under_autocast_as_without_it(policy):
    "Attention's inputs are of several types there; the figures are those of bfloat16."
    drawn, sample = answers([3, 1, 5]), SAMPLES[0]
    encoded, texts = policy.encode([sample.image]), [visionreasoner_prompt(sample.query)]
    exact = policy.logprobs(policy.prefill(texts, encoded), drawn.ids, drawn.mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy.logprobs(policy.prefill(texts, encoded), drawn.ids, drawn.mask)
    rough.sum().backward()
    assert 0 < (rough - exact).abs().max() < 0.2


def test_the_self_checks_plain_forward_is_that_of_the_test(policy):
    drawn, sample = answers([3, 1, 5]), SAMPLES[0]
    encoded, texts = policy.encode([sample.image]), [visionreasoner_prompt(sample.query)]
    theirs = scored_plainly(policy, texts * 3, [sample.image] * 3, drawn.ids, drawn.mask)
    ours = plain_logprobs(policy, [sample], texts, encoded, drawn)
    assert (ours - theirs).abs().max() < 1e-5


# what is held


def prefilled(policy, words=0):
    "One prompt, longer by so many words."
    text = visionreasoner_prompt("the red ball" + " ball" * words)
    return policy.prefill([text], policy.encode([SAMPLES[0].image]))


def storages(prefix):
    pairs = itertools.chain.from_iterable(level.layers for level in prefix.levels)
    return [x.untyped_storage().data_ptr() for x in itertools.chain.from_iterable(pairs)]


@pytest.mark.parametrize("n", [2, 32])
def test_rows_hold_the_keys_of_their_prompt(policy, n):
    prefix = prefilled(policy)
    rows = prefix.rows(torch.zeros(n, dtype=torch.long))
    assert storages(rows) == storages(prefix)
    assert [level.owners for level in rows.levels] == [[0] * n]
    assert all(len(x) == 1 for pair in rows.levels[0].layers for x in pair)


def test_a_second_prompt_holds_the_keys_of_the_image(policy):
    prefix = prefilled(policy)
    again = policy.prefill(
        [visionreasoner_prompt(q) for q in QUERIES],
        policy.encode([SAMPLES[0].image]) * 3,
        prefix,
        torch.zeros(3, dtype=torch.long),
    )
    assert storages(again)[: len(storages(prefix))] == storages(prefix)


def sampling(policy, words, n):
    prefix = prefilled(policy, words)
    with LiveBytes() as live:
        policy.generate(prefix, n, 4, seed=0)
    return live.most


def update(policy, words, n):
    prefix, drawn = detach_prefix(prefilled(policy, words)), answers([4] * n)
    with LiveBytes() as live:
        policy.logprobs(prefix, drawn.ids, drawn.mask).sum().backward()
    return live.most


@pytest.mark.parametrize("stage", [sampling, update])
def test_what_answers_add_is_the_same_behind_a_longer_prompt(policy, stage):
    "From 2 answers to 32, memory grows by their own columns alone, however long the prompt is."
    words = 100
    few, many = ([stage(policy, w, n) for w in (0, words)] for n in (2, 32))
    growth, growth_behind_long = (b - a for a, b in zip(few, many))
    short, long = (prefilled(policy, w).levels[0] for w in (0, words))
    assert long.width >= short.width + words
    one = sum(x.nbytes for pair in long.layers for x in pair) // long.width * words
    assert growth > 0
    assert growth_behind_long - growth < one / 2  # were it held for each: 30 times


# adapters in one product


def adapted(policy):
    name = "model.language_model.layers.1.mlp.down_proj"
    return policy.model.get_submodule(name)


def through(layer, x, weights):
    "A layer's output, and the gradients of its input, A and B."
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = x.clone().requires_grad_()
    out = layer(x)
    return out, *torch.autograd.grad((out * weights).sum(), [x, A, B])


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_one_product_has_the_gradients_of_peft(policy, shape, seed):
    layer, generator = adapted(policy), torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, layer.in_features, generator=generator)
    weights = torch.randn(*shape, layer.out_features, generator=generator)
    theirs = through(layer, x, weights)
    with policy.fused_adapter():
        ours = through(layer, x, weights)
    assert ours[0].grad_fn.name().startswith(MergedLinear.__name__)
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, theirs))


def state(policy):
    "All that a context could leave behind."
    layers = policy.mergeable_layers()
    return (
        [m.base_layer.weight.data_ptr() for m in layers],
        ["forward" in vars(m) for m in layers],
        [(n, p.data_ptr()) for n, p in policy.trainable()],
    )


CONTEXTS = ["merged_adapter", "fused_adapter", "reference"]


@pytest.mark.parametrize("names", list(itertools.product(CONTEXTS, repeat=2)), ids="-".join)
def test_a_context_in_another_is_undone_after_an_exception(policy, names):
    before, x = state(policy), torch.ones(2, adapted(policy).in_features)
    whole = adapted(policy)(x)
    assert len(before[0]) > 1
    with pytest.raises(KeyError), ExitStack() as stack:
        for name in names:
            stack.enter_context(getattr(policy, name)())
        raise KeyError
    assert state(policy) == before
    assert torch.equal(adapted(policy)(x), whole)


@pytest.mark.parametrize("names", list(itertools.product(CONTEXTS, repeat=2)), ids="-".join)
def test_inside_a_reference_the_adapter_is_off_and_else_it_is_on(policy, names):
    layer = adapted(policy)
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ExitStack() as stack:
        on, off = layer(x), layer.base_layer(x)
        for name in names:
            stack.enter_context(getattr(policy, name)())
        assert (layer(x) - (off if "reference" in names else on)).abs().max() < 1e-5
    assert (on - off).abs().max() > 1e-3


def test_an_adapter_that_is_not_trained_stays_so(policy, tmp_path):
    policy.adapter.save_pretrained(tmp_path)
    other = make_policy("qwen2_5_vl" if policy.frame == 112 else "qwen3_vl")
    other.adapter.unload()
    other.load_adapter(tmp_path)
    assert not other.trainable()
    with other.merged_adapter():
        pass
    assert not other.trainable()


# vision


@cache
def unwindowed_tower():
    torch.manual_seed(1)
    return qwen3(make_tokenizer())[0].model.visual.eval()


@cache
def tower(family, window, full):
    "A vision tower of random weights; a Qwen3-VL's has no windows."
    if family == "qwen3_vl":
        return unwindowed_tower()
    torch.manual_seed(1)
    sizes = VISION_SIZES | dict(window_size=window, fullatt_block_indexes=full)
    config = Qwen2_5_VLVisionConfig(**sizes)
    return Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@given(
    window=st.sampled_from([16, 32, 48, 80, 112, 200]),
    full=st.sampled_from([(), (0,), (1,), (0, 2), (0, 1, 2)]),
    grid=st.tuples(st.just(1), *[st.integers(1, 8).map(lambda n: 2 * n)] * 2),
    images=st.integers(1, 3),
    attention=st.sampled_from(["sdpa", "eager"]),
)
@settings(max_examples=30)
def test_a_tower_with_windows_sees_what_transformers_sees(
    family, window, full, grid, images, attention
):
    "Windows that leave ragged edges, images that are no squares, several at once."
    visual = tower(family, window, full)
    visual.set_attn_implementation(attention)
    torch.manual_seed(images)
    grids = torch.tensor([grid] * images)
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8)
    with torch.no_grad():
        tokens, deep = image_features(visual, pixels, grids)
        own = visual(pixels, grid_thw=grids)
    assert (tokens - own.pooler_output).abs().max() < 1e-5
    assert len(deep) == (2 if family == "qwen3_vl" else 0)
    for a, b in zip(deep, getattr(own, "deepstack_features", [])):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_unequal_grids_are_those_of_transformers(family):
    visual = tower(family, 32, (1,))
    grids = torch.tensor([[1, 4, 6], [1, 14, 14]])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8)
    with torch.no_grad():
        tokens, _ = image_features(visual, pixels, grids)
        assert torch.equal(tokens, visual(pixels, grid_thw=grids).pooler_output)
        alone = [
            image_features(visual, x, g[None])[0]
            for x, g in zip(pixels.split(grids.prod(1).tolist()), grids)
        ]
    assert (tokens - torch.cat(alone)).abs().max() < 1e-5
