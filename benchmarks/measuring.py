"""What every benchmark needs to report: the machine, medians, peak memory. Nothing of the library.

So that a benchmark can be run on an older checkout too.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def lines_of(path: str, start: str) -> list[str]:
    "The lines of a file that begin with a word."
    with open(path) as file:
        return [line for line in file if line.startswith(start)]


def machine(*packages: str) -> dict:
    "The processor, its threads in use, and the versions of torch and of packages."
    names = [line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo", "model name")]
    cpu = names[0] if names else platform.processor()
    here = dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__)
    return here | {p: version(p) for p in packages}


def high_water() -> int:  # KiB; getrusage would give a child its parent's peak
    "The most memory that this process has held."
    return int(lines_of("/proc/self/status", "VmHWM")[0].split()[1])


def medians(rows: list[dict]) -> dict:
    "The median of every figure over the rows."
    return {k: round(float(np.median([r[k] for r in rows])), 3) for k in rows[0]}


def write_result(path: Path, result: dict):
    "Writes a benchmark's result and prints it, without its single rows."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))
