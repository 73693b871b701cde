"""The account of memory, against torch's own tracker, which knows nothing of ours.

The tracker hangs a hook on every parameter and so takes none that is frozen.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from dr2seg_lib.rehearsal.account import WEIGHTS, in_stage, mark
from dr2seg_lib.rehearsal.fake_device import FakeDevice

WIDTH, HEADS = 256, 4


class Layer(nn.Module):
    "A transformer's layer, its attention written out: fused kernels differ from device to device."

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for t in parts)
        seen = (q @ k.mT / 8).softmax(-1) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def training(layers: int):
    "A model, its optimizer, a batch."
    model = nn.Sequential(*[Layer() for _ in range(layers)])
    return model, torch.optim.AdamW(model.parameters(), foreach=True), torch.randn(8, 128, WIDTH)


def step(model, optimizer, batch):
    "An update."
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layers", [1, 4])
def test_the_peak_is_that_of_torchs_tracker(layers):
    device = FakeDevice()
    with device.active():
        with torch.device("cuda"):
            model, *rest = training(layers)
        mark(device.account, model.parameters(), WEIGHTS)
        with in_stage(device.account, "step"):
            step(model, *rest)
    ours, weights = device.account.peaks["step"], device.account.holders["step"][WEIGHTS]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer, batch = training(layers)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, batch)
        with tracker:
            step(model, optimizer, batch)
    (theirs,) = tracker.get_tracker_snapshot("peak").values()
    kinds = {str(kind).rpartition(".")[2]: n for kind, n in theirs.items()}
    assert ours == pytest.approx(kinds["Total"], rel=0.01)
    assert weights == pytest.approx(kinds["PARAM"], rel=0.01)
