"""The tests' models are tiny: one thread is fastest, and a busy machine does not slow it down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import train                                                  # before torch, see there
import pytest
import torch

from model import GPT, GPTConfig

# Settings of train.py with which a run takes a second: chains of one operation, 300 of them in all.
TOY = dict(num_ops=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, base_steps=30,
           teacher_steps=30, steps=4, batch_size=8, eval_size=20, dv_size=8, device="cpu")


def arguments(settings: dict) -> list[str]:
    """A dict of settings as words of a command line."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny(seed=0, **settings) -> GPT:
    """A small random model, each of whose parameters is away from its initial value."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=128)
    model = GPT(GPTConfig(**shape | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """The directory that all toy runs share for base and teacher; the first one makes them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def toy():
    """(config, task, student, teacher): two random models, the teacher the surer one."""
    config = train.Config(**TOY, lr=1e-2)
    shape = dict(vocab_size=17, num_hidden_layers=1, tie_word_embeddings=False)
    student, teacher = tiny(0, **shape), tiny(1, **shape).requires_grad_(False)
    teacher.lm_head.weight.mul_(3)
    return config, train.Chains(config), student, teacher
