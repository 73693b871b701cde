"""One GRPO step by this workbench and by TRL's GRPOTrainer: the same random weights, the same work.

    pip install -e ".[bench]"
    python benchmarks/against_trl.py             # A B A B, one stage and two
    python benchmarks/against_trl.py --growth    # one factor at a time, with a plot
    python benchmarks/against_trl.py --memory    # peak memory of a two-stage step

Both sides: fp32, LoRA r = 64 on the same modules, KL on, temperature 1, answers of exactly
`--answer` tokens. In a two-stage step both ask again about as many descriptions as there are
answers, all different (our worst case).
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.chat import SYSTEM
from dr2seg_lib.models.lora import lora_target_regex
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.pretraining.tokenizer import CHAT_TEMPLATE, make_tokenizer
from dr2seg_lib.rollouts.parsing import Parsed
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.rollouts.two_stage import Rollouts, StageTimer, second_pass
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.update import update_policy

KL, RANK, LR = 5e-3, 64, 1e-6
WORDS = ("the", "red", "ball", "at", "the", "left", "of", "a", "small", "blue", "star")


SMALL = dict(
    text=dict(
        vocab_size=640,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        mrope_section=[8, 12, 12],
    ),
    vision=dict(
        depth=3, hidden_size=192, num_heads=4, intermediate_size=576, fullatt_block_indexes=[2]
    ),
    tied=True,
)  # the vision tower does about a third of the work, as in the 7B


def make(side: int, seed: int = 0, size: dict = SMALL, device: str = "cpu", dtype=torch.float32):
    "Model and processor for side x side pictures; the weights are drawn where they stay."
    tokenizer = make_tokenizer()
    names = dict(image="image_pad", video="video_pad")
    names |= dict(vision_start="vision_start", vision_end="vision_end")
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}
    text = {k: v for k, v in size["text"].items() if k != "mrope_section"} | dict(
        max_position_embeddings=8192,
        tie_word_embeddings=size["tied"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6, mrope_section=size["text"]["mrope_section"]
        ),
    )
    vision = size["vision"] | dict(patch_size=14, out_hidden_size=text["hidden_size"])
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=size["tied"], **ids
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    size = dict(size=dict(shortest_edge=side**2, longest_edge=side**2))
    return model, Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def picture(side: int, k: int):
    return np.random.default_rng(k).integers(0, 255, (side, side, 3), dtype=np.uint8)


def question(k: int, words: int = 90):
    return " ".join(WORDS[(i + k) % len(WORDS)] for i in range(words))


class NoEnd:
    "A tokenizer whose end-of-turn token is never met, so that every answer has its full length."

    eos_token_id = -1

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)


class Ours:
    "The workbench's own step, from its own parts; rewards are random, as are the weights."

    def __init__(self, args, **options):  # options: for `make`
        model, processor = make(args.side, **options)
        self.policy = Policy(model, processor, args.side).add_lora(RANK, RANK)
        self.policy.tokenizer = NoEnd(self.policy.tokenizer)
        from accelerate import Accelerator

        self.accelerator, self.args = Accelerator(cpu=model.device.type == "cpu"), args
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW([p for _, p in self.policy.trainable()], lr=LR)
        )
        self.config = TrainConfig(
            rollout=dict(questions_per_step=args.prompts, group_size=args.samples),
            optim=dict(kl=KL),
        )

    def describe(self) -> list:  # of args.prompts lists of args.samples Response
        "First passes whose descriptions are all different."
        a, groups = self.args, []
        for b in range(a.prompts):
            texts = [question(b * a.samples + i, 12) for i in range(a.samples)]
            groups.append([Response("", Parsed("", d, ""), [], [], [], 0) for d in texts])
        return groups

    def step(self, two_stage: bool) -> dict:  # seconds by stage
        timer, a, policy = StageTimer(), self.args, self.policy
        images = [picture(a.side, k) for k in range(a.prompts)]
        texts = [dr2seg_prompt(question(k)) for k in range(a.prompts)]
        with torch.no_grad(), timer("generation"):
            encoded = policy.encode(images)
            prefix = policy.prefill(texts, encoded)
            completions = policy.generate(prefix, a.samples, a.answer)
        if two_stage:
            with torch.no_grad(), timer("second"):
                inputs = policy, encoded, prefix, self.describe(), visionreasoner_prompt
                second_pass(*inputs, a.answer, 1.0, None)
        assert completions.mask.all()
        assert completions.ids.shape[1] == a.answer
        rollouts = Rollouts([], texts, encoded, completions)
        trainer = policy, self.optimizer, self.accelerator
        update_policy(*trainer, rollouts, torch.randn(a.prompts, a.samples), self.config, timer)
        return dict(timer, step=sum(timer.values()))


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
    return np.random.randn(len(completions)).tolist()


def trl_trainer(args):
    "TRL's trainer with timers around its own stages."
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        two_stage, timer = False, StageTimer()

        def _generate(self, prompts):
            with self.timer("generation"):
                return super()._generate(prompts)

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            if self.two_stage:
                with self.timer("second"):
                    prompts = self._tokenize_prompts(second_prompts(inputs))
                    self._generate_single_turn(*prompts, 1)
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        def _get_per_token_logps_and_entropies(self, *a, **k):
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*a, **k)
            with self.timer("reference"):
                return super()._get_per_token_logps_and_entropies(*a, **k)

    class Steps(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_step_begin(self, *_, **__):
            Timed.timer.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            total = time.perf_counter() - self.began
            self.rows.append(
                dict(Timed.timer, update=total - sum(Timed.timer.values()), step=total)
            )

    model, processor = make(args.side)
    rows = [
        dict(
            prompt=[
                dict(role="system", content=SYSTEM),
                dict(role="user", content=dr2seg_prompt(question(k))),
            ],
            image=Image.fromarray(picture(args.side, k)),
        )
        for k in range(args.prompts)
    ]
    steps, rows_a_step = Steps(), args.prompts * args.samples
    config = GRPOConfig(
        output_dir="/tmp/trl_out",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=rows_a_step,
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
    trainer = Timed(
        model,
        random_rewards,
        config,
        Dataset.from_list(rows * args.steps),
        processing_class=processor,
        callbacks=[steps],
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=lora_target_regex()),
    )
    return trainer, steps


class Theirs:
    def __init__(self, args):
        self.trainer, self.steps = trl_trainer(args)

    def run(self, two_stage: bool) -> list[dict]:
        type(self.trainer).two_stage, self.steps.rows = two_stage, []
        self.trainer.train()
        return self.steps.rows


def measure(args, stages: tuple, ours: bool = True, theirs: bool = True) -> dict:
    "Rows of seconds, engine by engine, in turn; the first step of each turn warms up."
    engines = dict(ours=Ours(args) if ours else None, trl=Theirs(args) if theirs else None)
    out = {}
    for turn in range(args.turns):
        for two_stage in stages:
            stage = out.setdefault("two-stage" if two_stage else "one-stage", {})
            for name, engine in engines.items():
                if engine is None:
                    continue
                if name == "trl":
                    rows = engine.run(two_stage)
                else:
                    rows = [engine.step(two_stage) for _ in range(args.steps)]
                stage.setdefault(name, []).extend(rows[1:])
                stages_word = "two stages" if two_stage else "one stage"
                print(f"turn {turn + 1}, {stages_word}, {name}: {rows[-1]}", flush=True)
    return out


def medians(rows: list[dict]) -> dict:
    return {k: round(float(np.median([r[k] for r in rows])), 3) for k in rows[0]}


def summary(measured: dict) -> dict:
    "Median seconds and how many times slower TRL is."
    out = {}
    for stage, engines in measured.items():
        out[stage] = {name: medians(rows) for name, rows in engines.items()}
        if len(engines) == 2:
            out[stage]["ratio"] = {
                k: round(out[stage]["trl"][k] / v, 2)
                for k, v in out[stage]["ours"].items()
                if k in out[stage]["trl"]
            }
    return out


def full_rate() -> float:  # operations a second
    "The machine's rate at a large matrix product."
    a = torch.randn(2048, 2048)
    for _ in range(3):
        a @ a
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 2048**3 / (time.perf_counter() - began)


def floor(args, two_stage: bool) -> dict:  # seconds by stage
    """The least arithmetic of our step, were every product done once at the machine's full rate.

    Frozen weights need no gradient, so a backward is one more forward.
    """
    model, _ = make(args.side)

    def count(m):
        return sum(p.numel() for n, p in m.named_parameters() if p.ndim == 2 and "embed" not in n)

    core, t = model.model.language_model, model.config.text_config
    image, text = (args.side // 28) ** 2, 12 + 90

    def forward(rows, new, past):
        attention = 4 * t.num_hidden_layers * t.hidden_size * new * (past + new / 2)
        return rows * (2 * count(core) * new + attention)

    R = args.prompts * args.samples
    head = R * args.answer * t.vocab_size * t.hidden_size * 2
    vision = args.prompts * 2 * count(model.model.visual) * image * 4
    scoring = forward(args.prompts, image + text, 0) + forward(R, args.answer, image + text) + head
    work = dict(generation=vision + scoring, reference=scoring, update=2 * scoring)
    if two_stage:
        work["second"] = forward(R, 24, image) + forward(R, args.answer, image + 24) + head
    work["step"], rate = sum(work.values()), full_rate()
    return {k: round(v / rate, 2) for k, v in work.items()} | dict(gflops=round(rate / 1e9))


def lines_of(path: str, start: str) -> list[str]:
    "The lines of a file that begin with a word."
    with open(path) as file:
        return [line for line in file if line.startswith(start)]


def machine(*packages: str) -> dict:
    names = [line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo", "model name")]
    cpu = names[0] if names else platform.processor()
    here = dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__)
    return here | {p: version(p) for p in packages}


def high_water() -> int:  # KiB; getrusage would give a child its parent's peak
    return int(lines_of("/proc/self/status", "VmHWM")[0].split()[1])


def peak(name: str, args) -> float:  # MiB
    "Peak memory of a process that runs one engine's two-stage steps, above one that builds it."

    def run(steps):
        command = [sys.executable, __file__, "--only", name, "--steps", str(steps)]
        for option in ("side", "prompts", "samples", "answer"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    return round((run(2) - run(0)) / 1024, 1)


def growth(args) -> list[dict]:
    "One factor at a time, both engines, one stage."
    cases = [
        ("answers a prompt", "samples", (2, 4, 8, 16, 32)),
        ("image tokens", "side", (280, 560, 840, 1400)),
        ("tokens an answer", "answer", (16, 64, 256)),
    ]
    out, small = [], dict(prompts=1, steps=2, turns=1, side=560, answer=32)
    for title, field, values in cases:
        for value in values:
            case = argparse.Namespace(**vars(args) | small | {field: value})
            figures = summary(measure(case, (False,)))["one-stage"]
            shown = (value // 28) ** 2 if field == "side" else value
            row = dict(factor=title, value=shown, ours=figures["ours"], trl=figures["trl"])
            out.append(row | dict(ratio=figures["ratio"]["step"]))
    return out


def draw_factor(ax, rows: list[dict], colours: dict):
    "Both engines over the values of one factor."
    values = [r["value"] for r in rows]
    for name, label in dict(trl="TRL", ours="this workbench").items():
        seconds = [r[name]["step"] for r in rows]
        ax.plot(values, seconds, "o-", color=colours[name], label=label)
    for r in rows:
        place = dict(xytext=(0, 7), textcoords="offset points", ha="center")
        ax.annotate(f"{r['ratio']:.1f}×", (r["value"], r["trl"]["step"]), **place)
    ax.set(xscale="log", yscale="log", xlabel=rows[0]["factor"])
    ax.minorticks_off()
    ax.margins(x=0.12, y=0.12)
    ax.set_xticks(values, map(str, values))


def draw(rows: list[dict], path: Path):
    "Seconds a step over each factor."
    import matplotlib.pyplot as plt

    colours = dict(trl="#8a8f98", ours="#3b6fd4")
    factors = list(dict.fromkeys(r["factor"] for r in rows))
    size = (3.3 * len(factors), 3)
    fig, axes = plt.subplots(1, len(factors), figsize=size, layout="constrained", sharey=True)
    for ax, factor in zip(axes, factors):
        draw_factor(ax, [r for r in rows if r["factor"] == factor], colours)
    axes[0].set_yticks([1, 10, 100], ["1", "10", "100"])
    axes[0].set_title("seconds a step")
    axes[0].legend(loc="upper left", labelcolor="linecolor", frameon=False)
    fig.savefig(path, dpi=150)


def parse_arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prompts", type=int, default=2)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--answer", type=int, default=64)
    p.add_argument(
        "--side", type=int, default=840, help="of the picture: (side / 28)^2 image tokens"
    )
    p.add_argument("--steps", type=int, default=2, help="a turn, the first of which warms up")
    p.add_argument("--turns", type=int, default=2)
    p.add_argument(
        "--memory", action="store_true", help="peak memory, each engine in a process of its own"
    )
    p.add_argument("--growth", action="store_true")
    p.add_argument("--only", choices=("ours", "trl"))
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return p.parse_args()


def run_alone(args):
    "One engine in this process; its peak memory is printed."
    if args.steps:
        args.turns = 1
        measure(args, (True,), args.only == "ours", args.only == "trl")
    else:
        args.steps = 1
        Ours(args) if args.only == "ours" else Theirs(args)
    print(high_water())


def write_result(path: Path, result: dict):
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


def main():
    args = parse_arguments()
    torch.set_num_threads(2)
    if args.only:
        return run_alone(args)
    args.out.mkdir(exist_ok=True)
    fields = "prompts", "samples", "answer", "side", "steps", "turns"
    result = dict(machine=machine("transformers", "trl"))
    shape = {k: getattr(args, k) for k in fields}
    if args.growth:
        rows = growth(args)
        draw(rows, args.out / "growth.png")
        write_result(args.out / "growth.json", result | dict(rows=rows))
    elif args.memory:
        peaks = {name: peak(name, args) for name in ("ours", "trl")}
        ratio = round(peaks["trl"] / peaks["ours"], 2)
        result |= dict(shape=shape, peak_mib=peaks, ratio=ratio)
        write_result(args.out / "memory.json", result)
    else:
        rows = measure(args, (False, True))
        floors = {"one-stage": floor(args, False), "two-stage": floor(args, True)}
        result |= dict(shape=shape, image_tokens=(args.side // 28) ** 2)
        result |= dict(seconds=summary(rows), floor=floors, rows=rows)
        write_result(args.out / "against_trl.json", result)


if __name__ == "__main__":
    main()
