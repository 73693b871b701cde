"""The least time that a step could take on this machine."""

import time

import torch
from workload import make


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
