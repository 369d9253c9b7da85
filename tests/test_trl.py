"""EffOPDCallback in the real transformers.Trainer and TRL's DistillationTrainer (pip install trl==1.16.0)."""

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from effopd import EffOPDCallback, reverse_kl

README = Path(__file__).parents[1] / "README.md"
CHARACTERS = "0123456789+-*=;# "


def tiny_llama(seed=0, **settings):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(CHARACTERS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, pad_token_id=0, eos_token_id=1, **settings))


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def callback_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))


# TRL

@pytest.fixture
def distillation(tmp_path, monkeypatch):
    """What the README's snippet leaves to its reader, and run(), which runs it word for word."""
    pytest.importorskip("trl")
    from datasets import Dataset
    monkeypatch.chdir(tmp_path)
    questions = [f"{a}+{b}=" for a in range(4) for b in range(4)]
    names = {"student": tiny_llama(0), "teacher": tiny_llama(1), "tokenizer": tiny_tokenizer(), "questions": questions,
             "prompts": Dataset.from_dict({"prompt": questions * 4}), "answers": [eval(q[:-1]) for q in questions],
             "is_right": lambda reply, answer: str(answer) in reply}

    def run():
        snippet = re.search(r"## With TRL\n+```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
        exec(snippet, names)
        return names["trainer"]

    return names, run


def test_the_readme_s_snippet_searches_at_steps_1_2_and_4(distillation):
    names, run = distillation
    up = names["student"].model.layers[0].mlp.up_proj.weight
    at, step_1 = [], up.detach().clone()

    def is_right(reply, answer):                              # the more often it has been asked, the better
        at.append(up.detach().clone())
        return len(at)

    names["is_right"] = is_right
    trainer = run()
    history = callback_of(trainer).effopd.history
    assert [record["step"] for record in history] == [1, 2, 4] and trainer.state.global_step == 4
    for record in history:
        assert record["multiple"] == 10 and len(record["scores"]) == 6 and len(record["utility"]) == 2 * 7
    logged = [entry for entry in trainer.state.log_history if "effopd_multiple" in entry]
    assert [(e["step"], e["effopd_multiple"], e["effopd_accepted"]) for e in logged] == [(s, 10, 5) for s in (1, 2, 4)]
    assert [e["effopd_score"] for e in logged] == [record["scores"][-1] for record in history]
    first = at[0] - step_1                                    # Δ, which 16 questions a candidate have seen stretched
    for k in range(6):
        torch.testing.assert_close(at[16 * k], step_1 + (1 + 2 * k) * first)


def test_a_rejected_search_leaves_trl_s_run_as_it_is(distillation):
    """Sampling included: rollouts come from the random stream that validation has not touched."""
    names, run = distillation
    names["is_right"] = lambda reply, answer: 0
    assert [record["accepted"] for record in callback_of(run()).effopd.history] == [0, 0, 0]
    searched = names["student"].state_dict()
    names["student"] = tiny_llama(0)
    names["is_right"] = None                                  # would fail if it were asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EffOPDCallback, "on_optimizer_step", lambda *args, **kwargs: None)
        run()
    assert not torch.equal(searched["lm_head.weight"], tiny_llama(0).lm_head.weight)
    assert all(torch.equal(w, searched[name]) for name, w in names["student"].state_dict().items())


def test_trl_s_loss_is_our_reverse_kl(distillation):
    names, run = distillation
    trainer = run()
    student, teacher = names["student"], names["teacher"]
    student.train()
    torch.manual_seed(3)
    prompt, reply = torch.randint(2, 19, (3, 4)), torch.randint(2, 19, (3, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    student.zero_grad()
    theirs = trainer.compute_loss(student, {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
                                            "completion_ids": reply, "completion_mask": mask})
    theirs.backward()
    gradient = student.model.layers[0].self_attn.q_proj.weight.grad.clone()
    student.zero_grad()
    ids = torch.cat((prompt, reply), dim=1)
    attention = torch.cat((torch.ones_like(prompt), mask), dim=1)
    logits, teacher_logits = (m(ids, attention_mask=attention).logits[:, 3:-1] for m in (student, teacher))
    ours = reverse_kl(logits, teacher_logits, mask)
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(student.model.layers[0].self_attn.q_proj.weight.grad, gradient)


# Any Trainer

def examples():
    ids = torch.randint(2, 19, (4, 8), generator=torch.Generator().manual_seed(0)).repeat(16, 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def minus_loss(model):
    ids = torch.stack([example["input_ids"] for example in examples()[:4]])
    torch.rand(3)                                             # training must not notice
    return -model(input_ids=ids, labels=ids).loss.item()


def trainer_of(folder, callback, model=None, **settings):
    pytest.importorskip("accelerate")
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, **settings}
    args = TrainingArguments(str(folder), learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True,
                             report_to="none", disable_tqdm=True, **settings)
    model = model or tiny_llama(attention_dropout=0.1)
    return Trainer(model, args, train_dataset=examples(), callbacks=[callback] if callback else [])


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def test_a_search_that_accepts_nothing_is_plain_training(tmp_path):
    plain = trainer_of(tmp_path / "a", None)
    plain.train()
    callback = EffOPDCallback(lambda model: minus_loss(model) * 0)
    searched = trainer_of(tmp_path / "b", callback)
    searched.train()
    assert [record["accepted"] for record in callback.effopd.history] == [0, 0, 0, 0]
    for (name, a), b in zip(plain.model.state_dict().items(), searched.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_triggers_count_optimiser_steps_and_utility_has_gradients(tmp_path):
    callback = EffOPDCallback(minus_loss, optimizer=True, scope="all")
    trainer = trainer_of(tmp_path, callback, gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert [record["step"] for record in callback.effopd.history] == [1, 2, 4]
    assert set(callback.effopd.history[0]["utility"]) == {name for name, _ in trainer.model.named_parameters()}
    # A jump after step 4, the last one: Adam has forgotten what it knew of the weights.
    assert callback.effopd.history[-1]["accepted"] > 0
    assert not any(p in trainer.optimizer.state for p in trainer.model.parameters())


@pytest.mark.parametrize("stop_after, how", [(3, "latest"), (1, "latest"), (6, "elsewhere")])
def test_resumed_equals_uninterrupted(tmp_path, stop_after, how):
    whole = trainer_of(tmp_path / "whole", EffOPDCallback(minus_loss))
    whole.train()
    assert any(record["accepted"] for record in callback_of(whole).effopd.history)
    trainer_of(tmp_path / "first", EffOPDCallback(minus_loss), max_steps=stop_after, save_steps=1).train()
    checkpoint = tmp_path / "first" / f"checkpoint-{stop_after}"
    assert (checkpoint / "effopd-00000-of-00001.safetensors").exists()
    if how == "latest":
        resumed = trainer_of(tmp_path / "first", EffOPDCallback(minus_loss))
        resumed.train(resume_from_checkpoint=True)
    else:
        resumed = trainer_of(tmp_path / "second", EffOPDCallback(minus_loss), resume_from_checkpoint=str(checkpoint))
        resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert timeless(callback_of(whole).effopd.history) == timeless(callback_of(resumed).effopd.history)


def test_a_checkpoint_of_another_run_or_scope_is_refused(tmp_path):
    trainer_of(tmp_path / "a", EffOPDCallback(minus_loss), max_steps=3).train()
    trainer_of(tmp_path / "b", EffOPDCallback(lambda model: 0.0), max_steps=3).train()
    with pytest.raises(ValueError, match="another run"):
        trainer_of(tmp_path / "b", EffOPDCallback(minus_loss)).train(str(tmp_path / "a" / "checkpoint-3"))
    with pytest.raises(ValueError, match="scope"):
        trainer_of(tmp_path / "a", EffOPDCallback(minus_loss, scope="mlp")).train(True)


def test_a_checkpoint_without_effopd_starts_it_anew_and_says_so(tmp_path, caplog):
    trainer_of(tmp_path, None, max_steps=3).train()
    callback = EffOPDCallback(minus_loss)
    trainer_of(tmp_path, callback, max_steps=4).train(resume_from_checkpoint=True)
    assert "resume_from_checkpoint" in caplog.text and [record["step"] for record in callback.effopd.history] == [4]


STATE = SimpleNamespace(global_step=0, is_world_process_zero=True)


def test_deepspeed_is_refused():
    with pytest.raises(ValueError, match="DeepSpeed"):
        EffOPDCallback(minus_loss).on_train_begin(SimpleNamespace(deepspeed_plugin=object()), STATE, None)


@pytest.mark.parametrize("use_vllm", [False, True])
def test_vllm_brings_a_warning(caplog, use_vllm):
    args = SimpleNamespace(deepspeed_plugin=None, use_vllm=use_vllm)
    EffOPDCallback(minus_loss).on_train_begin(args, STATE, None, model=tiny_llama())
    assert ("vLLM" in caplog.text) == use_vllm


# Two processes

TWO = dict(per_device_train_batch_size=2, max_steps=4)


def one_rank(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from transformers.distributed import DistributedConfig
    torch.set_num_threads(1)
    results = {}

    def train(how, model=None, resume=None, **settings):
        model = model or tiny_llama()
        trainer = trainer_of(f"{folder}/{how}", EffOPDCallback(minus_loss), model, **{**TWO, **settings})
        trainer.train(resume_from_checkpoint=resume)
        effopd, weights = callback_of(trainer).effopd, trainer.model.state_dict()
        results[how] = {"history": effopd.history, "wrapper": type(trainer.model_wrapped).__name__,
                        "sharded": hasattr(effopd.previous[0], "full_tensor"),
                        "weights": {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in weights.items()}}

    train("DDP", save_strategy="no")
    model = LlamaForCausalLM.from_pretrained(f"{folder}/base", distributed_config=DistributedConfig(fsdp_size=2))
    train("FSDP2 by transformers", model, save_strategy="no")
    # accelerate shards on GPUs only, so these processes say that they are on GPUs; what follows is accelerate launch's.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
                      FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true")
    AcceleratorState._reset_state()
    start = PartialState.__init__

    def start_on_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_on_gpus
    train("FSDP2 by accelerate", max_steps=3)
    train("FSDP2 by accelerate", resume=True)                 # from step 3, over the search at step 4
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.multiprocessing.spawn(one_rank, (str(tmp_path), port), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    single = trainer_of(tmp_path / "single", EffOPDCallback(minus_loss), tiny_llama(),
                        **{**TWO, "per_device_train_batch_size": 4})
    single.train()
    expected = callback_of(single).effopd.history
    assert [record["step"] for record in expected] == [1, 2, 4] and any(record["accepted"] for record in expected)
    for how in ("DDP", "FSDP2 by transformers", "FSDP2 by accelerate"):
        mine, theirs = (rank[how] for rank in ranks)
        assert mine["wrapper"] == ("DistributedDataParallel" if how == "DDP" else "FSDPLlamaForCausalLM")
        assert mine["sharded"] == (how != "DDP") and timeless(mine["history"]) == timeless(theirs["history"])
        for record, other in zip(mine["history"], expected, strict=True):
            assert (record["step"], record["multiple"]) == (other["step"], other["multiple"])
            assert record["scores"] == pytest.approx(other["scores"], rel=1e-5)
        for name, w in single.model.state_dict().items():
            assert torch.equal(mine["weights"][name], theirs["weights"][name])
            torch.testing.assert_close(mine["weights"][name], w, rtol=1e-4, atol=1e-5)
