"""A Qwen2.5-VL with random weights, and what it is asked: the work that all engines share."""

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dr2seg_lib.pretraining.tokenizer import CHAT_TEMPLATE, make_tokenizer

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
