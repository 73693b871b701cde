"""One two-stage GRPO step at the papers' size on one GPU.

Qwen2.5-VL-7B with random weights in bf16, LoRA r = 64, 16 questions x 8 answers, 840 x 840 pixels.

    python benchmarks/at_scale.py           # on the GPU; writes benchmarks/results/at_scale.json
    python benchmarks/at_scale.py --tiny    # the same path at a small size, on a CPU in seconds

Answers are of exactly `--answer` tokens in both stages, all descriptions different (the worst
case). A prompt has 900 image tokens and about 110 of text. Measured: seconds by stage, tokens
generated a second, peak memory.
"""

import argparse
import sys
from pathlib import Path

import torch
from measuring import RESULTS, high_water, machine, medians, write_result
from our_engine import Ours
from workload import RANK, SMALL

from dr2seg_lib.rehearsal.sizes import SEVEN as LANGUAGE
from dr2seg_lib.rehearsal.sizes import VISION

SEVEN = dict(
    text=LANGUAGE | dict(mrope_section=[16, 24, 24]), vision=VISION, tied=False
)  # Qwen2.5-VL-7B's config.json


def memory(device: str) -> dict:  # GiB
    "The most that was in use, weights included: of the GPU, or of the process."
    if device == "cpu":
        return dict(resident=round(high_water() / 2**20, 2))
    return dict(
        allocated=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        reserved=round(torch.cuda.max_memory_reserved() / 2**30, 2),
    )


def measure(args, size: dict, device: str) -> dict:
    "Medians over the steps; the first one warms up and is left out."
    ours = Ours(args, size=size, device=device, dtype=torch.bfloat16)
    rows = []
    for _ in range(args.steps + 1):
        rows.append(ours.step(True))
        print({k: round(v, 2) for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
    tokens, seconds = 2 * args.prompts * args.samples * args.answer, medians(rows[1:])
    trained = [p for _, p in ours.policy.trainable()]
    return dict(
        parameters=sum(p.numel() for p in ours.policy.model.parameters()),
        trained=sum(p.numel() for p in trained),
        seconds=seconds,
        tokens_per_second=dict(
            generation=round(tokens / (seconds["generation"] + seconds["second"]), 1),
            step=round(tokens / seconds["step"], 1),
        ),
        peak_gib=memory(device),
        rows=rows,
    )


def parse_arguments():
    "The command line; a tiny run has its own sizes."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--tiny",
        action="store_true",
        help="2 questions x 2 answers of 8 tokens, a small model, pictures of 112 x 112, on a CPU",
    )
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--answer", type=int, default=128)
    p.add_argument(
        "--side", type=int, default=840, help="of the picture: (side / 28)^2 image tokens"
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="tokens in one forward of the update: memory, not mathematics",
    )
    p.add_argument("--steps", type=int, default=3, help="measured, after one that warms up")
    p.add_argument(
        "--out", type=Path, help="default: benchmarks/results/at_scale.json, or at_scale_tiny.json"
    )
    args = p.parse_args()
    if args.tiny:
        args.prompts, args.samples, args.answer, args.side, args.steps = 2, 2, 8, 112, 1
    elif not torch.cuda.is_available():
        p.error("there is no GPU here; --tiny shows the path on a CPU")
    return args


def main():
    args = parse_arguments()
    device = "cpu" if args.tiny else "cuda"
    figures = measure(args, SMALL if args.tiny else SEVEN, device)
    fields = "prompts", "samples", "answer", "side", "max_tokens", "steps"
    shape = {k: getattr(args, k) for k in fields}
    shape |= dict(image_tokens=(args.side // 28) ** 2, lora_rank=RANK, dtype="bfloat16")
    result = dict(
        machine=machine("transformers", "peft", "accelerate")
        | (dict(gpu=torch.cuda.get_device_name()) if device == "cuda" else {}),
        shape=shape,
        **figures,
    )
    name = "at_scale_tiny.json" if args.tiny else "at_scale.json"
    write_result(args.out or RESULTS / name, result)


if __name__ == "__main__":
    main()
