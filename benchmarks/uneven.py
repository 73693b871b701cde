"""Answers of very different lengths: continuous batching against waiting for the longest.

    python benchmarks/uneven.py

`--at-once` answers are under way, each of a length drawn between `--shortest` and `--longest`.
Three ways, in turn, on the same draws:

- continuous: `Policy.generate(..., at_once=...)`, a finished answer's place is taken by the next;
- dropping: batches of that many answers, one call each; finished answers are left out;
- waiting: the same batches, and a finished answer keeps its place until the longest has ended.

How the lengths are forced: each answer has its own seed, and its length is known by it. Where an
answer is to end its draw is set to 1, which no generator gives; there `choose_tokens` is made to
say the end-of-turn token, and nowhere else. All else is the library's. The tokens of all three ways
must be equal. A draw may fall within rounding of the border of two tokens, since a product's last
digits depend on how many rows it has; so of a hundred answers three may differ, and are counted.
"""

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measuring import RESULTS, machine, medians, write_result
from workload import make, picture, question

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models import sampling
from dr2seg_lib.models.decoding import Decoder
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.sampling import choose_tokens, sampling_draws

SEED = 1000  # of the first answer
MOST_DIFFERENT = 0.03  # of the answers


class Lengths:
    "The drawn length of every answer, and the two functions by which the sampler obeys them."

    def __init__(self, args, eos: int):
        rng = np.random.default_rng(0)
        size = args.prompts * args.samples
        self.lengths = rng.integers(args.shortest, args.longest + 1, size).tolist()
        self.eos = eos

    def draws(self, seeds: list, R: int, T: int) -> torch.Tensor:  # [R,T]
        "As the library draws, with a 1 from each answer's last token on."
        draws = sampling_draws(seeds, R, T)
        for row, seed in zip(draws, seeds):
            row[self.lengths[seed - SEED] - 1 :] = 1.0
        return draws

    def choose(self, logits, temperature: float, draws) -> torch.Tensor:  # [L]
        "The end where the draw is 1; elsewhere as the library chooses, among all other tokens."
        others = logits.index_fill(1, torch.tensor([self.eos]), -torch.inf)
        return choose_tokens(others, temperature, draws).where(draws[:, 0] < 1, self.eos)


def keep_all(decoder: Decoder, slots: torch.Tensor):
    "Drops nobody."


def by_batches(policy: Policy, prefix, seeds: list, args) -> tuple[list, float]:
    "Batches of `at_once` answers, one after the other."
    owners = torch.arange(args.prompts).repeat_interleave(args.samples)
    answers, began = [], time.perf_counter()
    for first in range(0, len(seeds), args.at_once):
        some = slice(first, first + args.at_once)
        batch = prefix.rows(owners[some])
        out = policy.generate(batch, 1, args.longest, seed=seeds[some], at_once=0)
        answers += [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)]
    return answers, time.perf_counter() - began


def waiting(*work) -> tuple[list, float]:
    "Batches in which nobody leaves before the longest."
    with patch.object(Decoder, "keep", keep_all):
        return by_batches(*work)


def continuous(policy: Policy, prefix, seeds: list, args) -> tuple[list, float]:
    "All answers in one call, `at_once` under way."
    began = time.perf_counter()
    out = policy.generate(prefix, args.samples, args.longest, seed=seeds, at_once=args.at_once)
    answers = [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)]
    return answers, time.perf_counter() - began


WAYS = dict(continuous=continuous, dropping=by_batches, waiting=waiting)


def compare_answers(answers: dict, lengths: list) -> int:
    "How many answers are not the same in all ways; raises where that is more than rounding."
    for some in answers.values():
        assert [len(a) for a in some] == lengths
    different = sum(any(a != triple[0] for a in triple) for triple in zip(*answers.values()))
    assert different <= MOST_DIFFERENT * len(lengths), f"{different} answers differ"
    return different


def run(args) -> tuple[list, int, Lengths]:  # rows of seconds, answers that differ, lengths
    "All ways in turn; a first call of each warms up."
    model, processor = make(args.side)
    policy = Policy(model, processor, args.side)
    lengths = Lengths(args, policy.tokenizer.eos_token_id)
    seeds = list(range(SEED, SEED + len(lengths.lengths)))
    rows, different = [], 0
    functions = dict(sampling_draws=lengths.draws, choose_tokens=lengths.choose)
    with torch.no_grad(), patch.multiple(sampling, **functions):
        encoded = policy.encode([picture(args.side, k) for k in range(args.prompts)])
        texts = [dr2seg_prompt(question(k)) for k in range(args.prompts)]
        prefix = policy.prefill(texts, encoded)
        for _ in range(args.turns + 1):
            results = {name: way(policy, prefix, seeds, args) for name, way in WAYS.items()}
            answers = {name: some for name, (some, _) in results.items()}
            different = max(different, compare_answers(answers, lengths.lengths))
            rows.append({name: seconds for name, (_, seconds) in results.items()})
            print(rows[-1], flush=True)
    return rows[1:], different, lengths


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--at-once", type=int, default=16)
    p.add_argument("--shortest", type=int, default=16)
    p.add_argument("--longest", type=int, default=256)
    p.add_argument("--side", type=int, default=560, help="of the picture, pixels")
    p.add_argument("--turns", type=int, default=3, help="after one that warms up")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows, different, lengths = run(args)
    seconds, some = medians(rows), lengths.lengths
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "threads")}
    ratio = {k: round(seconds[k] / seconds["continuous"], 2) for k in ("dropping", "waiting")}
    result = dict(machine=machine("transformers"), shape=shape, tokens=sum(some), seconds=seconds)
    result |= dict(ratio=ratio, answers=len(some), answers_that_differ=different, rows=rows)
    write_result(args.out / "uneven.json", result)


if __name__ == "__main__":
    main()
