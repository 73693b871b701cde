"The work of a forward and of a backward pass, against a count by hand."

import pytest
import torch

from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.rehearsal.account import in_stage
from dr2seg_lib.rehearsal.fake_device import FakeDevice
from dr2seg_lib.rehearsal.sizes import SEVEN, add_fake_lora, fake_policy

B, G, T, RANK, LAYERS, SIDE = 2, 4, 100, 64, 3, 280
D, FF, HEADS, KV, V = (
    SEVEN[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
)
SIZE = D // HEADS
PROJECTIONS = [(D, D), (D, KV * SIZE), (D, KV * SIZE), (D, D), (D, FF), (D, FF), (FF, D)]
WEIGHTS = sum(a * b for a, b in PROJECTIONS)
ADAPTER = RANK * sum(a + b for a, b in PROJECTIONS)


@pytest.fixture(scope="module")
def counted():
    "FLOPs of prefill, scoring and backward; the length of the prompts."
    device = FakeDevice()
    config = TrainConfig(lora=dict(rank=RANK, alpha=RANK), optim=dict(norm_lr=0))
    image = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy()
    with device.active():
        name = "Qwen/Qwen2.5-VL-7B-Instruct"
        policy = fake_policy(device, name, side=SIDE, depth=LAYERS)
        add_fake_lora(device, policy, config)
        encoded = policy.encode([image] * B)
        with in_stage(device.account, "prefill"):
            prefix = policy.prefill([dr2seg_prompt("the cup")] * B, encoded)
        ids = torch.zeros(B * G, T, dtype=torch.long, device="cuda")
        mask = torch.ones_like(ids, dtype=torch.bool)
        with in_stage(device.account, "scoring"):
            loss = policy.logprobs(prefix, ids, mask).sum()
        with in_stage(device.account, "backward"):
            loss.backward()
    work = device.work.operations
    flops = {s: sum(op.flops * n for op, n in work[s].items()) for s in work}
    return flops, prefix.levels[0].lengths[0]


def attention(pairs: int) -> int:
    "Both products of all heads, of so many pairs of a query and a key."
    return 2 * 2 * pairs * HEADS * SIZE


def test_prefill(counted):
    flops, P = counted
    layer = 2 * B * P * (WEIGHTS + ADAPTER) + attention(B * P * P)
    assert flops["prefill"] == pytest.approx(LAYERS * layer + 2 * B * D * V, rel=0.02)


def scoring_attention(P: int) -> int:
    "Answers among themselves, and on their prompts."
    return attention(B * G * (T - 1) ** 2 + B * G * (T - 1) * P)


def test_scoring(counted):
    flops, P = counted
    tokens = B * G * (T - 1)
    layer = 2 * tokens * (WEIGHTS + ADAPTER) + scoring_attention(P)
    assert flops["scoring"] == pytest.approx(LAYERS * layer + 2 * tokens * D * V, rel=0.02)


def test_backward(counted):
    "A gradient of inputs everywhere, of weights in the adapter alone; five products for two."
    flops, P = counted
    tokens = B * P + B * G * (T - 1)
    layer = 2 * tokens * (WEIGHTS + 2 * ADAPTER)
    layer += 2.5 * (attention(B * P * P) + scoring_attention(P))
    spared = 2 * tokens * D * (D + 2 * KV * SIZE)  # of the first layer's inputs
    last = 2 * (B + B * G * (T - 1)) * D * V
    assert flops["backward"] == pytest.approx(LAYERS * layer - spared + last, rel=0.02)
