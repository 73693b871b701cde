"""The step of benchmarks/against_trl.py: measured on the CPU in a process of its own, or rehearsed.

python tests/rehearsal/benchmark_step.py    # prints the memory that a step takes, MiB
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measuring import high_water, lines_of
from our_engine import Ours

from dr2seg_lib.models import decoding, sampling
from dr2seg_lib.rehearsal.account import in_stage
from dr2seg_lib.rehearsal.answers import AnswerLengths, scripted_record
from dr2seg_lib.rehearsal.fake_device import FakeDevice
from dr2seg_lib.rehearsal.sizes import stay
from dr2seg_lib.rehearsal.step import RepeatedForward

SHAPE = Namespace(prompts=2, samples=8, answer=64, side=840, max_tokens=0)  # the benchmark's
TINY = Namespace(prompts=1, samples=2, answer=4, side=112, max_tokens=0)


def resident() -> int:  # KiB
    "What this process holds now."
    return int(lines_of("/proc/self/status", "VmRSS")[0].split()[1])


def measured() -> float:  # MiB
    "What a first step takes above what is there before it, as the benchmark measures it."
    Ours(TINY).step(True)  # loads what torch loads late
    engine = Ours(SHAPE)
    start = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    engine.step(True)
    return (high_water() - start) / 1024


def rehearsed() -> tuple[float, FakeDevice]:  # MiB; the device
    "The same, by the account of a fake device."
    device = FakeDevice()
    lengths = AnswerLengths(SHAPE.answer, 0)
    with device.active():
        with torch.device("cuda"), mock.patch.object(torch.nn.Module, "to", stay):
            engine = Ours(SHAPE, device="cuda")
        record = scripted_record(device, engine.policy.tokenizer, lengths)
        forward = RepeatedForward(device, decoding.forward_new_tokens)
        with (
            mock.patch.object(sampling, "Record", record),
            mock.patch.object(decoding, "forward_new_tokens", forward),
        ):
            start = device.account.now
            with in_stage(device.account, "step"):
                engine.step(True)
    return (device.account.peaks["step"] - start) / 2**20, device


if __name__ == "__main__":
    print(json.dumps(measured()))
