"""TRL's GRPOTrainer on the same work, with timers around its own stages."""

import time

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import KL, LR, RANK, make, picture, question

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.chat import SYSTEM
from dr2seg_lib.models.lora import lora_target_regex
from dr2seg_lib.rollouts.two_stage import StageTimer


def second_prompts(inputs: list) -> list:  # chats
    "What a user of TRL would write for the second pass: a full prompt for every description."
    chats = []
    for i, row in enumerate(inputs):
        text = visionreasoner_prompt(question(i, 12))
        user = [dict(type="image", image=row["image"]), dict(type="text", text=text)]
        system = [dict(type="text", text=SYSTEM)]
        chats.append([dict(role="system", content=system), dict(role="user", content=user)])
    return chats


def random_rewards(completions, **_):
    "The weights are random, and so are the rewards."
    return np.random.randn(len(completions)).tolist()


class Timed(GRPOTrainer):
    "The trainer with a second pass, if asked for, and timers."

    two_stage, timer = False, StageTimer()

    def _generate(self, prompts):
        with self.timer("generation"):
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.two_stage:
            with self.timer("second"):
                tokens = self._tokenize_prompts(second_prompts(inputs))
                self._generate_single_turn(*tokens, 1)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(self, *a, **k):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*a, **k)
        with self.timer("reference"):
            return super()._get_per_token_logps_and_entropies(*a, **k)


class Steps(TrainerCallback):
    "Notes the seconds of each step by stage; the update is what no timer covers."

    def __init__(self):
        self.rows = []

    def on_step_begin(self, *_, **__):
        Timed.timer.clear()
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        total = time.perf_counter() - self.began
        self.rows.append(dict(Timed.timer, update=total - sum(Timed.timer.values()), step=total))


def data_rows(args) -> list[dict]:
    "The questions with their pictures, as TRL takes them."
    rows = []
    for k in range(args.prompts):
        system = dict(role="system", content=SYSTEM)
        user = dict(role="user", content=dr2seg_prompt(question(k)))
        image = Image.fromarray(picture(args.side, k))
        rows.append(dict(prompt=[system, user], image=image))
    return rows


def trl_config(args) -> GRPOConfig:
    "The same step in TRL's words."
    total = args.prompts * args.samples
    rows = args.rows or total
    return GRPOConfig(
        output_dir="/tmp/trl_out",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=total // rows,
        num_generations=args.samples,
        max_completion_length=args.answer,
        temperature=1.0,
        generation_kwargs=dict(min_new_tokens=args.answer),
        beta=KL,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        shuffle_dataset=False,
    )


class Theirs:
    "TRL, as `Ours`."

    def __init__(self, args):
        model, processor = make(args.side)
        self.steps = Steps()
        self.trainer = Timed(
            model,
            random_rewards,
            trl_config(args),
            Dataset.from_list(data_rows(args) * args.steps),
            processing_class=processor,
            callbacks=[self.steps],
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=lora_target_regex()),
        )

    def turn(self, two_stage: bool, steps: int) -> list[dict]:
        "Seconds by stage of that many steps, `args.steps`."
        Timed.two_stage, self.steps.rows = two_stage, []
        self.trainer.train()
        return self.steps.rows
