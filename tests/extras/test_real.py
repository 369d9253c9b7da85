"""extras/real.py: checkpoints in Hugging Face's format, tokenizers, problems from a file. Toys."""

import dataclasses
import functools
import json
import random
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train
from effopd import (chunked, group_advantages, policy_gradient, reverse_kl, reverse_kl_sampled,
                    reverse_kl_top_k)
from extras import real
from extras.real import RealConfig, load_real, main
from extras.word_problems import gsm8k_problem
from model import GPT, GPTConfig

CHARACTERS = sorted({chr(i) for i in range(32, 127)} - set("<>{}") | {"\n"})
SPECIAL = ["<unk>", "<end>", "<stop>", "<user>", "<system>", "<assistant>"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


def make_tokenizer(characters=CHARACTERS, end="<end>", template=TEMPLATE, appends_end=False):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token="<unk>",
                                   extra_special_tokens=SPECIAL[1:])
    fast.chat_template = template
    return fast


def make_checkpoint(directory, tokenizer=None, rows=None, eos=1, seed=0, sure=8.0, **shape):
    """A small model and its tokenizer; `sure` stretches its logits, so that it seems trained."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer()
    settings = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, eos_token_id=eos,
                    intermediate_size=32, max_position_embeddings=512, tie_word_embeddings=False)
    model = GPT(GPTConfig(rows or len(tokenizer), **settings | shape))
    with torch.no_grad():
        model.lm_head.weight *= sure
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k_rows(n):
    rng = random.Random(0)
    return [gsm8k_problem(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("real")
    make_checkpoint(home / "student")
    make_checkpoint(home / "teacher", seed=1, hidden_size=24)
    write_rows(home / "problems.jsonl", gsm8k_rows(40))
    return home


SMALL = dict(steps=2, batch_size=4, micro_batch_size=0, eval_size=4, dv_size=3, eval_every=2,
             max_new_tokens=6, device="cpu")


def settings_of(home, **settings):
    models = dict(student=str(home / "student"), teacher=str(home / "teacher"))
    return models | dict(data=str(home / "problems.jsonl")) | SMALL | settings


def config_of(home, **settings):
    return RealConfig(**settings_of(home, **settings))


def arguments(home, **settings):
    words = []
    for name, value in settings_of(home, **settings).items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def weights_of(directory):
    return GPT.from_pretrained(directory / "checkpoints" / "final").state_dict()


def assert_equal_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert all(torch.equal(w, other[name]) for name, w in one.items())


def refused(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    error = capsys.readouterr().err.rpartition("step/s]")[2].strip()    # after a progress bar
    assert len(error.splitlines()) == 1
    assert end.value.code == 2 and words in error and len(error) < 600, error


# The command, from file to saved model.

@pytest.mark.parametrize("settings", [
    dict(method="effopd", score="batch_kl", micro_batch_size=3, gradient_checkpointing=True),
    dict(method="effopd", score="rollout_kl", offload=True),
    dict(method="opd", dtype="mixed", loss="sampled"),
    dict(method="opd", dtype="bfloat16", loss="sequence", no_chat_template=True),
    dict(method="rl", group_size=2, teacher=None),
    dict(method="sft", control=True),
    dict(method="sft", teacher=None, system="Be brief.")])
def test_a_run_ends_in_a_model_that_transformers_loads_and_talks_with(
        home, tmp_path, capsys, settings):
    main(arguments(home, out_dir=tmp_path / "run", **settings))
    told = capsys.readouterr().out
    assert "40 problems: 4 for evaluation, 3 for D_v, the rest to train on\n" in told
    assert ("held-out problems: student" in told) == ("control" in settings)
    final = tmp_path / "run" / "checkpoints" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1 = ?"}],
                                        add_generation_prompt=True, return_tensors="pt",
                                        return_dict=False)
    assert tokenizer.decode(ids[0]) == "<user>1 + 1 = ?<end><assistant>"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    low = settings.get("dtype") == "bfloat16"
    assert model.dtype == (torch.bfloat16 if low else torch.float32)
    log = log_of(tmp_path / "run")
    assert len(log) == 2 and all(("kl" in line) == ("opd" in settings["method"]) for line in log)
    start = GPT.from_pretrained(home / "student").lm_head.weight
    moved = not torch.equal(GPT.from_pretrained(final).lm_head.weight, start)
    assert moved or low or settings["method"] == "rl"         # no right answer rewards it here


def test_a_stopped_run_goes_on_bit_for_bit(home, tmp_path, capsys):
    """Across the end of an epoch, with micro-batches, mixed precision, offload and the gate."""
    args = arguments(home, steps=30, score="batch_kl", micro_batch_size=3, dtype="mixed", lr=1e-3,
                     offload=True, utility_gate=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "extras.real", *args, "--out_dir", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "stopped after step" in said
    assert f"to go on: python -m extras.real --resume {tmp_path / 'run'}" in said
    stopped_after = len(log_of(tmp_path / "run"))
    assert 3 <= stopped_after < 30
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(kept["data_sha256"]) == 64 and kept["template"] == TEMPLATE
    main(["--resume", str(tmp_path / "run")])
    main([*args, "--out_dir", str(tmp_path / "whole")])
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    untimed = [[{key: line[key] for key in ("step", "loss", "kl", "reward", "tokens")}
                for line in log_of(tmp_path / name)] for name in ("run", "whole")]
    assert untimed[0] == untimed[1]


def test_copies_on_the_cpu_change_nothing_but_their_place(home, tmp_path):
    for offload in (False, True):
        main(arguments(home, out_dir=tmp_path / str(offload), steps=8, score="batch_kl", lr=1e-3,
                       candidates="line", offload=offload or None))
    assert_equal_weights(tmp_path / "True", tmp_path / "False")
    searches = [[json.loads(line) | {"seconds": 0} for line in
                 (tmp_path / name / "search.jsonl").read_text().splitlines()]
                for name in ("True", "False")]
    assert searches[0] == searches[1] and any(search["multiple"] for search in searches[0])


def test_a_run_leaves_the_final_student_and_nothing_else_of_size(home, tmp_path):
    main(arguments(home, out_dir=tmp_path / "run", steps=5))
    one = (home / "student" / "model.safetensors").stat().st_size
    left = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert left < one + 40_000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["final"]
    main(arguments(home, out_dir=tmp_path / "more", steps=5, checkpoints=True))
    names = sorted(path.name for path in (tmp_path / "more" / "checkpoints").iterdir())
    assert names == ["final", "step_000000", "step_000001", "step_000002", "step_000004"]


def test_sft_on_a_file_learns_the_files_answers(home, tmp_path):
    student = make_checkpoint(tmp_path / "student", sure=1.0)
    main(arguments(home, out_dir=tmp_path / "run", method="sft", teacher=None, student=student,
                   steps=60, lr=1e-2, batch_size=8, eval_every=60, no_chat_template=True))
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1
    assert {line["reward"] for line in log_of(tmp_path / "run")} == {1.0}


# One step, however it is cut up; and the scores.

LOSSES = {"full": reverse_kl, "top_k": functools.partial(reverse_kl_top_k, k=4),
          "sampled": None, "sequence": None, "rl": None, "sft": None}


@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_add_up_to_the_gradient_of_the_loss_in_effopd(home, loss, monkeypatch):
    method = loss if loss in ("rl", "sft") else "opd"
    own = {"loss": loss} if method == "opd" else {}
    config = config_of(home, method=method, batch_size=8, group_size=8, **own)
    _, _, teacher, _ = load_real(config_of(home))
    task, student, _, _ = load_real(config)
    monkeypatch.setattr(task, "is_correct", lambda p, a: sum(map(ord, a)) % 2 == 0)
    problems = task.problems(1 if method == "rl" else 8, random.Random(3))
    gradients = []
    for rows, logits in ((0, 2 ** 25), (1, 2 ** 25), (3, 7 * len(student.head)), (5, 1)):
        monkeypatch.setattr(real, "LOGITS_AT_ONCE", logits)
        chunk_size = max(1, logits // len(student.head))
        monkeypatch.setattr(real, "chunked", functools.partial(chunked, chunk_size=chunk_size))
        student.zero_grad()
        config = dataclasses.replace(config, micro_batch_size=rows)
        generator = torch.Generator().manual_seed(0)
        parts, entry = real.METHODS[method](config, task, student, teacher, problems, generator)
        assert len(parts) == -(-8 // (rows or 8))
        gradients.append([p.grad.clone() for p in student.parameters()])
        gradients[-1].append(torch.tensor([entry["loss"], entry.get("kl", 0.0)]))
        if rows == 0:
            whole = parts[0]
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    student.zero_grad()                                       # from all logits, as effopd.py has it
    logits, tokens, mask = student(whole.inputs), whole.tokens, whole.mask
    target = teacher(whole.inputs)
    if loss == "rl":
        answers = [row[m].tolist() for row, m in zip(tokens, mask)]
        rewards = torch.tensor(train.rewards_of(task, problems * 8, answers))
        advantages = group_advantages(rewards, 8)[:, None]
        expected = policy_gradient(logits, tokens, advantages, mask)
    elif loss == "sft":
        expected = F.cross_entropy(logits[mask], tokens[mask])
    elif loss in ("sampled", "sequence"):
        expected = reverse_kl_sampled(logits, target, tokens, mask, float(loss == "sequence"))
    else:
        expected = LOSSES[loss](logits, target, mask)
    expected.backward()
    assert any(p.grad.abs().max() > 1e-3 for p in student.parameters())
    for p, ours in zip(student.parameters(), gradients[0]):
        torch.testing.assert_close(p.grad, ours, rtol=1e-3, atol=1e-5)


def test_scores_are_train_pys(home):
    task, student, teacher, _ = load_real(config_of(home))
    problems = task.problems(6, random.Random(3))
    values = {}
    for module in (train, real):
        config = config_of(home, micro_batch_size=4)
        generator = torch.Generator().manual_seed(0)
        parts, entry = module.opd_step(config, task, student, teacher, problems, generator)
        judge = train.Judge(None, task, teacher, problems, parts, entry["num_tokens"])
        torch.manual_seed(5)
        with torch.no_grad():
            values[module] = [float(module.batch_kl(judge, student)), judge.scored,
                              float(module.rollout_kl(judge, student)), judge.sampled]
    assert values[real] == pytest.approx(values[train], rel=1e-4)
    assert values[real][0] == pytest.approx(-float(entry["kl"]), rel=1e-4)


def test_mixed_precision_has_float32_weights(home):
    task, student, teacher, _ = load_real(config_of(home, dtype="mixed"))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert student(torch.tensor([[3, 4]])).dtype == torch.bfloat16


# Tokenizers, templates, ends.

def test_padding_rows_are_no_difference_and_never_sampled(home, tmp_path):
    wide = make_checkpoint(tmp_path / "wide", seed=1, rows=len(make_tokenizer()) + 7)
    model = GPT.from_pretrained(wide)
    with torch.no_grad():                                     # they would win, were they looked at
        model.lm_head.weight[-7:] *= 100
    model.save_pretrained(wide)
    pairs = [(home / "student", wide), (wide, home / "teacher"), (wide, wide)]
    for student, teacher in pairs:
        task, student, teacher, _ = load_real(
            config_of(home, student=str(student), teacher=str(teacher)))
        assert student.tokens_in_use == teacher.tokens_in_use == len(make_tokenizer())
        problems = task.problems(4, random.Random(0))
        for answer in train.sample_answers(student, task, problems, None):
            assert max(answer) < len(make_tokenizer())


def test_every_end_token_of_the_run_ends_answers_and_is_saved(home, tmp_path, capsys):
    teacher = make_checkpoint(tmp_path / "teacher", make_tokenizer(end="<stop>"), eos=2, seed=1)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    task, student, *_ = load_real(config_of(home, teacher=str(teacher)))
    assert task.end == [1, 2, 5] and "any of them ends an answer" in capsys.readouterr().out
    assert task.encode_answer("1") == make_tokenizer()("1").input_ids + [1]    # the student's own
    student.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / file).read_text())["eos_token_id"] == [1, 2, 5]


def test_prompts_are_the_templates_or_plain(home):
    text = gsm8k_rows(1)[0]["question"]
    cases = [(dict(), f"<user>{text}<end><assistant>"), (dict(no_chat_template=True), text),
             (dict(system="Be brief."), f"<system>Be brief.<end><user>{text}<end><assistant>"),
             (dict(template="{{ messages[0].content }}!"), text + "!")]
    for settings, expected in cases:
        task, *_ = load_real(config_of(home, **settings))
        assert task.tokenizer.decode(task.encode(text)) == expected


def test_no_plain_prompt_ends_in_the_end_token(home, tmp_path):
    student = make_checkpoint(tmp_path / "student", make_tokenizer(appends_end=True))
    assert AutoTokenizer.from_pretrained(student)("1").input_ids[-1] == 1
    task, *_ = load_real(config_of(home, student=str(student), no_chat_template=True))
    assert {prompt[-1] for prompt in task.prompts.values()} == {make_tokenizer()("?").input_ids[0]}
    assert task.encode_answer("1") == make_tokenizer()("1").input_ids + [1]


def test_thinking_is_off_unless_asked_for(home, tmp_path):
    template = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}={% endif %}"
    student = make_checkpoint(tmp_path / "student", make_tokenizer(template=template))
    for thinking in (False, True):
        task, *_ = load_real(config_of(home, student=str(student), thinking=thinking))
        prompt = task.tokenizer.decode(task.encode(next(iter(task.prompts))))
        assert prompt.endswith("=") != thinking


def test_todays_date_is_kept_with_the_run(home, tmp_path, monkeypatch):
    """As in Llama 3.2's template: a run that goes on a day later has the same prompts."""
    template = ("{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}"
                "{% else %}{% set date = '26 Jul 2024' %}{% endif %}{{ date }}" + TEMPLATE)
    student = make_checkpoint(tmp_path / "student", make_tokenizer(template=template))
    config = config_of(home, student=str(student))
    task, *_ = load_real(config)
    today = f"{datetime.now():%d %b %Y}"
    prompt = next(iter(task.prompts))
    assert task.tokenizer.decode(task.encode(prompt)).startswith(today)
    kept = dataclasses.asdict(config)                         # what config.json has

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 1)

    monkeypatch.setattr(real, "datetime", Tomorrow)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    again, *_ = load_real(RealConfig(**kept))
    assert again.prompts == task.prompts
    other, *_ = load_real(config_of(home, student=str(student)))
    assert other.tokenizer.decode(other.encode(prompt)).startswith("01 Jan 2031")


# Data.

def test_the_split_is_fixed_by_the_seed_and_disjoint(home, tmp_path, monkeypatch):
    splits = []
    for n, seed in enumerate((0, 0, 1)):
        seen, validated = [], []
        step = functools.partial(record_problems, seen)
        monkeypatch.setitem(real.METHODS, "effopd", step)
        monkeypatch.setitem(real.SCORES, "accuracy",
                            lambda judge, model: validated.extend(judge.problems) or 0.0)
        config = config_of(home, seed=seed, steps=12)
        task, student, teacher, _ = load_real(config)
        evaluated = train.evaluation_problems(config, task)
        (tmp_path / str(n)).mkdir()
        train.train(config, task, student, teacher, tmp_path / str(n), "", real.METHODS, real.SCORES)
        assert len(set(evaluated)) == 4 and len(set(validated)) == 3
        assert set(seen) == set(task.prompts) - set(evaluated) - set(validated)
        assert not set(evaluated) & set(validated)
        assert len(set(seen[:33])) == 33                      # all once, before any comes again
        splits.append((evaluated, validated, seen))
    assert splits[0] == splits[1] and splits[0][0] == splits[2][0]
    assert splits[0][2] != splits[2][2]


def record_problems(seen, config, task, student, teacher, problems, generator):
    seen.extend(problems)
    return real.opd_step(config, task, student, teacher, problems, generator)


def test_data_that_changed_between_stop_and_resume_are_refused(home, tmp_path, capsys):
    data = write_rows(tmp_path / "problems.jsonl", gsm8k_rows(40))
    config = config_of(home, data=str(data))
    load_real(config)
    write_rows(data, gsm8k_rows(41))
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    train.write_json(out_dir / "config.json", dataclasses.asdict(config) | {"versions": {}})
    refused(["--resume", str(out_dir)], "has changed since this run began", capsys)


def test_lines_that_cannot_be_used_are_left_out_and_counted(home, tmp_path, capsys):
    rows = gsm8k_rows(30)
    bad = [{"question": "How long?", "answer": "#### 16 hours and 30 minutes"},
           {"question": rows[0]["question"], "answer": "#### 1234567"},
           {"question": "1 + " * 200, "answer": "#### 201"},
           {"question": "Why?", "answer": "x" * 500 + "#### 1"}]
    data = write_rows(tmp_path / "rows.jsonl", rows + bad)
    task, *_ = load_real(config_of(home, data=str(data)))
    told = capsys.readouterr().out
    assert "3 lines left out, the first: line 31: no answer can be read with certainty" in told
    assert set(task.prompts) == {row["question"] for row in rows} | {"Why?"}
    task, *_ = load_real(config_of(home, data=str(data), method="sft", teacher=""))
    assert "4 lines left out" in capsys.readouterr().out and "Why?" not in task.prompts


def test_fields_have_other_names_and_answers_are_numbers(home, tmp_path):
    rows = [{"problem": f"{n} + .5", "n": n + .5} for n in range(20)]
    rows += [{"problem": "tiny", "n": 1e-7}, {"problem": "large", "n": 1e20}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    task, *_ = load_real(config_of(home, data=str(data), prompt_field="problem", answer_field="n"))
    assert task.is_correct("3 + .5", "7/2") and not task.is_correct("3 + .5", "4.5")
    assert task.solve("tiny") == "0.0000001" and task.solve("large") == "1" + 20 * "0"


# What cannot work says so in one line.

GOOD = '{"question": "1 + 1", "answer": "2"}\n'


@pytest.mark.parametrize("text, words", [
    ("", "has 0 different problems, and --eval_size, --dv_size and a batch need 11"),
    (GOOD * 50, "has 1 different problems"),
    (GOOD + "{oh\n", "line 2 is not JSON"),
    (GOOD + "\n" + "[1]\n", "line 3 is not a JSON object"),
    (GOOD + "\udcff", "line 2 is not JSON"),
    ("[" * 100_000, "line 1 is not JSON"),
    ('{"problem": "1"}', "line 1 has no field 'question' but 'problem'; choose with --prompt_f"),
    ('{"question": "1 + 1"}', "has no field 'answer' but 'question'; choose with --answer_field"),
    ('{"question": " ", "answer": "2"}', "line 1: 'question' is not a text"),
    ('{"question": "\\ud800", "answer": "2"}', "line 1: 'question' is not a text"),
    ('{"question": "1 + 1", "answer": [2]}', "line 1: 'answer' is not a text or a number"),
    ('{"question": "1 + 1", "answer": true}', "line 1: 'answer' is not a text or a number"),
    ('{"question": "1 + 1", "answer": NaN}', "line 1: 'answer' is not a text or a number"),
    ('{"question": "1", "answer": "####"}', "the first: line 1: no answer can be read"),
    ('{"question": "' + "1 + " * 200 + '", "answer": "2"}', "line 1: a prompt of 8"),
])
def test_bad_data_are_named_by_their_line(home, tmp_path, capsys, text, words):
    (tmp_path / "bad.jsonl").write_text(text, errors="surrogateescape")
    refused(arguments(home, data=tmp_path / "bad.jsonl", out_dir=tmp_path / "run"), words, capsys)


@pytest.mark.parametrize("role, made, words", [
    ("teacher", dict(tokenizer=make_tokenizer(CHARACTERS[::-1])), "different vocabularies ("),
    ("teacher", dict(tokenizer=make_tokenizer([*CHARACTERS, "é"])), "(1 tokens differ; 'é' is"),
    ("teacher", dict(sure=0.01), "guessing has -4.58: it is untrained"),
    ("teacher", dict(rows=20), "tokens, the model only 20"),
    ("student", dict(tokenizer=make_tokenizer(template=None)), "--no_chat_template asks without"),
    ("student", dict(tokenizer=make_tokenizer(template="{{ raise_exception('none') }}")),
     "chat template fails: none"),
    ("student", dict(tokenizer=make_tokenizer(template="{% if %}")), "template fails"),
    ("student", dict(tokenizer=make_tokenizer(end=None), eos=None), "names no end token"),
])
def test_models_that_do_not_go_together_are_refused(home, tmp_path, capsys, role, made, words):
    directory = make_checkpoint(tmp_path / "model", seed=1, **made)
    refused(arguments(home, out_dir=tmp_path / "run", **{role: directory}), words, capsys)


@pytest.mark.parametrize("file, content, words", [
    ("generation_config.json", "[]", "generation_config.json cannot be read"),
    ("generation_config.json", "{", "generation_config.json cannot be read"),
    ("tokenizer.json", "{", "has no tokenizer that loads")])
def test_broken_files_of_a_model_are_named(home, tmp_path, capsys, file, content, words):
    make_checkpoint(tmp_path / "model", seed=1)
    (tmp_path / "model" / file).write_text(content)
    refused(arguments(home, teacher=tmp_path / "model", out_dir=tmp_path / "run"), words, capsys)


@pytest.mark.parametrize("settings, words", [
    (dict(student=None), "--student, a checkpoint, and --data"),
    (dict(data=None), "--student, a checkpoint, and --data"),
    (dict(teacher=None), "--method effopd needs --teacher"),
    (dict(method="race"), "invalid choice: 'race'"),
    (dict(data="nowhere.jsonl"), "there is no file nowhere.jsonl"),
    (dict(student="no/where/at/all"), "no directory no/where/at/all"),
    (dict(system="Hello", no_chat_template=True), "--system is part of the chat template"),
    (dict(micro_batch_size=-1), "--micro_batch_size must be 0 or more"),
])
def test_bad_settings_are_refused(home, tmp_path, capsys, settings, words):
    refused(arguments(home, out_dir=tmp_path / "run", **settings), words, capsys)
