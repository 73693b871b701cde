"""What a published training needs on one small GPU: peaks of memory by setting, rehearsed.

    python benchmarks/small_gpu.py visionreasoner_7k visionreasoner_7k_3b

Each setting is rehearsed with models of 2 and 4 layers, which takes minutes; no GPU is needed.
"""

import argparse
import warnings

from dr2seg_lib.rehearsal.gpus import Gpu, usable_gib
from dr2seg_lib.rehearsal.plan import PlanRequest, deep_peaks, plan_config
from dr2seg_lib.rehearsal.sizes import PUBLISHED

SIZES = 16, 24, 48, 80  # GB
SHORT = {"runtime.offload": True, "runtime.max_tokens": 2048, "runtime.answers_at_once": 32}
FEW = SHORT | {"model.quantize": "nf4", "optim.states": "8bit"}
SETTINGS = {
    "as published": {},
    "short microbatches": SHORT,
    "int8": FEW | {"model.quantize": "int8"},
    "nf4": FEW,
    "nf4, 560² pixels": FEW | {"data.max_pixels": 560**2},
}


def peak(preset: str, given: dict) -> tuple[float, str]:
    "GiB, and the stage that needs them."
    config = plan_config(preset, given, 1)
    layers = PUBLISHED[config.model.name]["num_hidden_layers"]
    peaks = deep_peaks(config, PlanRequest(), layers)
    stage = max(peaks, key=peaks.get)
    return peaks[stage], stage


def main():
    "A line for each preset and setting."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    asked = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of torch, on what is fake
    usable = {size: usable_gib(Gpu(size, 0, 0, 0)) for size in SIZES}
    for preset in asked.presets:
        for name in asked.settings:
            gib, stage = peak(preset, SETTINGS[name])
            fits = [f"{size} GB" for size in SIZES if gib <= usable[size]]
            where = ", ".join(fits) or "nowhere"
            print(f"{preset}, {name}: {gib:.1f} GiB ({stage}); fits {where}", flush=True)


if __name__ == "__main__":
    main()
