"""train.py with --data: checkpoints in Hugging Face's format, their tokenizers, problems from a file; all made here."""

import dataclasses
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train
from effopd import policy_gradient, reverse_kl, reverse_kl_sampled, reverse_kl_top_k
from model import GPT, GPTConfig
from train import Config, load, main, parse_config
from word_problems import problem as make_problem

CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-*=.,?#\n"))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


def make_tokenizer(characters=CHARACTERS, end="<end>", template=TEMPLATE):
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<end>", "<stop>", "<user>", "<system>", "<assistant>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token="<unk>",
                                   extra_special_tokens=["<end>", "<stop>", "<user>", "<system>", "<assistant>"])
    fast.chat_template = template
    return fast


def make_checkpoint(directory, tokenizer=None, rows=None, eos=1, seed=0, sure=8.0, **shape):
    """A small model with a tokenizer beside it; `sure` stretches its logits, so that it seems a trained one."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer()
    settings = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, eos_token_id=eos,
                    max_position_embeddings=512, tie_word_embeddings=False) | shape
    model = GPT(GPTConfig(rows or len(tokenizer), **settings))
    with torch.no_grad():
        model.lm_head.weight *= sure
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_problems(path, n=40, **renamed):
    rng = random.Random(0)
    rows = [make_problem(rng) for _ in range(n)]
    path.write_text("\n".join(json.dumps({renamed.get(k, k): v for k, v in row.items()}) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("real")
    make_checkpoint(home / "student")
    make_checkpoint(home / "teacher", seed=1, hidden_size=24)
    write_problems(home / "problems.jsonl")
    return home


SMALL = dict(steps=2, batch_size=4, micro_batch_size=0, eval_size=4, dv_size=3, eval_every=2, max_new_tokens=6, device="cpu")


def config_of(home, **settings):
    return Config(**dict(method="effopd", student=str(home / "student"), teacher=str(home / "teacher"),
                         data=str(home / "problems.jsonl")) | SMALL | settings)


def arguments(home, out_dir=None, **settings):
    chosen = dict(student=home / "student", teacher=home / "teacher", data=home / "problems.jsonl") | SMALL | settings
    return [part for name, value in ({"method": "effopd"} | chosen | ({"out_dir": out_dir} if out_dir else {})).items()
            if value is not None for part in ((f"--{name}",) if value is True else (f"--{name}", str(value)))]


# The command line, from file to saved model.

@pytest.mark.parametrize("settings", [
    dict(method="effopd", score="batch_kl", micro_batch_size=3, gradient_checkpointing=True, offload=True),
    dict(method="opd", dtype="mixed", loss="sampled"),
    dict(method="opd", dtype="bfloat16", loss="sequence", no_chat_template=True),
    dict(method="rl", group_size=2),
    dict(method="sft", teacher=None, system="Be brief.")])
def test_a_run_ends_in_a_model_that_transformers_loads_and_talks_with(home, tmp_path, capsys, settings):
    main(arguments(home, tmp_path / "run", **settings))
    told = capsys.readouterr().out
    assert "40 problems: 4 for evaluation, 3 for D_v" in told
    final = tmp_path / "run" / "checkpoints" / "final"
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1 = ?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=False)
    assert tokenizer.decode(ids[0]) == "<user>1 + 1 = ?<end><assistant>" and ids.dtype == torch.int64
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert model.dtype == (torch.bfloat16 if settings.get("dtype") == "bfloat16" else torch.float32)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all((line["kl"] is None) == ("teacher" in settings) for line in lines)
    start = GPT.from_pretrained(home / "student")
    moved = not torch.equal(GPT.from_pretrained(final).lm_head.weight, start.lm_head.weight)
    assert moved or settings["method"] == "rl"                # which no right answer rewards here


def test_sft_on_a_file_learns_the_files_answers(home, tmp_path):
    write_problems(tmp_path / "problems.jsonl", n=30)
    main(arguments(home, tmp_path / "run", method="sft", teacher=None, steps=60, lr=1e-2, batch_size=8, eval_every=60,
                   no_chat_template=True, data=tmp_path / "problems.jsonl", student=make_checkpoint(
                       tmp_path / "student", sure=1.0)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1


def test_defaults_for_a_gpu_of_24_gb_come_with_data(home):
    config = parse_config(["--method", "effopd", "--student", str(home / "student"), "--teacher", str(home / "teacher"),
                           "--data", str(home / "problems.jsonl"), "--lr", "3e-6"])
    assert (config.batch_size, config.micro_batch_size, config.offload, config.lr) == (64, 4, True, 3e-6)
    parse_config(["--method", "opd", "--student", str(home / "student"), "--teacher", str(home / "teacher"),
                  "--data", str(home / "problems.jsonl")])    # offload is no setting of opd, and was not asked for


def test_a_run_on_a_file_resumes_bit_for_bit(home, tmp_path, monkeypatch):
    """Across the end of an epoch, with micro-batches, bfloat16 arithmetic, offloaded copies and the gate."""
    settings = dict(steps=12, score="batch_kl", micro_batch_size=3, dtype="mixed", offload=True, utility_gate=True,
                    lr=1e-3, save_every=5)
    main(arguments(home, tmp_path / "whole", **settings))
    real = train.save_state
    monkeypatch.setattr(train, "save_state", lambda run, states: real(run, states) or (
        run.record["step"] == 10 and pytest.fail("stopped")))
    with pytest.raises(pytest.fail.Exception):
        main(arguments(home, tmp_path / "run", **settings))
    monkeypatch.undo()
    main(["--resume", str(tmp_path / "run")])
    ends = [GPT.from_pretrained(tmp_path / name / "checkpoints" / "final").state_dict() for name in ("whole", "run")]
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


def test_too_little_memory_is_one_line(home, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(train, "backward", full)
    with pytest.raises(SystemExit):
        main(arguments(home, tmp_path / "run"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: CUDA out of memory. Tried to allocate 2 GiB. Try a smaller --micro_batch_size")


def test_compile_reaches_the_rollouts(home, monkeypatch):
    task, student, _ = load(config_of(home, compile=True))
    real, seen = GPT.generate, []
    monkeypatch.setattr(GPT, "generate", lambda self, *a, compile, **k: seen.append(compile) or real(self, *a, **k))
    train.answer(student, task, task.problems(2, random.Random(0)))
    assert seen == [True]


# One training step, however it is cut up.

@pytest.mark.parametrize("settings", [dict(loss="full"), dict(loss="top_k"), dict(loss="sampled"), dict(loss="sequence"),
                                      dict(method="rl", group_size=2), dict(method="sft")])
def test_micro_batches_have_the_whole_batchs_gradient_and_that_is_the_losss(home, settings, monkeypatch):
    gradients, config = [], config_of(home, **dict(method="opd") | settings)
    task, student, teacher = load(config)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: torch.zeros(()))
    monkeypatch.setattr(task, "is_correct", lambda p, a: sum(map(ord, a)) % 2 == 0)        # some advantages are not 0
    problems = task.problems(8, random.Random(3))[:8 // (2 if config.method == "rl" else 1)]
    for rows in (0, 1, 3, 5):
        student.zero_grad()
        config = dataclasses.replace(config, micro_batch_size=rows)
        generator = torch.Generator().manual_seed(0)
        batch, _, line = train.backward(config, task, student, teacher, problems, generator)
        gradients.append([p.grad.clone() for p in student.parameters()] + [torch.tensor((line["loss"], line["kl"]))])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    student.zero_grad()                                       # and from all logits at once, as written in effopd.py
    z, q, y = student(batch.ids[:, :-1]), teacher(batch.ids[:, :-1]), batch.ids[:, 1:]
    answers = [row[1:][m].tolist() for row, m in zip(batch.ids, batch.mask)]
    rewards = torch.tensor([float(task.is_correct(None, task.decode(a))) for a in answers])
    loss = {"rl": lambda: policy_gradient(z, y, train.group_advantages(rewards, 2), batch.mask),
            "sft": lambda: torch.nn.functional.cross_entropy(z[batch.mask], y[batch.mask])}.get(config.method) or {
        "full": lambda: reverse_kl(z, q, batch.mask), "top_k": lambda: reverse_kl_top_k(z, q, batch.mask, config.top_k),
        "sampled": lambda: reverse_kl_sampled(z, q, y, batch.mask),
        "sequence": lambda: reverse_kl_sampled(z, q, y, batch.mask, discount=1.0)}[config.loss]
    loss().backward()
    assert any(p.grad.abs().max() > 1e-3 for p in student.parameters())
    for p, ours in zip(student.parameters(), gradients[0]):
        torch.testing.assert_close(p.grad, ours, rtol=1e-3, atol=1e-5)


def test_mixed_precision_keeps_the_weights_in_float32_and_computes_in_bfloat16(home):
    task, student, teacher = load(config_of(home, dtype="mixed"))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    ids = torch.tensor([task.encode(next(iter(task.gold)))])
    exact = GPT.from_pretrained(home / "student")(ids)
    student(ids).float().square().mean().backward()
    assert student(ids).dtype == torch.bfloat16 and student.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32
    assert 0 < (student(ids) - exact).abs().max() < 0.03 * exact.abs().max()
    rollout = student.generate(ids.tolist(), 6, temperature=0)
    whole = student(torch.cat((ids, rollout.tokens), dim=1))[:, ids.shape[1] - 1:-1].float().log_softmax(-1)
    assert (whole.gather(-1, rollout.tokens[..., None])[..., 0] - rollout.log_probs).abs().max() < 0.1


# Tokenizers and startup checks.

def test_padding_rows_are_no_difference_and_never_sampled(home, tmp_path, capsys):
    wide = make_checkpoint(tmp_path / "wide", seed=1, rows=len(make_tokenizer()) + 7)
    with torch.no_grad():                                     # padding that would win every draw, were it looked at
        model = GPT.from_pretrained(wide)
        model.lm_head.weight[-7:] *= 100
        model.save_pretrained(tmp_path / "loud")
        make_tokenizer().save_pretrained(tmp_path / "loud")
    for student, teacher in ((home / "student", tmp_path / "loud"), (tmp_path / "loud", home / "teacher")):
        task, student, teacher = load(config_of(home, student=str(student), teacher=str(teacher)))
        assert student.tokens_in_use == teacher.tokens_in_use == len(make_tokenizer())
        for answer in train.answer(student, task, task.problems(4, random.Random(0))):
            assert max(answer) < len(make_tokenizer())
        assert student(torch.tensor([[5, 6]])).shape[-1] == len(make_tokenizer())
    both = str(tmp_path / "loud")                             # rows that are padding in both models
    task, student, teacher = load(config_of(home, student=both, teacher=both))
    assert student.tokens_in_use == teacher.tokens_in_use == len(make_tokenizer())


def test_either_models_end_ends_an_answer(home, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "teacher", make_tokenizer(end="<stop>"), eos=2, seed=1)
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    task, *_ = load(config_of(home, teacher=str(other)))
    assert task.end == [1, 2, 5] and "either ends an answer" in capsys.readouterr().out
    assert task.encode_answer("1") == make_tokenizer()("1").input_ids + [1]                # the student's own
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 1]}))
    model = GPT.from_pretrained(make_checkpoint(tmp_path, eos=[5, 1]))
    assert train.tokenizer_of(model)[1] == [1, 5, 2]          # the chat's own end first: it is what sft teaches


def test_prompts_are_the_templates_or_plain(home):
    text = make_problem(random.Random(0))["question"]
    for settings, expected in ((dict(), f"<user>{text}<end><assistant>"), (dict(no_chat_template=True), text),
                               (dict(system="Be brief."), f"<system>Be brief.<end><user>{text}<end><assistant>")):
        task, *_ = load(config_of(home, **settings))
        assert task.tokenizer.decode(task.encode(text)) == expected


def test_thinking_is_off_unless_asked_for(home, tmp_path):
    template = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}={% endif %}"
    student = make_checkpoint(tmp_path / "student", make_tokenizer(template=template))
    for thinking in (False, True):
        task, *_ = load(config_of(home, student=str(student), thinking=thinking))
        assert task.tokenizer.decode(task.encode(next(iter(task.gold)))).endswith("=") != thinking


# Data.

def test_the_split_is_fixed_by_the_seed_and_disjoint(home, tmp_path, monkeypatch):
    splits, seen = {}, []
    real = train.backward
    monkeypatch.setattr(train, "backward", lambda *a: seen.append(a[4]) or real(*a))
    for n, seed in enumerate((0, 0, 1)):
        config = config_of(home, seed=seed, steps=12, method="effopd")
        task, student, teacher = load(config)
        seen.clear()
        validated, evaluated = [], train.evaluation_problems(config, task)
        (tmp_path / str(n)).mkdir()
        monkeypatch.setattr(train, "Score", lambda c, t, m, problems: validated.extend(problems) or real_score(c, t, m, problems))
        train.distil(config, task, student, teacher, tmp_path / str(n), "")
        trained = [p for batch in seen for p in batch]
        splits[n] = evaluated, validated, trained
        assert len(set(evaluated)) == 4 and len(set(validated)) == 3 and not set(evaluated) & set(validated)
        assert set(trained) == set(task.gold) - set(evaluated) - set(validated)
        assert len(set(trained[:33])) == 33                   # all once, before any comes again
    assert splits[0] == splits[1] and splits[0][0] == splits[2][0] and splits[0][2] != splits[2][2]


real_score = train.Score


@pytest.mark.parametrize("gold, right, wrong", [
    ("She has 48 / 2 = 24.\n#### 1,072", ["so 1072", "#### 1,072", "The answer is 1072.", "\\boxed{1072}"], ["72", "", "#"]),
    ("72", ["36 * 2 = 72", "$72$", "\\boxed{72.0}"], ["72 - 1 = 71", "I do not know"]),
    ("\\frac{1}{2}", ["\\boxed{0.5}", "$\\frac12$", "the half, $\\frac{2}{4}$"], ["\\boxed{2}"]),
    ("... so it is $\\boxed{x^2 + 1}$.", ["\\boxed{1 + x^2}"], ["\\boxed{x^2}"]),
    ("#### -3", ["#### -3"], ["#### 3"]),
    ("#### 5 dollars", ["#### 5", "#### \\$5", "$5"], ["#### 6"]),
    (1e-7, ["0.0000001"], ["-7"]), (1e20, ["100000000000000000000"], ["20"]), (0.5, ["1/2", "\\boxed{\\frac12}"], ["5"]),
    ("Yes", ["so \\boxed{Yes}"], ["\\boxed{No}"])])
def test_grading(home, gold, right, wrong, tmp_path):
    rows = [{"question": "x", "answer": gold}] + [{"question": str(n), "answer": n} for n in range(11)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, *_ = load(config_of(home, data=str(tmp_path / "rows.jsonl")))
    problem = "x"
    assert [task.is_correct(problem, text) for text in right] == [True] * len(right)
    assert [task.is_correct(problem, text) for text in wrong] == [False] * len(wrong)


def test_fields_have_other_names_and_answers_are_numbers(home, tmp_path):
    write_problems(tmp_path / "math.jsonl", question="problem")
    (tmp_path / "plain.jsonl").write_text("".join(f'{{"problem": "{n} + 1", "n": {n + 1}}}\n\n' for n in range(20)))
    task, *_ = load(config_of(home, data=str(tmp_path / "math.jsonl"), prompt_field="problem"))
    assert len(task.gold) == 40
    task, *_ = load(config_of(home, data=str(tmp_path / "plain.jsonl"), prompt_field="problem", answer_field="n"))
    assert task.is_correct("3 + 1", "4") and not task.is_correct("3 + 1", "5")


# What cannot work says so in one line.

GOOD = '{"question": "1 + 1", "answer": "2"}\n'


@pytest.mark.parametrize("text, words", [
    ("", "is empty"),
    ("\n \n", "is empty"),
    (GOOD + "{oh\n", "line 2 is not JSON"),
    (GOOD + "\n" + "[1]\n", "line 3 is not a JSON object"),
    (GOOD + "\udcff", "line 2 is not JSON"),
    ("[" * 100_000, "line 1 is not JSON"),
    ('{"problem": "1 + 1", "answer": "2"}', "line 1 has no field 'question' but 'problem', 'answer'; choose with --prompt_field"),
    ('{"question": "1 + 1"}', "line 1 has no field 'answer' but 'question'; choose with --answer_field"),
    ("{}", "line 1 has no field 'question' but none"),
    ('{"question": 3, "answer": "2"}', "line 1: 'question' is not a text"),
    ('{"question": " ", "answer": "2"}', "line 1: 'question' is not a text"),
    ('{"question": "\\ud800", "answer": "2"}', "line 1: 'question' is not a text"),
    ('{"question": "1 + 1", "answer": [2]}', "line 1: 'answer' is not a text or a number"),
    ('{"question": "1 + 1", "answer": true}', "line 1: 'answer' is not a text or a number"),
    ('{"question": "1 + 1", "answer": "### nobody knows ####"}', "line 1: no answer can be read"),
    ('{"question": "' + "1 + " * 200 + '", "answer": "2"}', "line 1: a prompt of 8"),
    (GOOD + '{"question": "1 + 1", "answer": "3"}', "line 2: the same problem as in a line before, with another answer"),
    ('{"question": "1 + 1", "answer": NaN}', "line 1: 'answer' is nan"),
    (GOOD * 50, "has 1 different problems, and --eval_size, --dv_size and a batch need 11"),
])
def test_bad_data_is_named_by_its_line(home, tmp_path, capsys, text, words):
    (tmp_path / "bad.jsonl").write_text(text, errors="surrogateescape")
    refused(arguments(home, data=tmp_path / "bad.jsonl"), words, capsys)


def refused(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in error and len(error.splitlines()) == 1 and len(error) < 600, error


def test_bad_models_are_refused(home, tmp_path, capsys):
    def teacher(**options):
        return make_checkpoint(tmp_path / str(len(list(tmp_path.iterdir()))), seed=1, **options)

    swapped = make_tokenizer(CHARACTERS[::-1])                # as many tokens, in another order
    refused(arguments(home, teacher=teacher(tokenizer=swapped)), "different vocabularies (", capsys)
    refused(arguments(home, teacher=teacher(tokenizer=make_tokenizer([*CHARACTERS, "é"]))),
            "(1 tokens differ; 'é' is absent and", capsys)
    refused(arguments(home, teacher=teacher(sure=0.01)), "guessing has -4.3", capsys)
    refused(arguments(home, teacher=teacher(rows=20)), "tokens, the model only 20", capsys)
    refused(arguments(home, student=teacher(tokenizer=make_tokenizer(template=None))), "--no_chat_template asks", capsys)
    strict = make_tokenizer(template="{{ raise_exception('no system messages here') }}")
    refused(arguments(home, student=teacher(tokenizer=strict)), "chat template fails: no system messages here", capsys)
    refused(arguments(home, student=teacher(tokenizer=make_tokenizer(template="{% if %}"))), "template fails", capsys)
    broken = teacher()
    (broken / "generation_config.json").write_text("[]")
    refused(arguments(home, teacher=broken), "generation_config.json cannot be read", capsys)
    refused(arguments(home, student=teacher(tokenizer=make_tokenizer(end=None), eos=None)), "names no end token", capsys)
    bare = teacher()
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(arguments(home, teacher=bare), "has no tokenizer that loads", capsys)


@pytest.mark.parametrize("settings, words", [
    (dict(student=None), "--data needs --student"),
    (dict(teacher=None), "--data needs --teacher"),
    (dict(method="sft", teacher=None, student=None), "--data needs --student"),
    (dict(data="nowhere.jsonl"), "there is no file nowhere.jsonl"),
    (dict(student="no/where/at/all"), "no directory no/where/at/all"),
    (dict(num_ops=3), "--num_ops is a setting of the built-in task; --data has no use for it"),
    (dict(data=None, student=None, teacher=None, max_new_tokens=9), "--max_new_tokens is a setting of --data"),
    (dict(system="Hello", no_chat_template=True), "--system is part of the chat template"),
    (dict(micro_batch_size=-1), "--micro_batch_size must be 0 or more"),
    (dict(rollout_batch_size=0), "--rollout_batch_size must be greater than 0"),
    (dict(data=None, student=None, teacher=None, max_new_tokens=None, method="opd", offload=True),
     "--offload is a setting of --method"),
])
def test_bad_settings_are_refused(home, capsys, settings, words):
    if settings.get("data", 1) is None:
        settings = settings | dict(eval_size=None, dv_size=None, micro_batch_size=None)
    refused(arguments(home, **settings), words, capsys)
