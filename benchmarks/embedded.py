"""A DR²Seg step on the embedded world with the engine and without it, stage by stage; and how fast rewards are.

    python benchmarks/embedded.py            # A B A B on the same questions, the same draws, so the same answers

Without the engine every answer reads its own prompt and its own picture: in both passes (transformers' `generate`), for the
reference and for the update (the model's own padded forward), as the public trainers do.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from against_trl import machine, medians
from transformers import LogitsProcessor

from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.models.policy import EncodedImage, Policy, resize_square
from dr2seg_lib.models.sampling import Completions, _draws
from dr2seg_lib.rollouts.two_stage import generate_rollouts
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import build_training_state, compute_rewards, train_step


class Drawn(LogitsProcessor):
    "Leaves the one token that the policy's own sampling would take."

    def __init__(self, draws, temperature, prompt):
        self.predict_mask, self.temperature, self.prompt = draws, temperature, prompt

    def __call__(self, ids, logits):
        t, reached = ids.shape[1] - self.prompt, (logits / self.temperature).softmax(-1).cumsum(-1)
        token = torch.searchsorted(
            reached, self.predict_mask[:, t : t + 1] * reached[:, -1:], right=True
        ).clamp(max=reached.shape[1] - 1)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)


class Asked:
    "Prompts that nobody has read yet."

    def __init__(self, texts, seen):
        self.texts, self.seen, self.start = texts, seen, torch.zeros(len(texts))

    def rows(self, index):
        return Asked([self.texts[i] for i in index], [self.seen[i] for i in index])

    def repeat(self, n):
        return self.rows([i for i in range(len(self.texts)) for _ in range(n)])


class Plain(Policy):
    "The same policy without the engine."

    def encode(self, images):
        batch = self.processor.image_processor(
            [resize_square(i, self.side) for i in images], do_resize=False, return_tensors="pt"
        )
        patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        return [
            EncodedImage(p[:: self.model.model.visual.spatial_merge_size**2], g, (p,))
            for p, g in zip(patches, batch["image_grid_thw"])
        ]

    def prefill(self, texts, seen, again=None, of=None):
        return Asked(texts, seen)

    def inputs(self, asked):
        ids, attention = self.tokenize(asked.texts, asked.seen)
        return dict(
            input_ids=ids,
            attention_mask=attention,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            pixel_values=torch.cat([s.deep[0] for s in asked.seen]),
            image_grid_thw=torch.stack([s.grid for s in asked.seen]),
        )

    @torch.no_grad()
    def generate(self, asked, n=1, max_new_tokens=256, temperature=1.0, seed=None):
        batch = self.inputs(asked.repeat(n))
        P, eos = batch["input_ids"].shape[1], self.tokenizer.eos_token_id
        out = self.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[
                Drawn(_draws(seed, len(batch["input_ids"]), max_new_tokens), temperature, P)
            ],
        )
        ids, logp = out.sequences[:, P:], torch.stack(out.logits, 1).float().log_softmax(-1)
        mask = (ids == eos).cumsum(1) - (ids == eos).int() == 0
        top = logp.exp().topk(2, -1).values
        return Completions(
            ids,
            mask,
            logp.gather(2, ids[..., None])[..., 0] * mask,
            -(logp.exp() * logp).nan_to_num().sum(-1),
            top[..., 0] - top[..., 1],
        )

    def logprobs(self, asked, ids, mask):
        batch = self.inputs(asked.repeat(len(ids) // len(asked.texts)))
        P = batch["input_ids"].shape[1]
        for name, tail in (
            ("input_ids", ids),
            ("attention_mask", mask.long()),
            ("mm_token_type_ids", torch.zeros_like(ids, dtype=torch.int)),
        ):
            batch[name] = torch.cat([batch[name], tail], 1)
        logits = self.model(**batch, use_cache=False).logits[:, P - 1 : -1].float()
        return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask


def steps(config, turns: int, count: int) -> dict:  # {engine: metrics rows}
    "The same first steps of a run, `turns` times by each, in turn."
    data, rows = load_data("mini", "train"), dict(engine=[], plain=[])
    for turn in range(turns):
        for name in rows:
            state = build_training_state(config)
            if name == "plain":
                state.policy.__class__ = Plain
            for step in range(1, count + 1):
                samples, _ = sample_batch(data, config, step)
                rows[name].append(train_step(state, samples, config, step)[0])
            print(f"turn {turn + 1}, {name}: {rows[name][-1]['seconds']}", flush=True)
    for a, b in zip(rows["engine"], rows["plain"]):  # the same work, or the comparison is none
        assert (
            abs(a["tokens"] - b["tokens"]) < 1e-6
            and abs(a["reward"] - b["reward"]) < 1e-6
            and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3
        ), (a, b)
    return rows


def rewards(config, repeats: int = 5) -> dict:  # {recipe: responses a CPU second}
    "Real answers to the first 16 training questions, rewarded again and again."
    samples, (policy, *_) = (
        sample_batch(load_data("mini", "train"), config, 1)[0],
        build_training_state(config),
    )
    out = {}
    for name in ("visionreasoner", "dr2seg", "seg_zero"):
        recipe = METHODS[name]
        rolled, taken = (
            generate_rollouts(
                policy,
                samples,
                recipe.prompt,
                recipe.second_prompt,
                config.rollout.group_size,
                config.rollout.max_new_tokens,
                seed=0,
            ),
            [],
        )
        for _ in range(repeats):
            began = time.process_time()
            compute_rewards(rolled, recipe, policy.frame)
            taken.append(time.process_time() - began)
        spoken = sum(len(g.first) + sum(r is not None for r in g.second) for g in rolled.groups)
        out[name] = round(spoken / min(taken))
    return out


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = p.parse_args()
    torch.set_num_threads(2)
    config = TrainConfig(prompts=args.prompts, samples=args.samples, eval_samples=0)
    rows = steps(config, args.turns, args.steps)
    seconds, here = (
        {name: medians([r["seconds"] for r in found]) for name, found in rows.items()},
        machine(),
    )
    torch.set_num_threads(1)
    result = dict(
        machine=here,
        shape=dict(prompts=args.prompts, samples=args.samples, steps=args.steps, turns=args.turns),
        tokens=rows["engine"][0]["tokens"],
        seconds=seconds,
        ratio={
            k: round(seconds["plain"][k] / v, 2) for k, v in seconds["engine"].items() if v > 0.005
        },
        rewards_per_core_second=rewards(config),
    )
    args.out.mkdir(exist_ok=True)
    (args.out / "embedded.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
