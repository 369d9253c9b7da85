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
        eos_token_id=1, **{"num_hidden_layers": 2, **settings}))


def tiny_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def callback_of(trainer):
    callbacks = trainer.callback_handler.callbacks
    return next(callback for callback in callbacks if isinstance(callback, EffOPDCallback))


def assert_equal_weights(a, b):
    for (name, w), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(w, other), name


# TRL: the snippet in the callback's docstring, word for word.

def run_snippet(folder, student, is_right):
    """Run it with the names that it leaves to its reader; returns all its names."""
    questions = [f"{a}+{b}=" for a in range(4) for b in range(4)]
    names = {"student": student, "teacher": tiny_llama(1), "tokenizer": tiny_tokenizer(),
             "questions": questions, "answers": [eval(question[:-1]) for question in questions],
             "prompts": Dataset.from_dict({"prompt": questions * 4}), "is_right": is_right}
    doc = inspect.getdoc(EffOPDCallback)
    snippet = re.search(r" +from trl import.*?trainer\.train\(\)", doc, re.DOTALL)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(textwrap.dedent(snippet), names)
    return names


@pytest.fixture(scope="module")
def snippet(tmp_path_factory):
    """The snippet's names after a run in which every reply is scored higher than the one before."""
    student, asked = tiny_llama(0), []

    def is_right(reply, answer):
        asked.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
        return len(asked)

    names = run_snippet(tmp_path_factory.mktemp("trl"), student, is_right)
    return names | {"asked": asked}


def test_the_snippet_searches_at_steps_1_2_and_4(snippet):
    trainer = snippet["trainer"]
    history = callback_of(trainer).effopd.history
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
        torch.testing.assert_close(moved, 2 * k * delta, rtol=0, atol=1e-7)


def test_trl_s_loss_is_our_reverse_kl(snippet):
    student, teacher = snippet["student"].train(), snippet["teacher"]
    weight = student.model.layers[0].self_attn.q_proj.weight
    torch.manual_seed(3)
    prompt = torch.randint(2, 19, (3, 4))
    reply = torch.randint(2, 19, (3, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    student.zero_grad()
    theirs = snippet["trainer"].compute_loss(student, {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
        "completion_ids": reply, "completion_mask": mask})
    theirs.backward()
    their_gradient = weight.grad.clone()

    student.zero_grad()
    ids = torch.cat((prompt, reply), dim=1)
    attention = torch.cat((torch.ones_like(prompt), mask), dim=1)
    logits = student(ids, attention_mask=attention).logits[:, 3:-1]
    teacher_logits = teacher(ids, attention_mask=attention).logits[:, 3:-1]
    ours = reverse_kl(logits, teacher_logits, mask)
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(weight.grad, their_gradient)


def test_a_search_that_accepts_nothing_leaves_trl_s_run_as_it_is(tmp_path, monkeypatch):
    """Sampling included: rollouts come from the random stream, which validation does not touch."""
    searched = run_snippet(tmp_path, tiny_llama(0), lambda reply, answer: 0)
    history = callback_of(searched["trainer"]).effopd.history
    assert [record["multiple"] for record in history] == [0, 0, 0]
    monkeypatch.setattr(EffOPDCallback, "on_optimizer_step", lambda *args, **kwargs: None)
    plain = run_snippet(tmp_path, tiny_llama(0), None)        # is_right would fail if it were asked
    assert_equal_weights(searched["student"], plain["student"])
    assert not torch.equal(plain["student"].lm_head.weight, tiny_llama(0).lm_head.weight)


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
    plain = trainer_of(tmp_path)
    plain.train()
    callback = EffOPDCallback(lambda model: minus_loss(model) * 0, optimizer=True, move_lr=True)
    searched = trainer_of(tmp_path, callback)
    searched.train()
    assert [record["multiple"] for record in callback.effopd.history] == [0, 0, 0, 0]
    assert_equal_weights(plain.model, searched.model)


def test_triggers_count_optimiser_steps_and_utility_has_gradients(tmp_path):
    callback = EffOPDCallback(minus_loss, scope="all")
    trainer = trainer_of(tmp_path, callback, gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert [record["step"] for record in callback.effopd.history] == [1, 2, 4]
    names = {name for name, _ in trainer.model.named_parameters()}
    assert set(callback.effopd.history[0]["utility"]) == names


@pytest.mark.parametrize("schedule, factor", [
    ("linear", lambda t: 1 - t / 6), ("cosine", lambda t: (1 + math.cos(math.pi * t / 6)) / 2)])
def test_move_lr_moves_every_rate_from_then_on(tmp_path, schedule, factor):
    keep = iter([2, 0, 4])                                    # at steps 1, 2 and 4
    rates = Rates()
    callback = EffOPDCallback(minus_loss, optimizer=True, move_lr=True,
                              candidates=lambda score_at, improves, last: next(keep))
    trainer_of(tmp_path, rates, callback, max_steps=6, lr_scheduler_type=schedule).train()
    moved = [1, 3, 3, 3, 15, 15]
    expected = [1e-3 * m * factor(t) for t, m in enumerate(moved)]
    assert rates.rates == pytest.approx(expected, rel=1e-9)


# Checkpoints.

SETTINGS = dict(optimizer=True, move_lr=True, num_candidates=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted, with a checkpoint at each step."""
    rates, callback = Rates(), EffOPDCallback(minus_loss, **SETTINGS)
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, rates, callback, save_strategy="steps", save_steps=1)
    trainer.train()
    history = callback.effopd.history
    assert any(record["multiple"] for record in history[:2])  # so that a rate moves before step 3
    return SimpleNamespace(folder=folder, model=trainer.model, rates=rates.rates, history=history)


@pytest.mark.parametrize("stopped_after, given", [(1, None), (3, True), (6, "elsewhere")])
def test_resumed_equals_uninterrupted(tmp_path, whole, stopped_after, given):
    """given: args.resume_from_checkpoint; None and True: the newest in output_dir."""
    checkpoint = f"checkpoint-{stopped_after}"
    if given == "elsewhere":
        given = str(whole.folder / checkpoint)
    else:
        for older in range(1, stopped_after + 1):
            shutil.copytree(whole.folder / f"checkpoint-{older}", tmp_path / f"checkpoint-{older}")
    rates, callback = Rates(), EffOPDCallback(minus_loss, **SETTINGS)
    resumed = trainer_of(tmp_path, rates, callback, resume_from_checkpoint=given)
    resumed.train(resume_from_checkpoint=given or True)
    assert_equal_weights(whole.model, resumed.model)
    assert timeless(whole.history) == timeless(callback.effopd.history)
    assert whole.rates[stopped_after:] == rates.rates


def test_a_checkpoint_of_another_run_or_scope_is_refused(tmp_path, whole):
    at_3, at_4 = str(whole.folder / "checkpoint-3"), str(whole.folder / "checkpoint-4")
    callback = EffOPDCallback(minus_loss)
    with pytest.raises(ValueError, match="another run"):      # its history has one search more
        trainer_of(tmp_path, callback, resume_from_checkpoint=at_4).train(at_3)
    callback = EffOPDCallback(minus_loss, scope="mlp")
    with pytest.raises(ValueError, match="scope"):
        trainer_of(tmp_path, callback, resume_from_checkpoint=at_3).train(at_3)


def test_a_checkpoint_without_effopd_starts_it_anew_and_says_so(tmp_path, whole, caplog):
    shutil.copytree(whole.folder / "checkpoint-3", tmp_path / "checkpoint-3",
                    ignore=shutil.ignore_patterns("effopd-*"))
    callback = EffOPDCallback(minus_loss)
    trainer_of(tmp_path, callback, max_steps=4).train(resume_from_checkpoint=True)
    assert "resume_from_checkpoint" in caplog.text
    assert [record["step"] for record in callback.effopd.history] == [4]


STATE = SimpleNamespace(global_step=0, is_world_process_zero=True)


def test_deepspeed_is_refused():
    args = SimpleNamespace(deepspeed_plugin=object())
    with pytest.raises(ValueError, match="DeepSpeed"):
        EffOPDCallback(minus_loss).on_train_begin(args, STATE, None)


@pytest.mark.parametrize("use_vllm", [False, True])
def test_vllm_brings_a_warning(caplog, use_vllm):
    args = SimpleNamespace(deepspeed_plugin=None, use_vllm=use_vllm)
    EffOPDCallback(minus_loss).on_train_begin(args, STATE, None, model=tiny_llama())
    assert ("vLLM" in caplog.text) == use_vllm
