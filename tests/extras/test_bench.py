"""The benchmark runs, at toy size, and compares like with like. Its figures are not for a test."""

import json
from types import SimpleNamespace

import pytest
import torch

import train
from extras import bench

TOY = SimpleNamespace(device="cpu", repeats=1)


def default_job(command, **options):
    """What subprocess.run is replaced with: the real job takes minutes."""
    config = train.parse(command[2:])
    assert command[1] == "train.py" and config.out_dir != config.cache_dir
    run = bench.Path(config.out_dir)
    run.mkdir()
    (run / "summary.json").write_text('{"methods": {"OPD": {"final_accuracy": 0.5}}}')


def test_every_part_runs_and_the_rows_of_other_parts_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.subprocess, "run", default_job)
    for parts in ("rollout,step,search", "loss,default"):
        assert bench.main(["--shapes", "toy", "--repeats", "2", "--only", parts]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert sorted(results) == sorted(bench.PARTS)
    rows = [row for result in results.values() for row in result["rows"]]
    assert len(rows) == 6                                     # none of loss: one chunk holds a toy
    printed = capsys.readouterr().out
    for row in rows:
        assert row["ours"] > 0 and f"| {row['what']} |" in printed
        assert row["low"] <= row["ratio"] <= row["high"] if "ratio" in row else "theirs" not in row


def test_one_part_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def broken(name, args):
        yield bench.row("half", "s", [1.0])
        raise RuntimeError("out of luck\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench.PARTS, "step", broken)
    assert bench.main(["--shapes", "toy", "--only", "step,search"]) == 1
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in results["step"]["rows"]] == ["half", "toy"]
    assert results["search"]["rows"][0]["ours"] > 0
    assert "FAILED: out of luck |" in capsys.readouterr().out


def test_both_sides_have_the_same_weights_and_no_answer_ends():
    model, task, problems = bench.build("toy", TOY)
    prompts = torch.tensor([task.encode(problem) for problem in problems])       # (B, P)
    assert [task.decode(row) for row in prompts.tolist()] == problems
    assert bench.tokenizer_of(17)(problems).input_ids == prompts.tolist()
    theirs = bench.as_transformers(model)
    torch.testing.assert_close(theirs(prompts).logits, model(prompts), atol=1e-5, rtol=1e-5)
    options = dict(max_new_tokens=60, do_sample=True, pad_token_id=17)           # 17: no token's id
    assert (theirs.generate(prompts, **options) < 17).all()
    assert model.generate(prompts.tolist(), 60).mask.all()


def test_the_gap_is_that_of_a_decoder_which_is_wrong(monkeypatch):
    model, task, problems = bench.build("toy", TOY)
    prompts = [task.encode(problem) for problem in problems]
    assert bench.gap(model, prompts, 6, "")["ours"] < 1e-5
    sample = model.generate
    monkeypatch.setattr(model, "generate", lambda *args: sample(*args, temperature=0.5))
    assert bench.gap(model, prompts, 6, "")["ours"] > 1e-2


def test_a_row_takes_its_ratios_pair_by_pair():
    row = bench.row("", "s", [1.0, 2.0, 9.0], [2.0, 8.0, 10.0])
    assert (row["ours"], row["theirs"], row["n"]) == (2.0, 8.0, 3)
    assert (row["low"], row["ratio"], row["high"]) == (0.25, 0.5, 0.9)


def test_the_loss_is_measured_in_seconds_and_in_memory(monkeypatch):
    large = bench.SHAPES["toy"]._replace(config=dict(vocab_size=1000, hidden_size=8))
    monkeypatch.setitem(bench.SHAPES, "large", large)
    for row, unit in zip(bench.loss("large", TOY), ("s", "GB"), strict=True):
        assert row["unit"] == unit and row["ours"] > 0 and row["theirs"] > 0


def test_an_unknown_part_is_refused():
    with pytest.raises(SystemExit, match="bench.py: --only takes .*; got 'speed'"):
        bench.main(["--only", "rollout,speed"])
