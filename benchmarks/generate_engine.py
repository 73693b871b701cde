"""The step as someone writes it who uses no library: transformers' `generate`, peft and a loop.

Every answer goes over its own copy of the prompt and of the picture, in both passes, for the
reference and for the update.
"""

import torch
from peft import LoraConfig, get_peft_model
from workload import KL, LR, RANK, make, picture, question

from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.chat import chat_messages
from dr2seg_lib.models.lora import lora_target_regex
from dr2seg_lib.rollouts.two_stage import StageTimer

CLIP, MAX_NORM = 0.2, 1.0


def grpo(logp, reference, advantage):  # [R,T], [R,T], [R,1] -> a number
    "The clipped loss of one update with its KL; all answers are of one length."
    ratio = (logp - logp.detach()).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    off = reference - logp
    return (KL * (off.exp() - off - 1) - gain).mean()


class ByHand:
    "As `Ours`."

    def __init__(self, args):
        model, self.processor = make(args.side)
        self.processor.tokenizer.padding_side = "left"
        adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=lora_target_regex())
        self.model, self.args = get_peft_model(model, adapter).eval(), args
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR)

    def inputs(self, texts: list, images: list) -> dict:  # one of each an answer
        "What the processor makes of them, every picture anew."
        chats = [chat_messages(text) for text in texts]
        prompts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        images = [[image] for image in images]
        return self.processor(text=prompts, images=images, padding=True, return_tensors="pt")

    @torch.no_grad()
    def answer(self, inputs: dict) -> torch.Tensor:  # [R,T]
        "One answer to each prompt. None holds an image's token: the forward would look for one."
        config, length = self.model.config, self.args.answer
        out = self.model.generate(
            **inputs,
            max_new_tokens=length,
            min_new_tokens=length,
            suppress_tokens=[config.image_token_id, config.video_token_id],
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
        return out[:, -length:]

    def logprobs(self, inputs: dict, ids: torch.Tensor, rows: slice) -> torch.Tensor:  # [L,T]
        "Log-probabilities of some rows' answers by one padded forward."
        count, some = len(ids), ids[rows]
        pixels = inputs["pixel_values"].view(count, -1, inputs["pixel_values"].shape[1])
        tails = dict(
            input_ids=some,
            attention_mask=torch.ones_like(some),
            mm_token_type_ids=torch.zeros_like(some),
        )
        whole = {name: torch.cat([inputs[name][rows], tail], 1) for name, tail in tails.items()}
        logits = self.model(
            **whole,
            pixel_values=pixels[rows].flatten(0, 1),
            image_grid_thw=inputs["image_grid_thw"][rows],
            use_cache=False,
            logits_to_keep=some.shape[1] + 1,
        ).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, some[..., None])[..., 0]

    def update(self, inputs: dict, ids: torch.Tensor, references: list, parts: list):
        "Gradients of all parts, then a step of AdamW."
        advantage = torch.randn(len(ids), 1)
        for rows, reference in zip(parts, references):
            loss = grpo(self.logprobs(inputs, ids, rows), reference, advantage[rows])
            (loss * len(reference) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, two_stage: bool) -> dict:  # seconds by stage
        "Sample, ask again, score, update."
        timer, a = StageTimer(), self.args
        owners = torch.arange(a.prompts).repeat_interleave(a.samples).tolist()
        images = [picture(a.side, k) for k in range(a.prompts)]
        images = [images[k] for k in owners]
        with timer("generation"):
            inputs = self.inputs([dr2seg_prompt(question(k)) for k in owners], images)
            ids = self.answer(inputs)
        if two_stage:
            with timer("second"):
                texts = [visionreasoner_prompt(question(i, 12)) for i in range(len(owners))]
                self.answer(self.inputs(texts, images))
        size = a.rows or len(owners)
        parts = [slice(i, i + size) for i in range(0, len(owners), size)]
        with timer("reference"), torch.no_grad(), self.model.disable_adapter():
            references = [self.logprobs(inputs, ids, rows) for rows in parts]
        with timer("update"):
            self.update(inputs, ids, references, parts)
        return dict(timer, step=sum(timer.values()))

    def turn(self, two_stage: bool, steps: int) -> list[dict]:
        "Seconds by stage of that many steps."
        return [self.step(two_stage) for _ in range(steps)]
