"A small tokenizer of Qwen2's kind, with its true special tokens, and Qwen2.5-VL's chat template."

import json

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from dr2seg_lib.data.mini import draw_problem
from dr2seg_lib.methods.dr2seg import dr2seg_prompt

QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
NOT_SPECIAL = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <think> </think>".split()
)


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    "Byte-level BPE as Qwen2's, trained on the prompts and on questions of the embedded world."
    plain, learner = Qwen2Tokenizer().backend_tokenizer, Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    corpus = [dr2seg_prompt("the cup")] * 20 + [draw_problem(i).question.text for i in range(200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(learner.get_vocab(), merges, eos_token="<|im_end|>")
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL])
    return tokenizer
