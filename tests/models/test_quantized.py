"Quantised weights: where they are, what they take, and that every path computes the same."

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from peft import PeftModel
from policies import plain_logprobs
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from true_formats import write_qwen

from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.samples import Sample, Target
from dr2seg_lib.methods.visionreasoner import score, visionreasoner_prompt
from dr2seg_lib.models import requirements
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.quantized import dequantized, quantized_layers, weight_bytes
from dr2seg_lib.rollouts.parsing import parse_response, to_image_coordinates

KINDS = "nf4", "int8"
NF4 = (
    "-1 -0.6961928 -0.5250731 -0.39491749 -0.28444138 -0.18477343 -0.09105004 0 0.0795803 "
    "0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1"
)  # QLoRA, appendix E


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny Qwen2.5-VL in the hub's layout."
    return write_qwen(tmp_path_factory.mktemp("qwen") / "model", "visionreasoner")


@pytest.fixture(params=["embedded", "qwen"])
def name(request):
    return "embedded" if request.param == "embedded" else str(request.getfixturevalue("folder"))


def with_adapter(policy):
    "The policy with an adapter that does something."
    torch.manual_seed(0)
    policy.add_lora(8, 8)
    for name, p in policy.trainable():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return policy


def asked(policy, n=2):
    samples = [MiniReasonSeg("val")[i] for i in range(n)]
    return samples, [visionreasoner_prompt(s.query) for s in samples]


@pytest.fixture(scope="module")
def answers():
    "What the embedded policy answers, tokens and mask."
    policy = Policy.load()
    samples, texts = asked(policy)
    prefix = policy.prefill(texts, policy.encode([s.image for s in samples]))
    drawn = policy.generate(prefix, 4, 60, seed=0)
    return drawn.ids, drawn.mask


@torch.no_grad()
def logprobs(policy, answers):
    samples, texts = asked(policy)
    encoded = policy.encode([s.image for s in samples])
    return policy.logprobs(policy.prefill(texts, encoded), *answers)


def mean_gap(a, b, answers):
    "Nats a token."
    return ((a - b).abs().sum() / answers[1].sum()).item()


def is_projection(name):
    return "language_model.layers" in name and name.endswith("_proj.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_models_projections_are_quantised_and_nothing_else(name, kind):
    model = Policy.load(name, quantize=kind).model
    for parameter, p in model.named_parameters():
        assert (p.dtype in (torch.uint8, torch.int8)) == is_projection(parameter), parameter
    assert len(quantized_layers(model)) == 7 * len(model.model.language_model.layers)


@pytest.mark.parametrize("kind, bits", [("nf4", 4.13), ("int8", 8.12)])
def test_weights_take_the_bytes_that_they_should(kind, bits):
    whole, few = Policy.load().model, Policy.load(quantize=kind).model
    numbers = sum(p.numel() for n, p in whole.named_parameters() if is_projection(n))
    stored = sum(map(weight_bytes, quantized_layers(few)))
    assert 8 * stored / numbers == pytest.approx(bits, abs=0.05)
    spared = sum(p.nbytes for p in whole.parameters()) - sum(p.nbytes for p in few.parameters())
    assert spared == 4 * numbers - numbers * {"nf4": 0.5, "int8": 1}[kind]


def test_nf4_is_that_of_the_paper():
    "A layer's weights by the table of the paper: the nearest value times the block's largest."
    plain = Policy.load().model.model.language_model.layers[1].mlp.up_proj.weight
    layer = Policy.load(quantize="nf4").model.model.language_model.layers[1].mlp.up_proj
    blocks = plain.detach().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor([float(x) for x in NF4.split()])
    nearest = (blocks / scale)[..., None].sub(table).abs().argmin(-1)
    expected = (table[nearest] * scale).view_as(plain)
    off = (dequantized(layer, torch.float32) - expected).abs()
    assert off.max() < 0.02 * plain.abs().max()  # the scales have 8 bits themselves


@pytest.mark.parametrize("kind, least, most", [("nf4", 0.01, 0.3), ("int8", 1e-3, 0.03)])
def test_logits_lose_what_so_few_bits_lose(kind, least, most, answers):
    whole, few = logprobs(Policy.load(), answers), logprobs(Policy.load(quantize=kind), answers)
    assert least < mean_gap(whole, few, answers) < most


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_computes_the_same_and_gradients_reach_the_adapter_alone(name, kind):
    policy = with_adapter(Policy.load(name, quantize=kind))
    samples, texts = asked(policy)
    encoded = policy.encode([s.image for s in samples])
    seed = 0
    while True:
        drawn = policy.generate(policy.prefill(texts, encoded), 3, 24, seed=seed)
        if (drawn.ids != policy.model.config.image_token_id).all():
            break
        seed += 1
    logp = policy.logprobs(policy.prefill(texts, encoded), drawn.ids, drawn.mask)
    assert (logp - drawn.logp * drawn.mask).abs().max() < 1e-4, "sampled as it is scored"
    if name == "embedded":
        plain = plain_logprobs(policy, samples, texts, encoded, drawn)
        assert (logp - plain).abs().max() < 1e-4, "the engine is the model's own forward"
    logp.sum().backward()
    moved = [n for n, p in policy.adapter.named_parameters() if p.grad is not None]
    assert moved == [n for n, _ in policy.trainable()]
    assert all("lora_" in n for n in moved)
    assert all(p.dtype == torch.float32 for _, p in policy.trainable())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_float_model_with_the_same_numbers(kind):
    "Values and gradients are those of a float model whose weights are the dequantised ones."
    few, whole = with_adapter(Policy.load(quantize=kind)), Policy.load()
    pairs = zip(quantized_layers(few.model), [m for n, m in projections(whole)], strict=True)
    for layer, plain in pairs:
        plain.weight.data = dequantized(layer, torch.float32)
    with_adapter(whole)
    samples, texts = asked(few)
    ids = torch.randint(20, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    mask, gradients = torch.ones_like(ids, dtype=torch.bool), []
    for policy in few, whole:
        encoded = policy.encode([s.image for s in samples])
        with policy.fused_adapter():
            logp = policy.logprobs(policy.prefill(texts, encoded), ids, mask)
            logp.sum().backward()
        gradients.append((logp.detach(), [p.grad for _, p in policy.trainable()]))
    (a, ours), (b, plain) = gradients
    assert (a - b).abs().max() < 1e-4
    for g, h in zip(ours, plain, strict=True):
        assert (g - h).norm() <= 1e-4 * h.norm()


def projections(policy):
    return [(n, m) for n, m in policy.model.named_modules() if is_projection(f"{n}.weight")]


@pytest.mark.parametrize("kind, most", [("nf4", 0.05), ("int8", 0.05)])
def test_peft_puts_the_adapter_on_a_quantised_base_without_this_package(
    folder, tmp_path, kind, most
):
    "By transformers' and peft's own calls and bitsandbytes' own products."
    policy = with_adapter(Policy.load(str(folder), quantize=kind))
    policy.adapter.save_pretrained(str(tmp_path / "adapter"))
    skip = dict(llm_int8_skip_modules=["model.visual", "lm_head"])
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = BitsAndBytesConfig(**(four if kind == "nf4" else dict(load_in_8bit=True)) | skip)
    base = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    )
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    theirs.train()  # else its product for one kind of CPU asks for rows of whole blocks
    ids = torch.randint(20, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a = policy.model(input_ids=ids).logits.log_softmax(-1)
        with theirs.disable_adapter():
            base_alone = theirs(input_ids=ids).logits.log_softmax(-1)
        b = theirs(input_ids=ids).logits.log_softmax(-1)
    near = (a.exp() * (a - b)).sum(-1).mean()
    assert near < most
    assert (a.exp() * (a - base_alone)).sum(-1).mean() > 5 * near, "the adapter counts"


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_would_be_rounded_so_it_is_refused(kind, answers):
    "What peft's merge loses of a small adapter, in nats a token beside what the adapter changes."
    policy = with_adapter(Policy.load(quantize=kind))
    before = logprobs(policy, answers)
    with policy.reference():
        changes = mean_gap(before, logprobs(policy, answers), answers)
    with pytest.raises(ValueError, match="use start_form continued"):
        policy.fold_adapter()
    assert mean_gap(before, logprobs(policy, answers), answers) == 0, "refused before it was begun"
    policy.model = policy.adapter.merge_and_unload()
    lost = mean_gap(before, logprobs(policy, answers), answers)
    assert lost > {"nf4": 0.5, "int8": 0.05}[kind] * changes


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"model.tune": "full"}, "quantised weights cannot be trained"),
        ({"runtime.shard": True}, "quantised weights cannot be divided among processes"),
        ({"runtime.server": "http://localhost:8000"}, "samples from weights of its own"),
    ],
)
def test_what_quantised_weights_cannot_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**{"model.quantize": "nf4"} | values)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(ValueError, match="install it with: pip install bitsandbytes"):
        requirements.validate_quantize("int8")
    assert requirements.validate_quantize("none") == "none"


# --- image tokens capped


@pytest.mark.parametrize("cap", [0, 64 * 64, 48 * 48 + 900])
def test_an_answer_at_a_capped_size_lands_on_the_same_place(cap):
    "The object's box in the capped frame, said by a policy, is the object's box in the picture."
    policy = Policy.load(max_pixels=cap)
    assert policy.side == policy.frame == {0: 112, 64 * 64: 64, 48 * 48 + 900: 48}[cap]
    picture = np.zeros((300, 420, 3), np.uint8)
    mask = np.zeros((300, 420), bool)
    mask[60:180, 105:315] = True
    sample = Sample("a", picture, "the box", (Target.of(mask),))
    (encoded,) = policy.encode([picture])
    assert len(encoded.tokens) == (policy.side // 16) ** 2
    (target,) = sample.scaled(policy.frame)
    text = (
        "<think>it is there</think><answer>[{"
        f'"bbox_2d": {list(target.box)}, "point_2d": {list(target.point)}'
        "}]</answer>"
    )
    assert score(text, [target], policy.frame)["accuracy"] == 3
    (found,) = to_image_coordinates(parse_response(text).objects, policy.frame, sample.size)
    unit = max(sample.size) / policy.frame
    assert np.abs(np.subtract(found.box, sample.targets[0].box)).max() <= unit
    x, y = found.point
    assert mask[int(y), int(x)]


def test_a_cap_below_one_image_token_is_refused():
    with pytest.raises(ValueError, match="less than one image token of 16 × 16"):
        Policy.load(max_pixels=255)
