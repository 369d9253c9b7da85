"""EffOPDCallback in the real transformers.Trainer and in TRL's DistillationTrainer, one process."""

import inspect
import math
import re
import shutil
import textwrap
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the callback's tests need trl: pip install trl==1.16.0")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer,
                          TrainerCallback, TrainingArguments)

from effopd import reverse_kl
from extras.trl_callback import EffOPDCallback

CHARACTERS = "0123456789+-*=;# "


def tiny_llama(seed=0, **settings):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(CHARACTERS) + 2, hidden_size=16, intermediate_size=31, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, pad_token_id=0,
        num_hidden_layers=2, eos_token_id=1, **settings))


def tiny_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


# TRL.

@pytest.fixture(scope="module")
def snippet(tmp_path_factory):
    """The names of the docstring's snippet after it ran, each reply scored above the one before."""
    student, asked = tiny_llama(0), []

    def is_right(reply, answer):
        asked.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
        return len(asked)

    questions = [f"{a}+{b}=" for a in range(4) for b in range(4)]
    names = {"student": student, "teacher": tiny_llama(1), "tokenizer": tiny_tokenizer(),
             "questions": questions, "answers": questions, "is_right": is_right, "asked": asked,
             "prompts": Dataset.from_dict({"prompt": questions * 4})}
    doc = inspect.getdoc(EffOPDCallback)
    code = re.search(r" +from trl import.*?trainer\.train\(\)", doc, re.DOTALL)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trl"))
        exec(textwrap.dedent(code), names)
    callbacks = names["trainer"].callback_handler.callbacks
    return names | {"callback": next(c for c in callbacks if isinstance(c, EffOPDCallback))}


def test_the_snippet_searches_at_steps_1_2_and_4(snippet):
    trainer = snippet["trainer"]
    history = snippet["callback"].effopd.history
    assert [record["step"] for record in history] == [1, 2, 4]
    assert [len(record["utility"]) for record in history] == [2 * 7] * 3
    logged = [entry for entry in trainer.state.log_history if "effopd_multiple" in entry]
    assert logged == [{"step": record["step"], "effopd_multiple": 10, "effopd_lr": record["lr"],
                       "effopd_score": record["scores"][-1]} for record in history]
    step_1 = snippet["asked"][0]
    delta = step_1 - tiny_llama(0).model.layers[0].mlp.up_proj.weight
    assert delta.abs().max().item() == pytest.approx(1e-4, rel=1e-2)             # Adam's step 1
    for k in range(6):                                        # 16 questions for each candidate
        moved = snippet["asked"][16 * k] - step_1
        assert_close(moved, 2 * k * delta, rtol=0, atol=1e-7)


def test_trl_s_loss_is_our_reverse_kl(snippet):
    student, teacher = snippet["student"].train(), snippet["teacher"]
    weight = student.model.layers[0].self_attn.q_proj.weight
    ids = torch.randint(2, 19, (3, 10), generator=torch.Generator().manual_seed(3))
    prompt, reply = ids[:, :4], ids[:, 4:]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    student.zero_grad()
    theirs = snippet["trainer"].compute_loss(student, {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
        "completion_ids": reply, "completion_mask": mask})
    theirs.backward()
    their_gradient = weight.grad.clone()

    student.zero_grad()
    attention = torch.cat((torch.ones_like(prompt), mask), dim=1)
    logits = student(ids, attention_mask=attention).logits[:, 3:-1]
    teacher_logits = teacher(ids, attention_mask=attention).logits[:, 3:-1]
    ours = reverse_kl(logits, teacher_logits, mask)
    ours.backward()
    assert_close(ours, theirs)
    assert_close(weight.grad, their_gradient)


# Any Trainer.

def examples():
    ids = torch.randint(2, 19, (4, 8), generator=torch.Generator().manual_seed(0)).repeat(16, 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def minus_loss(model):
    ids = torch.stack([example["input_ids"] for example in examples()[:4]])
    torch.rand(3)                                             # training must not notice
    return -model(input_ids=ids, labels=ids).loss.item()


class Rates(TrainerCallback):
    """The learning rate that each step is taken with."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer_of(folder, *callbacks, model=None, **settings):
    settings = {"max_steps": 8, "save_strategy": "no", "per_device_train_batch_size": 4,
                "learning_rate": 1e-3, **settings}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True,
                             **settings)
    model = model or tiny_llama(attention_dropout=0.1)
    return Trainer(model, args, train_dataset=examples(), callbacks=list(callbacks))


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def test_a_search_that_accepts_nothing_is_plain_training(tmp_path):
    """Searches count the optimiser's steps, and find its gradients."""
    plain = trainer_of(tmp_path, gradient_accumulation_steps=2)
    plain.train()
    callback = EffOPDCallback(lambda model: minus_loss(model) * 0, scope="all", move_lr=True)
    searched = trainer_of(tmp_path, callback, gradient_accumulation_steps=2)
    searched.train()
    history = callback.effopd.history
    assert [(record["step"], record["multiple"]) for record in history] == [
        (1, 0), (2, 0), (4, 0), (8, 0)]
    assert set(history[0]["utility"]) == {name for name, _ in plain.model.named_parameters()}
    assert_close(searched.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("schedule, factor", [
    ("linear", lambda t: 1 - t / 6), ("cosine", lambda t: (1 + math.cos(math.pi * t / 6)) / 2)])
def test_move_lr_moves_every_rate_from_then_on(tmp_path, schedule, factor):
    keep = iter([2, 0, 4])                                    # at steps 1, 2 and 4
    rates = Rates()
    callback = EffOPDCallback(minus_loss, move_lr=True,
                              candidates=lambda score_at, improves, last: next(keep))
    trainer_of(tmp_path, rates, callback, max_steps=6, lr_scheduler_type=schedule).train()
    moved = [1, 3, 3, 3, 15, 15]
    expected = [1e-3 * m * factor(t) for t, m in enumerate(moved)]
    assert rates.rates == pytest.approx(expected, rel=1e-9)


# Checkpoints.

SETTINGS = dict(move_lr=True, num_candidates=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted, with a checkpoint at each step."""
    rates, callback = Rates(), EffOPDCallback(minus_loss, **SETTINGS)
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, rates, callback, save_strategy="steps", save_steps=1)
    trainer.train()
    history = callback.effopd.history
    assert any(record["multiple"] for record in history[:2])  # so that a rate moves before step 3
    return SimpleNamespace(folder=folder, weights=trainer.model.state_dict(), rates=rates.rates,
                           history=history)


@pytest.mark.parametrize("stopped_after, given", [(3, True), (6, "elsewhere")])
def test_resumed_equals_uninterrupted(tmp_path, whole, stopped_after, given):
    """given: args.resume_from_checkpoint; True: the newest in output_dir."""
    if given == "elsewhere":
        given = str(whole.folder / f"checkpoint-{stopped_after}")
    else:
        for step in (1, stopped_after):
            shutil.copytree(whole.folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    rates, callback = Rates(), EffOPDCallback(minus_loss, **SETTINGS)
    resumed = trainer_of(tmp_path, rates, callback, resume_from_checkpoint=given)
    resumed.train(resume_from_checkpoint=given)
    assert_close(resumed.model.state_dict(), whole.weights, rtol=0, atol=0)
    assert timeless(whole.history) == timeless(callback.effopd.history)
    assert whole.rates[stopped_after:] == rates.rates


@pytest.mark.parametrize("given, scope, words", [
    ("checkpoint-4", "attention+mlp", "another run"),         # its history has one search more
    ("checkpoint-3", "mlp", "check model and scope")])
def test_a_checkpoint_of_another_run_or_scope_is_refused(tmp_path, whole, given, scope, words):
    callback = EffOPDCallback(minus_loss, scope=scope)
    trainer = trainer_of(tmp_path, callback, resume_from_checkpoint=str(whole.folder / given))
    with pytest.raises(ValueError, match=words):
        trainer.train(str(whole.folder / "checkpoint-3"))


def test_a_checkpoint_without_effopd_starts_it_anew_and_says_so(tmp_path, caplog):
    save = dict(save_strategy="steps", save_steps=3, save_only_model=True)
    trainer_of(tmp_path, EffOPDCallback(minus_loss), max_steps=3, **save).train()
    callback = EffOPDCallback(minus_loss)
    trainer_of(tmp_path, callback, max_steps=4).train(resume_from_checkpoint=True)
    assert "resume_from_checkpoint" in caplog.text
    assert [record["step"] for record in callback.effopd.history] == [4]


@pytest.mark.parametrize("use_vllm", [False, True])
def test_vllm_brings_a_warning_and_deepspeed_is_refused(caplog, use_vllm):
    args = SimpleNamespace(deepspeed_plugin=None, use_vllm=use_vllm)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    EffOPDCallback(minus_loss).on_train_begin(args, state, None, model=tiny_llama())
    assert ("vLLM" in caplog.text) == use_vllm
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="DeepSpeed"):
        EffOPDCallback(minus_loss).on_train_begin(args, state, None)
