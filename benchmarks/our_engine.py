"""The workbench's own step on random weights, from its own parts."""

from contextlib import ExitStack

import torch
from accelerate import Accelerator
from workload import KL, LR, RANK, NoEnd, make, picture, question

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rollouts.parsing import Parsed
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.rollouts.two_stage import Rollouts, StageTimer, second_pass
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.update import update_policy


def ours_config(args) -> TrainConfig:
    "The step in the workbench's words."
    runtime = dict(max_tokens=args.max_tokens) if args.max_tokens else {}
    return TrainConfig(
        rollout=dict(questions_per_step=args.prompts, group_size=args.samples),
        optim=dict(kl=KL),
        runtime=runtime,
    )


class Ours:
    "A policy with its optimizer; rewards are random, as are the weights."

    def __init__(self, args, **options):  # options: for `make`
        model, processor = make(args.side, **options)
        self.policy = Policy(model, processor, args.side).add_lora(RANK, RANK)
        self.policy.tokenizer = NoEnd(self.policy.tokenizer)
        self.accelerator, self.args = Accelerator(cpu=model.device.type == "cpu"), args
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW([p for _, p in self.policy.trainable()], lr=LR)
        )
        self.config = ours_config(args)

    def describe(self) -> list:  # of args.prompts lists of args.samples Response
        "First passes whose descriptions are all different."
        a, groups = self.args, []
        for b in range(a.prompts):
            texts = [question(b * a.samples + i, 12) for i in range(a.samples)]
            groups.append([Response("", Parsed("", d, ""), [], [], [], 0) for d in texts])
        return groups

    def sample(self, two_stage: bool, timer: StageTimer) -> Rollouts:
        "Both passes, the adapter merged as in training."
        a, policy = self.args, self.policy
        images = [picture(a.side, k) for k in range(a.prompts)]
        texts = [dr2seg_prompt(question(k)) for k in range(a.prompts)]
        with torch.no_grad(), ExitStack() as stack:
            with timer("generation"):
                stack.enter_context(policy.merged_adapter())
                encoded = policy.encode(images)
                prefix = policy.prefill(texts, encoded)
                completions = policy.generate(prefix, a.samples, a.answer)
            if two_stage:
                with timer("second"):
                    inputs = policy, encoded, prefix, self.describe(), visionreasoner_prompt
                    second_pass(*inputs, a.answer, 1.0, None)
        assert completions.mask.all()
        assert completions.ids.shape[1] == a.answer
        return Rollouts([], texts, encoded, completions)

    def step(self, two_stage: bool) -> dict:  # seconds by stage
        "Sample, then update."
        timer, a = StageTimer(), self.args
        rollouts = self.sample(two_stage, timer)
        trainer = self.policy, self.optimizer, self.accelerator
        update_policy(*trainer, rollouts, torch.randn(a.prompts, a.samples), self.config, timer)
        return dict(timer, step=sum(timer.values()))

    def turn(self, two_stage: bool, steps: int) -> list[dict]:
        "Seconds by stage of that many steps."
        return [self.step(two_stage) for _ in range(steps)]
