"Small policies of random weights, of both families, and the forward they are held to."

import cv2
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from dr2seg_lib.models.policy import Policy
from dr2seg_lib.pretraining.policy_model import make_model
from dr2seg_lib.pretraining.tokenizer import CHAT_TEMPLATE, make_processor, make_tokenizer


def qwen3(tokenizer, template=CHAT_TEMPLATE):
    "A small Qwen3-VL of random weights, two of its vision layers feeding DeepStack."

    def token(name):
        return tokenizer.convert_tokens_to_ids(name)

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3], mrope_interleaved=True
        ),
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=64,
        num_position_embeddings=196,
        deepstack_visual_indexes=[0, 1],
    )
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():  # strong enough to be missed where it is left out
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.normal_(std=0.5)
    parts = make_processor(tokenizer)
    video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    return model, Qwen3VLProcessor(
        image_processor=parts.image_processor,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=template,
    )


FAMILIES = "qwen2_5_vl", "qwen3_vl"


def make_policy(family):
    "A policy with an adapter that does something."
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    policy = (
        Policy(make_model(tokenizer), make_processor(tokenizer), 112)
        if family == "qwen2_5_vl"
        else Policy(*qwen3(tokenizer), 1000, 112)
    )
    policy.add_lora(8, 8)
    for name, p in policy.trainable():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return policy


def plain_logprobs(policy, samples, texts, encoded, completions):
    "The oracle: one padded forward of the model itself, the prompt repeated for every answer."
    ids, attention = policy.tokenize(texts, encoded)
    n = len(completions.ids) // len(texts)

    def squash(s):
        return cv2.resize(s.image, (112, 112), interpolation=cv2.INTER_AREA)

    images = policy.processor.image_processor(
        [squash(s) for s in samples for _ in range(n)], do_resize=False, return_tensors="pt"
    )
    full = torch.cat([ids.repeat_interleave(n, 0), completions.ids], 1)
    mask = torch.cat([attention.repeat_interleave(n, 0), completions.mask.long()], 1)
    logits = policy.model(
        input_ids=full,
        attention_mask=mask,
        mm_token_type_ids=(full == policy.model.config.image_token_id).int(),
        use_cache=False,
        **images,
    ).logits
    logp = logits[:, -completions.ids.shape[1] - 1 : -1].log_softmax(-1)
    return logp.gather(2, completions.ids[..., None])[..., 0] * completions.mask
