"""One GRPO step by this workbench, by TRL's GRPOTrainer, and by a loop written by hand.

    pip install -e ".[bench]"
    python benchmarks/against_trl.py                 # A B C A B C, one stage and two
    python benchmarks/against_trl.py --samples 32    # more answers a prompt
    python benchmarks/against_trl.py --side 1400     # 2,500 image tokens
    python benchmarks/against_trl.py --memory        # peak memory of a two-stage step
    python benchmarks/against_trl.py --growth        # one factor at a time, with a plot

All sides: the same random weights, fp32, LoRA r = 64 on the same modules, KL on, temperature 1,
answers of exactly `--answer` tokens. In a two-stage step all ask again about as many descriptions
as there are answers, all different (our worst case). The loop by hand is what a user of no library
writes: transformers' `generate` on repeated prompts and pictures, the model's own padded forward.
Results of another shape than the standard one carry it in their name.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from floor import floor
from measuring import RESULTS, high_water, machine, medians, write_result

ENGINES = "ours", "trl", "generate"
STAGES = dict(one=(False,), two=(True,), both=(False, True))
SHAPE = dict(prompts=2, samples=8, answer=64, side=840)  # the standard one


def build(name: str, args):
    "An engine by its name."
    if name == "ours":
        from our_engine import Ours as engine
    elif name == "trl":
        from trl_engine import Theirs as engine
    else:
        from generate_engine import ByHand as engine
    return engine(args)


def measure(args, stages: tuple) -> dict:  # {stage: {engine: rows}}
    "Rows of seconds, engine by engine, in turn; the first step of each turn warms up."
    engines, out = {name: build(name, args) for name in args.engines}, {}
    for turn in range(args.turns):
        for two_stage in stages:
            word = "two-stage" if two_stage else "one-stage"
            for name, engine in engines.items():
                rows = engine.turn(two_stage, args.steps)
                out.setdefault(word, {}).setdefault(name, []).extend(rows[1:])
                print(f"turn {turn + 1}, {word}, {name}: {rows[-1]}", flush=True)
    return out


def times_slower(ours: dict, other: dict) -> dict:
    "How many times longer another engine takes, stage by stage."
    return {k: round(other[k] / v, 2) for k, v in ours.items() if k in other}


def summary(measured: dict) -> dict:
    "Median seconds of each engine, and how many times ours the others take."
    out = {}
    for stage, engines in measured.items():
        seconds = {name: medians(rows) for name, rows in engines.items()}
        out[stage] = dict(seconds)
        if "ours" in seconds:
            ours = seconds.pop("ours")
            out[stage]["ratio"] = {k: times_slower(ours, other) for k, other in seconds.items()}
    return out


def alone(name: str, args) -> dict:  # seconds by stage; mib
    "Two-stage steps of one engine in a process of its own, and its peak memory above the start's."
    command = [sys.executable, __file__, "--only", name]
    for option in (*SHAPE, "steps", "rows", "max_tokens", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(args):
    "The engine of this process; the last line says what `alone` returns."
    engine = build(args.only, args)
    start = high_water()
    rows = engine.turn(True, args.steps)
    mib = round((high_water() - start) / 1024, 1)
    print(json.dumps(medians(rows[1:]) | dict(mib=mib)))


def result_path(args, stem: str) -> Path:
    "Where a result is written; another shape than the standard one is in the name."
    shape = {k: getattr(args, k) for k in SHAPE}
    changes = [f"_{k}{v}" for k, v in shape.items() if v != SHAPE[k]]
    return args.out / f"{stem}{''.join(changes)}.json"


def parse_arguments():
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SHAPE.items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--steps", type=int, default=2, help="a turn, the first of which warms up")
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--stages", choices=STAGES, default="both")
    p.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    text = "answers in one forward of TRL's and of the loop by hand; 0: all. A divisor of all"
    p.add_argument("--rows", type=int, default=0, help=text)
    text = "of our update (runtime.max_tokens); 0: as training does"
    p.add_argument("--max-tokens", type=int, default=0, help=text)
    text = "peak memory, each engine in a process of its own"
    p.add_argument("--memory", action="store_true", help=text)
    p.add_argument("--growth", action="store_true", help="seconds and memory over each size")
    p.add_argument("--tiny", action="store_true", help="with --growth: sizes of seconds")
    p.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    if args.rows and args.prompts * args.samples % args.rows:
        p.error("--rows must divide the number of answers")
    return args


def compare_seconds(args, result: dict):
    "All engines in turn, beside the floor."
    stages = STAGES[args.stages]
    rows = measure(args, stages)
    figures = summary(rows)
    floors = {"two-stage" if two else "one-stage": floor(args, two) for two in stages}
    for stage, part in figures.items():
        if "ours" in part:
            part["above_floor"] = round(part["ours"]["step"] / floors[stage]["step"], 2)
    result |= dict(image_tokens=(args.side // 28) ** 2, seconds=figures, floor=floors, rows=rows)
    write_result(result_path(args, "against_trl"), result)


def compare_memory(args, result: dict):
    "Each engine in a process of its own."
    peaks = {name: alone(name, args)["mib"] for name in args.engines}
    ratio = {name: round(mib / peaks["ours"], 2) for name, mib in peaks.items() if name != "ours"}
    write_result(result_path(args, "memory"), result | dict(peak_mib=peaks, ratio=ratio))


def measure_growth(args):
    "The sizes of a step, one at a time."
    from growth import draw, grow, slopes

    args.rows = 0
    rows = grow(args, alone)
    fitted = slopes(rows)
    draw(rows, fitted, args.out / "growth.png")
    here = machine("transformers", "trl")
    write_result(args.out / "growth.json", dict(machine=here, slopes=fitted, rows=rows))


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.only:
        return run_alone(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.growth:
        return measure_growth(args)
    fields = *SHAPE, "steps", "turns", "rows", "max_tokens"
    shape = {k: getattr(args, k) for k in fields}
    packages = ("transformers", "peft", *(["trl"] if "trl" in args.engines else []))
    result = dict(machine=machine(*packages), shape=shape)
    (compare_memory if args.memory else compare_seconds)(args, result)


if __name__ == "__main__":
    main()
