"What a rehearsal knows of quantised weights, 8-bit moments, fewer pixels and models that wait."

import pytest
import torch

from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.quantized import quantized_layers, weight_bytes
from dr2seg_lib.rehearsal.account import OPTIMIZER, WEIGHTS
from dr2seg_lib.rehearsal.answers import AnswerLengths
from dr2seg_lib.rehearsal.fake_device import CUDA, FakeDevice
from dr2seg_lib.rehearsal.plan import other_models, plan_config
from dr2seg_lib.rehearsal.sizes import fake_policy
from dr2seg_lib.rehearsal.step import rehearse_training

SMALL = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "model.dtype": "bfloat16",
    "optim.norm_lr": 0.0,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 40,
    "evaluation.samples": 2,
}
LAYER = 233_046_016  # weights of a layer's projections at 7B, by hand: 2 q,o + 2 k,v + 3 mlp


def held_weights(kind):
    device = FakeDevice()
    with device.active():
        policy = fake_policy(device, SMALL["model"], depth=1, side=112, quantize=kind)
        assert policy.model.dtype == torch.bfloat16
        return device.account.sums[WEIGHTS]


@pytest.mark.parametrize("kind, bits", [("nf4", 4 + 8 / 64 + 32 / 64 / 256), ("int8", 8)])
def test_a_7b_layer_takes_the_bits_that_it_should(kind, bits):
    spared = held_weights("none") - held_weights(kind)
    assert spared == pytest.approx(LAYER * (16 - bits) / 8, rel=0.002)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fake_layer_is_stored_as_a_true_one(kind):
    "Of the embedded model: codes and scales of the same shapes and types as bitsandbytes has made."
    true = quantized_layers(Policy.load(quantize=kind).model)
    device = FakeDevice()
    with device.active():
        fake = fake_policy(device, "embedded", "float32", quantize=kind).model
        stored = quantized_layers(fake)
        for a, b in zip(true, stored, strict=True):
            assert (a.weight.shape, a.weight.dtype) == (b.weight.shape, b.weight.dtype)
            assert weight_bytes(a) == weight_bytes(b)
            assert type(a) is type(b)
            assert b.weight.device == CUDA


def test_the_working_copy_is_on_the_account():
    "A product of a quantised layer holds its weight in bfloat16 for as long."
    device = FakeDevice()
    with device.active():
        policy = fake_policy(device, SMALL["model"], depth=1, quantize="nf4")
        layer = policy.model.model.language_model.layers[0].mlp.up_proj
        x = torch.empty(1, 3584, dtype=torch.bfloat16, device=CUDA)
        before, device.account.peaks = device.account.now, {}
        with torch.no_grad():
            layer(x)
    copy = 2 * 3584 * 18944
    assert copy <= device.account.peaks["start"] - before < 1.1 * copy


def test_a_whole_step_rehearses_with_all_of_it():
    "Moments take a byte each, with a scale for 256; the optimizer waits for each parameter."
    few = {"model.quantize": "nf4", "optim.states": "8bit", "data.max_pixels": 84 * 84}
    config = plan_config("", SMALL | few | {"evaluation.samples": 0}, 1)
    found = rehearse_training(config, AnswerLengths(32, 4), 1, 112)
    held = found.device.account.holders["checkpoint"][OPTIMIZER]
    assert held == pytest.approx(found.trained / 4 * 2 * (1 + 4 / 256), rel=0.02)
    assert found.device.work.waits["update"]["sync"] == 14, "two factors of seven projections"
    assert found.row["grad_norm"] is not None
    assert found.asked == 0, "there is no evaluation, and it rehearses all the same"


def test_fewer_pixels_are_fewer_tokens():
    held = {}
    for cap in 0, 56 * 56:
        device = FakeDevice()
        with device.active():
            policy = fake_policy(device, SMALL["model"], side=112, depth=1, max_pixels=cap)
        held[cap] = policy.side
    assert held == {0: 112, 56 * 56: 56}


def test_models_that_wait_hold_nothing():
    values = {"segmenter": "facebook/sam2-hiera-large", "method.scorer": "ViT-B-32:openai"}
    here, there = (
        plan_config("", SMALL | values | {"runtime.offload": o}, 1) for o in (False, True)
    )
    assert other_models(here, "evaluation") > other_models(here, "update") > 5e8
    assert other_models(there, "evaluation") == other_models(there, "update") == 0
