"""A DR²Seg step on the embedded world with the engine and without it; and how fast rewards are.

    python benchmarks/embedded.py    # A B A B on the same questions, the same draws: same answers

Without the engine every answer goes over its own prompt and its own picture: in both passes
(transformers' `generate`), for the reference and for the update (the model's own padded forward),
as the public trainers do.
"""

import argparse
import time
from pathlib import Path

import torch
from measuring import RESULTS, machine, medians, write_result
from transformers import LogitsProcessor

from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.sampling import Completions, choose_tokens, sampling_draws
from dr2seg_lib.models.vision import EncodedImage, resize_square
from dr2seg_lib.rollouts.two_stage import generate_rollouts
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import build_training_state, compute_rewards, train_step


class SameDraws(LogitsProcessor):
    "Leaves the one token that the policy's own sampling would take."

    def __init__(self, draws, temperature, prompt):  # prompt: its columns
        self.draws, self.temperature, self.prompt = draws, temperature, prompt

    def __call__(self, ids, logits):
        t = ids.shape[1] - self.prompt
        token = choose_tokens(logits, self.temperature, self.draws[:, t : t + 1])
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)


class Prompts:
    "Prompts that no model has gone over yet."

    def __init__(self, texts, encoded):
        self.texts, self.encoded, self.start = texts, encoded, torch.zeros(len(texts))

    def rows(self, index):
        return Prompts([self.texts[i] for i in index], [self.encoded[i] for i in index])

    def repeat(self, group_size):
        return self.rows(torch.arange(len(self.texts)).repeat_interleave(group_size))


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

    def prefill(self, texts, encoded, prefix=None, rows=None):
        return Prompts(texts, encoded)

    def inputs(self, prompts):
        ids, attention = self.tokenize(prompts.texts, prompts.encoded)
        return dict(
            input_ids=ids,
            attention_mask=attention,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            pixel_values=torch.cat([e.deep[0] for e in prompts.encoded]),
            image_grid_thw=torch.stack([e.grid for e in prompts.encoded]),
        )

    @torch.no_grad()
    def generate(self, prompts, group_size=1, max_new_tokens=256, temperature=1.0, seed=None):
        batch = self.inputs(prompts.repeat(group_size))
        (R, P), eos = batch["input_ids"].shape, self.tokenizer.eos_token_id
        draws = sampling_draws(seed, R, max_new_tokens)
        out = self.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[SameDraws(draws, temperature, P)],
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

    def logprobs(self, prompts, ids, mask):
        batch = self.inputs(prompts.repeat(len(ids) // len(prompts.texts)))
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
        assert abs(a["tokens"] - b["tokens"]) < 1e-6, (a, b)
        assert abs(a["reward"] - b["reward"]) < 1e-6, (a, b)
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3, (a, b)
    return rows


def reward_rates(config, repeats: int = 5) -> dict:  # {method: responses a CPU second}
    "Real answers to the first training questions, rewarded again and again."
    samples, _ = sample_batch(load_data("mini", "train"), config, 1)
    policy, sizes = build_training_state(config).policy, config.rollout
    limits, rates = (sizes.group_size, sizes.max_new_tokens), {}
    for name in ("visionreasoner", "dr2seg", "seg_zero"):
        method, seconds = METHODS[name], []
        prompts = method.prompt, method.second_prompt
        rollouts = generate_rollouts(policy, samples, *prompts, *limits, seed=0)
        for _ in range(repeats):
            began = time.process_time()
            compute_rewards(rollouts, method, policy.frame)
            seconds.append(time.process_time() - began)
        second = [[r for r in g.second if r is not None] for g in rollouts.groups]
        responses = sum(len(g.first) + len(rest) for g, rest in zip(rollouts.groups, second))
        rates[name] = round(responses / min(seconds))
    return rates


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    torch.set_num_threads(2)
    config = TrainConfig(
        rollout=dict(questions_per_step=args.prompts, group_size=args.samples),
        evaluation=dict(samples=0),
    )
    rows = steps(config, args.turns, args.steps)
    seconds = {name: medians([r["seconds"] for r in part]) for name, part in rows.items()}
    here, engine = machine(), seconds["engine"]
    torch.set_num_threads(1)
    result = dict(
        machine=here,
        shape=dict(prompts=args.prompts, samples=args.samples, steps=args.steps, turns=args.turns),
        tokens=rows["engine"][0]["tokens"],
        seconds=seconds,
        ratio={k: round(seconds["plain"][k] / v, 2) for k, v in engine.items() if v > 0.005},
        rewards_per_core_second=reward_rates(config),
    )
    write_result(args.out / "embedded.json", result)


if __name__ == "__main__":
    main()
