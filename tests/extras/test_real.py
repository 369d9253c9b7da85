"""extras/real.py: checkpoints in Hugging Face's format, tokenizers, problems from a file. Toys."""

import dataclasses
import functools
import json
import random
import signal
from datetime import datetime

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train
from conftest import arguments, read_lines, tiny
from effopd import (chunked, group_advantages, policy_gradient, reverse_kl, reverse_kl_sampled,
                    reverse_kl_top_k)
from extras import real
from extras.real import RealConfig, load_real, main
from extras.word_problems import gsm8k_problem
from model import GPT

CHARACTERS = sorted({chr(i) for i in range(32, 127)} - set("<>{}") | {"\n"})
SPECIAL = ["<unk>", "<end>", "<stop>", "<user>", "<system>", "<assistant>"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


def make_tokenizer(characters=CHARACTERS, end="<end>", template=TEMPLATE):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token="<unk>",
                                   extra_special_tokens=SPECIAL[1:])
    fast.chat_template = template
    return fast


def make_checkpoint(directory, tokenizer=None, rows=None, eos=1, seed=0, sure=8.0, **shape):
    """A small model and its tokenizer; `sure` stretches its logits, so that it seems trained."""
    tokenizer = tokenizer or make_tokenizer()
    settings = dict(vocab_size=rows or len(tokenizer), hidden_size=16, num_attention_heads=2,
                    eos_token_id=eos, max_position_embeddings=512, tie_word_embeddings=False)
    model = tiny(seed, **settings | shape)
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


def settings_of(home, **settings):
    paths = dict(student=home / "student", teacher=home / "teacher", data=home / "problems.jsonl")
    small = dict(steps=2, batch_size=4, micro_batch_size=0, eval_size=4, dv_size=3, eval_every=2,
                 max_new_tokens=6, device="cpu")
    return {name: str(path) for name, path in paths.items()} | small | settings


def config_of(home, **settings):
    return RealConfig(**settings_of(home, **settings))


def run(home, out_dir, **settings):
    main(arguments(settings_of(home, out_dir=out_dir, **settings)))


def weights_of(directory):
    return GPT.from_pretrained(directory / "checkpoints" / "final").state_dict()


def assert_equal_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert all(torch.equal(w, other[name]) for name, w in one.items())


def refused(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert end.value.code == 2 and words in error and len(error) < 600, error


# The command, from file to saved model.

@pytest.mark.parametrize("settings", [
    dict(method="effopd", score="batch_kl", micro_batch_size=3, gradient_checkpointing=True),
    dict(method="effopd", score="rollout_kl", offload=True),
    dict(method="opd", dtype="mixed", loss="sequence", no_chat_template=True),
    dict(method="rl", group_size=2, teacher=""),
    dict(method="sft", control=True),
    dict(method="sft", teacher="", system="Be brief.")])
def test_a_run_ends_in_a_model_that_transformers_loads_and_talks_with(
        home, tmp_path, capsys, settings):
    run(home, tmp_path / "run", **settings)
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
    assert model.dtype == torch.float32
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert len(log) == 2 and all(("kl" in line) == ("opd" in settings["method"]) for line in log)
    start = GPT.from_pretrained(home / "student").lm_head.weight
    moved = not torch.equal(weights_of(tmp_path / "run")["lm_head.weight"], start)
    assert moved or settings["method"] == "rl"                # no right answer rewards it here


def test_a_stopped_run_goes_on_bit_for_bit(home, tmp_path, monkeypatch, capsys):
    """Across the end of an epoch, with micro-batches, mixed precision, offload and the gate."""
    settings = dict(steps=12, score="batch_kl", micro_batch_size=3, dtype="mixed", lr=1e-3,
                    offload=True, utility_gate=True)
    run(home, tmp_path / "whole", **settings)
    steps = []

    def stopped_in_step_7(*args):
        steps.append(args)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGTERM)
        return real.opd_step(*args)

    monkeypatch.setitem(real.METHODS, "effopd", stopped_in_step_7)
    with pytest.raises(SystemExit) as end:
        run(home, tmp_path / "run", **settings)
    assert end.value.code == 128 + signal.SIGTERM
    hint = f"to go on: python -m extras.real --resume {tmp_path / 'run'}"
    assert f"stopped after step 7; {hint}" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(kept["data_sha256"]) == 64 and kept["template"] == TEMPLATE
    main(["--resume", str(tmp_path / "run")])
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    untimed = [[line | {"seconds": 0} for line in read_lines(tmp_path / name / "log.jsonl")]
               for name in ("run", "whole")]
    assert untimed[0] == untimed[1]


def test_copies_on_the_cpu_change_nothing_but_their_place(home, tmp_path):
    searches = []
    for name, extra in (("plain", {}), ("offload", {"offload": True})):
        run(home, tmp_path / name, steps=8, score="batch_kl", lr=1e-3, candidates="line", **extra)
        searches.append([search | {"seconds": 0} for search in
                         read_lines(tmp_path / name / "search.jsonl")])
    assert_equal_weights(tmp_path / "plain", tmp_path / "offload")
    assert searches[0] == searches[1] and any(search["multiple"] for search in searches[0])


def test_a_run_leaves_the_final_student_and_nothing_else_of_size(home, tmp_path):
    run(home, tmp_path / "run", steps=5)
    one = (home / "student" / "model.safetensors").stat().st_size
    left = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert left < one + 40_000


def test_sft_on_a_file_learns_the_files_answers(home, tmp_path):
    student = str(make_checkpoint(tmp_path / "student", sure=1.0))
    run(home, tmp_path / "run", method="sft", teacher="", student=student, steps=40, lr=1e-2,
        batch_size=8, eval_every=40, no_chat_template=True)
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert {line["reward"] for line in log} == {1.0}


# One step, however it is cut up; and the scores.

LOSSES = {"full": reverse_kl, "top_k": functools.partial(reverse_kl_top_k, k=4),
          "sampled": None, "sequence": None, "rl": None, "sft": None}


@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_add_up_to_the_gradient_of_the_loss_in_effopd(home, loss, monkeypatch):
    method = loss if loss in ("rl", "sft") else "opd"
    own = {"loss": loss} if method == "opd" else {}
    config = config_of(home, method=method, batch_size=8, group_size=8, **own)
    task, _, teacher, _ = load_real(config_of(home))
    _, student, _, _ = load_real(config)
    monkeypatch.setattr(task, "is_correct", lambda p, a: sum(map(ord, a)) % 2 == 0)
    problems = task.problems(1 if method == "rl" else 8, random.Random(3))
    gradients = []
    for rows, chunk_size in ((0, 1000), (1, 1000), (3, 7), (5, 1)):
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


def test_a_step_that_bfloat16_rounds_away_is_seen_by_the_judge(home):
    config = config_of(home, dtype="mixed")
    task, student, teacher, _ = load_real(config)
    problems, generator = task.problems(6, random.Random(3)), torch.Generator().manual_seed(0)
    parts, entry = real.opd_step(config, task, student, teacher, problems, generator)
    judge = train.Judge(None, task, teacher, problems, parts, entry["num_tokens"])
    scores, rounded = [], []                                  # in float32, and in bfloat16
    with torch.no_grad():
        for _ in range(4):
            scores.append(float(real.batch_kl(judge, student)))
            rounded.append(-float(real.kl_of(student, teacher, real.states(student, parts[0]),
                                             parts[0].target, entry["num_tokens"])))
            for p in student.parameters():
                p -= 1e-6 * p.grad.sign()
    gains, rounded_gains = ([b - a for a, b in zip(s, s[1:])] for s in (scores, rounded))
    assert 0 < max(gains) < 1.05 * min(gains)                 # equal steps, equal gains
    assert max(rounded_gains) > 1.5 * min(rounded_gains)
    assert student.precision == torch.bfloat16


def test_the_judge_has_no_tf32_and_puts_it_back(home):
    model = GPT.from_pretrained(home / "student")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")            # as train.main does on a GPU
        with pytest.raises(ZeroDivisionError), real.in_float32(model):
            assert torch.get_float32_matmul_precision() == "highest"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("flags, says", [({}, True), ({"avx512_bf16": True}, False)])
def test_a_cpu_that_emulates_bfloat16_is_named(home, monkeypatch, capsys, flags, says):
    cpu = {"architecture": "x86_64"} | flags
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    load_real(config_of(home, dtype="mixed"))
    assert ("--dtype float32 will be faster" in capsys.readouterr().out) == says
    load_real(config_of(home, dtype="float32", optimizer="muon"))
    assert ("torch's Muon computes in bfloat16" in capsys.readouterr().out) == says
    load_real(config_of(home, dtype="float32"))
    assert "Slow" not in capsys.readouterr().out


# Tokenizers, templates, ends.

def test_padding_rows_are_no_difference_and_never_sampled(home, tmp_path):
    wide = make_checkpoint(tmp_path / "wide", seed=1, rows=len(make_tokenizer()) + 7)
    model = GPT.from_pretrained(wide)
    with torch.no_grad():                                     # they would win, were they looked at
        model.lm_head.weight[-7:] *= 100
    model.save_pretrained(wide)
    pairs = [(home / "student", wide), (wide, home / "teacher")]
    for student, teacher in pairs:
        task, student, teacher, _ = load_real(
            config_of(home, student=str(student), teacher=str(teacher)))
        assert student.tokens_in_use == teacher.tokens_in_use == len(make_tokenizer())
        problems = task.problems(4, random.Random(0))
        for answer in train.sample_answers(student, task, problems, None):
            assert max(answer) < len(make_tokenizer())


def test_every_end_token_of_the_run_ends_answers_and_is_saved(home, tmp_path):
    teacher = make_checkpoint(tmp_path / "teacher", make_tokenizer(end="<stop>"), eos=2, seed=1)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    task, student, *_ = load_real(config_of(home, teacher=str(teacher)))
    assert task.end == [1, 2, 5]
    assert task.encode_answer("1") == make_tokenizer()("1").input_ids + [1]    # the student's own
    student.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / file).read_text())["eos_token_id"] == [1, 2, 5]


def test_prompts_are_the_templates_or_plain(home):
    text = gsm8k_rows(1)[0]["question"]
    asked = "{{ messages[0].content }}{% if enable_thinking is false %}!{% endif %}"
    cases = [(dict(), f"<user>{text}<end><assistant>"), (dict(no_chat_template=True), text),
             (dict(system="Be brief."), f"<system>Be brief.<end><user>{text}<end><assistant>"),
             (dict(template=asked), text + "!")]
    for settings, expected in cases:
        task, *_ = load_real(config_of(home, **settings))
        assert task.tokenizer.decode(task.encode(text)) == expected


def test_no_plain_prompt_ends_in_the_end_token(home, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)])
    student = make_checkpoint(tmp_path / "student", tokenizer)
    assert AutoTokenizer.from_pretrained(student)("1").input_ids[-1] == 1
    task, *_ = load_real(config_of(home, student=str(student), no_chat_template=True))
    assert {prompt[-1] for prompt in task.prompts.values()} == {make_tokenizer()("?").input_ids[0]}
    assert task.encode_answer("1") == make_tokenizer()("1").input_ids + [1]


def test_todays_date_is_kept_with_the_run(home, tmp_path, monkeypatch):
    """As in Llama 3.2's template: a run that goes on a day later has the same prompts."""
    template = ("{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}"
                "{% else %}{% set date = '26 Jul 2024' %}{% endif %}{{ date }}" + TEMPLATE)
    student = make_checkpoint(tmp_path / "student", make_tokenizer(template=template))
    config = config_of(home, student=str(student))
    task, *_ = load_real(config)
    prompt = next(iter(task.prompts))
    assert task.tokenizer.decode(task.encode(prompt)).startswith(f"{datetime.now():%d %b %Y}")
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

def test_training_sees_every_problem_that_is_not_held_out_once_an_epoch(home):
    config = config_of(home)
    task, *_ = load_real(config)
    held_out = set(train.evaluation_problems(config, task))
    batches = task.batches(4, random.Random(0), held_out)
    seen = sum((next(batches) for _ in range(18)), [])        # two epochs of 36
    assert len(held_out) == 4 and not held_out & set(seen)
    assert set(seen[:36]) == set(seen[36:]) == set(task.prompts) - held_out
    assert seen[:36] != seen[36:]


def test_data_that_changed_between_stop_and_resume_are_refused(home, tmp_path, capsys):
    data = write_rows(tmp_path / "problems.jsonl", gsm8k_rows(40))
    config = config_of(home, data=str(data))
    load_real(config)
    write_rows(data, gsm8k_rows(41))
    train.write_json(tmp_path / "config.json", dataclasses.asdict(config) | {"versions": {}})
    refused(["--resume", str(tmp_path)], "has changed since this run began", capsys)


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
    data = write_rows(tmp_path / "rows.jsonl", [{"problem": f"{n} + .5", "n": n + .5}
                                                for n in range(20)])
    task, *_ = load_real(config_of(home, data=str(data), prompt_field="problem", answer_field="n"))
    assert task.is_correct("3 + .5", "7/2") and not task.is_correct("3 + .5", "4.5")


# What cannot work says so in one line.

GOOD = '{"question": "1 + 1", "answer": "2"}\n'


@pytest.mark.parametrize("text, words", [
    (GOOD * 50, "has 1 different problems, and --eval_size, --dv_size and a batch need 11"),
    (GOOD + "{oh\n", "line 2 is not a JSON object"),
    (GOOD + "\n" + "[1]\n", "line 3 is not a JSON object"),
    (GOOD + "\udcff", "line 2 is not a JSON object"),
    ('{"problem": "1"}', "line 1 has no text or number 'question' but problem; choose with --pro"),
    ('{"question": "1 + 1", "answer": [2]}', "line 1 has no text or number 'answer' but question"),
    ('{"question": "1", "answer": "####"}', "the first: line 1: no answer can be read"),
])
def test_bad_data_are_named_by_their_line(home, tmp_path, capsys, text, words):
    (tmp_path / "bad.jsonl").write_text(text, errors="surrogateescape")
    settings = settings_of(home, data=tmp_path / "bad.jsonl", out_dir=tmp_path / "run")
    refused(arguments(settings), words, capsys)


@pytest.mark.parametrize("role, made, words", [
    ("teacher", dict(tokenizer=make_tokenizer(CHARACTERS[::-1])), "different vocabularies ("),
    ("teacher", dict(tokenizer=make_tokenizer([*CHARACTERS, "é"])), "(1 tokens differ; 'é' is"),
    ("teacher", dict(sure=0.01), "guessing has -4.58: it is untrained"),
    ("teacher", dict(rows=20), "tokens, the model only 20"),
    ("student", dict(tokenizer=make_tokenizer(template=None)), "--no_chat_template asks without"),
    ("student", dict(tokenizer=make_tokenizer(template="{% if %}")), "template fails"),
    ("student", dict(tokenizer=make_tokenizer(end=None), eos=None), "names no end token"),
    ("teacher", dict(broken="generation_config.json"), "generation_config.json cannot be read"),
    ("teacher", dict(broken="tokenizer.json"), "its tokenizer or generation_config.json cannot"),
])
def test_models_that_do_not_go_together_are_refused(home, tmp_path, capsys, role, made, words):
    broken = made.pop("broken", None)
    directory = make_checkpoint(tmp_path / "model", seed=1, **made)
    if broken:
        (directory / broken).write_text("{")
    settings = settings_of(home, out_dir=tmp_path / "run", **{role: directory})
    refused(arguments(settings), words, capsys)


@pytest.mark.parametrize("settings, words", [
    (dict(student=""), "--student, a checkpoint, and --data"),
    (dict(teacher=""), "--method effopd needs --teacher"),
    (dict(data="nowhere.jsonl"), "there is no file nowhere.jsonl"),
])
def test_bad_settings_are_refused(home, tmp_path, capsys, settings, words):
    refused(arguments(settings_of(home, out_dir=tmp_path / "run", **settings)), words, capsys)
