"""Reference and update beside PrefixGrouper's, on the same model and the same batch.

    pip install prefix-grouper
    python benchmarks/against_prefix_grouper.py

Both get the same questions about encoded images, the same answers and the same LoRA adapter. They
return the log-probability of every answer token: without gradients and adapter (the reference),
with gradients (the update's forward), and go back through it. The vision tower is not timed: the
package knows nothing of images. The log-probabilities must agree to 1e-4, and so must the adapter's
gradients, relative to the largest.

What had to be adapted for PrefixGrouper (0.0.1):

- Its attention for transformers hands a padding mask to FlashAttention, which needs a GPU. Here the
  same split runs on torch's `scaled_dot_product_attention`, by `PrefixGrouper.forward`: the prompt
  with `is_causal`, the answers behind copies of their prompt with a causal mask of their own, made
  once a batch and not once a layer.
- The model is called below the vision tower: `inputs_embeds` with the image's tokens in their
  place, and Qwen2.5-VL's three-dimensional positions, those of the answers going on behind their
  prompt's largest. `concat_input` puts both in its packed rows.
- Prompts have one length here, so that its prompts need no padding.
- The adapter's layers are peft's own on its side, as its users have them; ours are fused in the
  update, as in training.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import RESULTS, machine, medians, write_result
from prefix_grouper import PrefixGrouper
from transformers import AttentionInterface
from workload import RANK, make, picture, question

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.prefill import embed_prompts

CLOSE = 1e-4


def answer_mask(grouper: PrefixGrouper) -> torch.Tensor:  # [R,1,T,P+T] added to the scores
    "What each answer's tokens may look at: their whole prompt, and themselves up to now."
    keys = grouper.suffix_attn_mask
    T = grouper.suffix_x_shape[1]
    own = torch.ones(T, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - T)
    allowed = keys[:, None, None] & own
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def sdpa(q, k, v, mask, scale: float, behind: torch.Tensor):  # -> [B,L,H,d]
    "The attention function that PrefixGrouper calls twice: for the prompts, for the answers."
    whole = q.shape[2] == k.shape[2]
    mask = None if whole else behind
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    options = dict(attn_mask=mask, is_causal=whole, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def grouped_attention(module, query, key, value, mask, *, grouper, behind, scaling, **_):
    "An attention function of transformers."
    out = grouper.forward(sdpa, query, key, value, scale=scaling, behind=behind)
    return out, None


AttentionInterface.register("grouped", grouped_attention)


class Grouped:
    "A batch in PrefixGrouper's packed rows."

    def __init__(self, policy: Policy, texts: list, encoded: list, ids, mask):
        self.policy, self.ids, self.mask = policy, ids, mask
        model, G = policy.model, len(ids) // len(texts)
        tokens, attention, is_image = policy.prompt_ids(texts, encoded)
        assert attention.all(), "prompts of one length"
        masks = attention.bool(), mask
        self.grouper = PrefixGrouper.from_ungrouped_masks(*masks, G)
        self.behind = answer_mask(self.grouper)
        with torch.no_grad():
            prompt, positions = embed_prompts(model, tokens, attention, is_image, encoded)
            answers = model.get_input_embeddings()(ids)
        start = positions.amax((0, 2)).repeat_interleave(G) + 1
        later = start[:, None] + torch.arange(ids.shape[1])
        self.embeds = self.pack(prompt, answers, masks)
        later = later[..., None].expand(-1, -1, 3)
        self.positions = self.pack(positions.permute(1, 2, 0), later, masks).permute(2, 0, 1)

    def pack(self, prompt, answers, masks: tuple):
        "Values of prompts [B,P,...] and answers [R,T,...] in rows of one prompt and its answers."
        return self.grouper.concat_input(prompt, masks[0], answers, masks[1])

    def logprobs(self) -> torch.Tensor:  # [R,T], 0 on padding
        "One forward over the packed rows."
        core = self.policy.model.model.language_model
        hidden = core(
            inputs_embeds=self.embeds,
            position_ids=self.positions,
            attention_mask=self.embeds.new_zeros(1, 1, 1, 1),  # PrefixGrouper has its own
            use_cache=False,
            grouper=self.grouper,
            behind=self.behind,
        ).last_hidden_state
        answers = self.grouper.split_output(hidden, include_prefix_last=1)[2][:, :-1]
        logp = self.policy.model.lm_head(answers).float().log_softmax(-1)
        return logp.gather(2, self.ids[..., None])[..., 0] * self.mask


class Packed:
    "The same batch in this workbench's tree."

    def __init__(self, policy: Policy, texts: list, encoded: list, ids, mask):
        self.policy, self.batch = policy, (texts, encoded, ids, mask)

    def logprobs(self) -> torch.Tensor:  # [R,T], 0 on padding
        "Prompts, then answers behind them."
        texts, encoded, ids, mask = self.batch
        return self.policy.logprobs(self.policy.prefill(texts, encoded), ids, mask)


def gradients(policy: Policy) -> torch.Tensor:
    "The adapter's gradients in a row; they are forgotten."
    row = torch.cat([p.grad.flatten() for _, p in policy.trainable()])
    for _, p in policy.trainable():
        p.grad = None
    return row


class Engine:
    "One of both, with the attention that it needs."

    def __init__(self, name: str, policy: Policy, batch: tuple):
        self.name, self.policy = name, policy
        self.forward = (Packed if name == "ours" else Grouped)(policy, *batch)

    def use(self):
        "Sets the language model's attention."
        kind = "tree_sdpa" if self.name == "ours" else "grouped"
        self.policy.model.model.language_model.set_attn_implementation(kind)

    def step(self, weights: torch.Tensor) -> tuple:  # seconds; log-probabilities, gradients
        "Reference, update's forward, backward."
        self.use()
        times = [time.perf_counter()]
        with self.policy.reference():
            reference = self.forward.logprobs()
        times.append(time.perf_counter())
        if self.name == "ours":
            with self.policy.fused_adapter():
                logp = self.forward.logprobs()
        else:
            logp = self.forward.logprobs()
        times.append(time.perf_counter())
        (logp * weights).sum().backward()
        times.append(time.perf_counter())
        names = "reference", "forward", "backward"
        seconds = {k: b - a for k, a, b in zip(names, times, times[1:])}
        seconds |= dict(forward_and_backward=times[3] - times[1], both=times[3] - times[0])
        return seconds, (reference, logp.detach(), gradients(self.policy))


def draw_batch(args, policy: Policy) -> tuple:  # texts, encoded images, ids, mask
    "Questions of one length, and random answers of `--shortest` to `--answer` tokens."
    texts = [dr2seg_prompt(question(0)) for _ in range(args.prompts)]
    encoded = policy.encode([picture(args.side, k) for k in range(args.prompts)])
    rows = args.prompts * args.samples
    ids = torch.randint(20, policy.model.config.text_config.vocab_size, (rows, args.answer))
    lengths = torch.randint(args.shortest, args.answer + 1, (rows,))
    lengths[0] = args.answer
    mask = torch.arange(args.answer) < lengths[:, None]
    return texts, encoded, ids.where(mask, policy.tokenizer.pad_token_id), mask


def require_close(ours: tuple, theirs: tuple) -> dict:
    "The largest differences; log-probabilities and gradients of both are the same."
    names = "reference", "forward", "gradients"
    largest = (1, 1, ours[2].abs().max())
    pairs = zip(names, ours, theirs, largest)
    off = {k: ((a - b).abs().max() / scale).item() for k, a, b, scale in pairs}
    assert max(off.values()) < CLOSE, off
    return off


def run(args) -> tuple[dict, dict]:  # rows of each; largest differences
    "Both in turn; a first step of each warms up."
    torch.manual_seed(0)
    model, processor = make(args.side)
    policy = Policy(model, processor, args.side).add_lora(RANK, RANK)
    for name, p in policy.trainable():  # an adapter that does something
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    batch = draw_batch(args, policy)
    weights, rows = torch.randn(batch[3].shape) * batch[3], {}
    engines = [Engine(name, policy, batch) for name in ("ours", "prefix_grouper")]
    for turn in range(args.turns + 1):
        results = [engine.step(weights) for engine in engines]
        off = require_close(*[values for _, values in results])
        for engine, (seconds, _) in zip(engines, results):
            rows.setdefault(engine.name, []).extend([seconds] if turn else [])
            print(f"turn {turn}, {engine.name}: {seconds}", flush=True)
    return rows, off


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prompts", type=int, default=2)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--answer", type=int, default=64, help="tokens of the longest answer")
    p.add_argument("--shortest", type=int, default=64, help="tokens of the shortest answer")
    p.add_argument("--side", type=int, default=840, help="of the picture, pixels")
    p.add_argument("--turns", type=int, default=4, help="after one that warms up")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows, off = run(args)
    seconds = {name: medians(some) for name, some in rows.items()}
    ours, theirs = seconds["ours"], seconds["prefix_grouper"]
    ratio = {k: round(theirs[k] / v, 2) for k, v in ours.items()}
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "threads")}
    here = machine("transformers", "peft", "prefix-grouper")
    result = dict(machine=here, shape=shape, image_tokens=(args.side // 28) ** 2)
    result |= dict(seconds=seconds, ratio=ratio, largest_difference=off, rows=rows)
    write_result(args.out / "prefix_grouper.json", result)


if __name__ == "__main__":
    main()
