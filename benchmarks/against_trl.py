"""One GRPO step by this workbench and by TRL's GRPOTrainer, on the same random-weight Qwen2.5-VL and the same work.

    pip install -e ".[bench]" && python benchmarks/against_trl.py            # A B A B, one stage and two
    python benchmarks/against_trl.py --growth                                 # one factor at a time, with a plot
    python benchmarks/against_trl.py --memory                                 # peak memory of a two-stage step

Both sides: fp32, LoRA r = 64 on the same modules, KL on, temperature 1, answers of exactly `--answer` tokens. In a
two-stage step both ask again about as many descriptions as there are answers, all different (our worst case).
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
from dr2seg_lib.models.policy import Policy, lora_target_regex
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
    "Model and processor for side x side pictures: (side / 28)^2 image tokens; the weights are drawn where they stay."
    tokenizer = make_tokenizer()
    ids = {
        f"{k}_token_id": tokenizer.convert_tokens_to_ids(v)
        for k, v in dict(
            image="<|image_pad|>",
            video="<|video_pad|>",
            vision_start="<|vision_start|>",
            vision_end="<|vision_end|>",
        ).items()
    }
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
    "The workbench's own step, from its own parts; rewards are drawn, since random weights earn none."

    def __init__(self, args, **made):  # made: for `make`
        model, processor = make(args.side, **made)
        self.policy = Policy(model, processor, args.side).add_lora(RANK, RANK)
        self.policy.tokenizer = NoEnd(self.policy.tokenizer)
        from accelerate import Accelerator

        self.accelerator, self.args = Accelerator(cpu=model.device.type == "cpu"), args
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW([p for _, p in self.policy.trainable()], lr=LR)
        )
        self.config = TrainConfig(
            prompts=args.prompts,
            samples=args.samples,
            kl=KL,
            chunk=getattr(args, "chunk", args.prompts),
        )

    def step(self, two_stage: bool) -> dict:
        clock, a, policy = StageTimer(), self.args, self.policy
        images, texts = (
            [picture(a.side, k) for k in range(a.prompts)],
            [dr2seg_prompt(question(k)) for k in range(a.prompts)],
        )
        with torch.no_grad(), clock("generation"):
            seen = policy.encode(images)
            prefix = policy.prefill(texts, seen)
            done = policy.generate(prefix, a.samples, a.answer)
        if two_stage:
            with torch.no_grad(), clock("second"):

                def said(d):
                    return Response("", Parsed("", d, ""), [], [], [], 0)

                first = [
                    [said(question(b * a.samples + i, 12)) for i in range(a.samples)]
                    for b in range(a.prompts)
                ]
                second_pass(policy, seen, prefix, first, visionreasoner_prompt, a.answer, 1.0, None)
        assert done.mask.all() and done.ids.shape[1] == a.answer
        advantage = torch.randn(a.prompts, a.samples)
        update_policy(
            policy,
            self.optimizer,
            self.accelerator,
            Rollouts([], texts, seen, done),
            advantage,
            self.config,
            clock,
        )
        return dict(clock, step=sum(clock.values()))


def trl_trainer(args):
    "TRL's trainer with clocks around its own stages."
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        two_stage, clock = False, StageTimer()

        def _generate(self, prompts):
            with self.clock("generation"):
                return super()._generate(prompts)

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            if self.two_stage:  # what a user of TRL would write: one more generation, a full prompt for every description
                with self.clock("second"):
                    again = [
                        [
                            dict(role="system", content=[dict(type="text", text=SYSTEM)]),
                            dict(
                                role="user",
                                content=[
                                    dict(type="image", image=x["image"]),
                                    dict(type="text", text=visionreasoner_prompt(question(i, 12))),
                                ],
                            ),
                        ]
                        for i, x in enumerate(inputs)
                    ]
                    self._generate_single_turn(*self._tokenize_prompts(again), 1)
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        def _get_per_token_logps_and_entropies(self, *a, **k):
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*a, **k)
            with self.clock("reference"):
                return super()._get_per_token_logps_and_entropies(*a, **k)

    class Steps(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_step_begin(self, *_, **__):
            Timed.clock.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            total = time.perf_counter() - self.began
            self.rows.append(
                dict(Timed.clock, update=total - sum(Timed.clock.values()), step=total)
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
        lambda completions, **_: np.random.randn(len(completions)).tolist(),
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
    "Rows of seconds, engine by engine, alternating; the first step of each turn warms up and is left out."
    engines = dict(ours=Ours(args) if ours else None, trl=Theirs(args) if theirs else None)
    out = {}
    for turn in range(args.turns):
        for two_stage in stages:
            for name, engine in engines.items():
                if engine is None:
                    continue
                rows = (
                    engine.run(two_stage)
                    if name == "trl"
                    else [engine.step(two_stage) for _ in range(args.steps)]
                )
                out.setdefault("two-stage" if two_stage else "one-stage", {}).setdefault(
                    name, []
                ).extend(rows[1:])
                print(
                    f"turn {turn + 1}, {'two stages' if two_stage else 'one stage'}, {name}: {rows[-1]}",
                    flush=True,
                )
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


def floor(
    args, two_stage: bool
) -> dict:  # seconds a stage, were every product done once at the machine's full rate
    "The least arithmetic of our step over the rate of a large matrix product: frozen weights need no gradient, so a backward is one more forward."
    model, _ = make(args.side)

    def count(m):
        return sum(p.numel() for n, p in m.named_parameters() if p.ndim == 2 and "embed" not in n)

    core, t = model.model.language_model, model.config.text_config
    image, text = (args.side // 28) ** 2, 12 + 90

    def read(rows, new, past):
        return rows * (
            2 * count(core) * new + 4 * t.num_hidden_layers * t.hidden_size * new * (past + new / 2)
        )

    vision = args.prompts * 2 * count(model.model.visual) * image * 4
    R, head = args.prompts * args.samples, t.vocab_size * t.hidden_size * 2
    prompt, answers = (
        read(args.prompts, image + text, 0),
        read(R, args.answer, image + text) + R * args.answer * head,
    )
    a = torch.randn(2048, 2048)
    for _ in range(3):
        a @ a
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    rate = 5 * 2 * 2048**3 / (time.perf_counter() - began)
    work = dict(
        generation=vision + prompt + answers,
        reference=prompt + answers,
        update=2 * (prompt + answers),
    )
    if two_stage:
        work["second"] = (
            read(R, 24, image) + read(R, args.answer, image + 24) + R * args.answer * head
        )
    return {
        k: round(v / rate, 2) for k, v in (work | dict(step=sum(work.values()))).items()
    } | dict(gflops=round(rate / 1e9))


def machine(*packages: str) -> dict:
    cpu = next(
        (l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")),
        platform.processor(),
    )
    return dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__) | {
        p: version(p) for p in packages
    }


def high_water() -> int:  # KiB; getrusage would give a child its parent's peak
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))


def peak(name: str, args) -> float:  # MiB
    "Peak resident memory of a process that runs one engine's two-stage steps alone, above that of one that only builds it."

    def run(steps):
        return int(
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--only",
                    name,
                    "--steps",
                    str(steps),
                    "--side",
                    str(args.side),
                    "--prompts",
                    str(args.prompts),
                    "--samples",
                    str(args.samples),
                    "--answer",
                    str(args.answer),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )

    return round((run(2) - run(0)) / 1024, 1)


def growth(args) -> list[dict]:
    "One factor at a time, both engines, one stage."
    cases = [
        ("answers a prompt", "samples", (2, 4, 8, 16, 32)),
        ("image tokens", "side", (280, 560, 840, 1400)),
        ("tokens an answer", "answer", (16, 64, 256)),
    ]
    out = []
    for title, field, values in cases:
        for v in values:
            a = argparse.Namespace(
                **{
                    **vars(args),
                    "prompts": 1,
                    "steps": 2,
                    "turns": 1,
                    "side": 560,
                    "answer": 32,
                    field: v,
                }
            )
            s = summary(measure(a, (False,)))["one-stage"]
            out.append(
                dict(
                    factor=title,
                    value=(v // 28) ** 2 if field == "side" else v,
                    ours=s["ours"],
                    trl=s["trl"],
                    ratio=s["ratio"]["step"],
                )
            )
    return out


def draw(rows: list[dict], path: Path):
    import matplotlib.pyplot as plt

    from dr2seg_lib.viewing.style import FIGURE_STYLE, METHOD_COLOURS

    factors = list(dict.fromkeys(r["factor"] for r in rows))
    with plt.rc_context(FIGURE_STYLE):
        fig, axes = plt.subplots(
            1, len(factors), figsize=(3.3 * len(factors), 3), layout="constrained", sharey=True
        )
        for ax, f in zip(axes, factors):
            mine = [r for r in rows if r["factor"] == f]
            for name, colour in (
                ("trl", METHOD_COLOURS["visionreasoner"]),
                ("ours", METHOD_COLOURS["dr2seg"]),
            ):
                ax.plot(
                    [r["value"] for r in mine],
                    [r[name]["step"] for r in mine],
                    "o-",
                    color=colour,
                    label=dict(trl="TRL", ours="this workbench")[name],
                )
            for r in mine:
                ax.annotate(
                    f"{r['ratio']:.1f}×",
                    (r["value"], r["trl"]["step"]),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                )
            ax.set(xscale="log", yscale="log", xlabel=f)
            ax.minorticks_off()
            ax.margins(x=0.12, y=0.12)
            ax.set_xticks([r["value"] for r in mine], [str(r["value"]) for r in mine])
        axes[0].set_yticks([1, 10, 100], ["1", "10", "100"])
        axes[0].set_title("seconds a step")
        axes[0].legend(loc="upper left", labelcolor="linecolor")
        fig.savefig(path, dpi=150)


def main():
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
    args = p.parse_args()
    torch.set_num_threads(2)
    if args.only:
        if args.steps:
            args.turns = 1
            measure(args, (True,), args.only == "ours", args.only == "trl")
        else:
            args.steps = 1
            Ours(args) if args.only == "ours" else Theirs(args)
        return print(high_water())
    args.out.mkdir(exist_ok=True)
    shape = {
        k: v
        for k, v in vars(args).items()
        if k in ("prompts", "samples", "answer", "side", "steps", "turns")
    }
    if args.growth:
        rows = growth(args)
        draw(rows, args.out / "growth.png")
        (args.out / "growth.json").write_text(
            json.dumps(dict(machine=machine("transformers", "trl"), rows=rows), indent=1) + "\n"
        )
    elif args.memory:
        found = {n: peak(n, args) for n in ("ours", "trl")}
        result = dict(
            machine=machine("transformers", "trl"),
            shape=shape,
            peak_mib=found,
            ratio=round(found["trl"] / found["ours"], 2),
        )
        (args.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    else:
        measured = measure(args, (False, True))
        result = dict(
            machine=machine("transformers", "trl"),
            shape=shape,
            image_tokens=(args.side // 28) ** 2,
            seconds=summary(measured),
            floor={"one-stage": floor(args, False), "two-stage": floor(args, True)},
            rows=measured,
        )
        (args.out / "against_trl.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
