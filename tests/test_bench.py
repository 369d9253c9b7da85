"""The benchmark runs, at toy size, and says what it cannot do. What it measures is not for a test to judge."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench


def test_every_part_runs(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--toy", "--repeats", "1", "--out", str(out), "--cache_dir", str(tmp_path / "cache")]
    rows = bench.main(["--only", "rollout,step,search,svd", *arguments])
    printed = capsys.readouterr().out
    assert [part for part, _ in rows] == ["rollout", "step", "search", "search", "svd", "svd"]
    for part, row in rows:
        assert row["ours"] > 0 and row["n"] >= 1 and row["what"] in printed
        assert 0 < row["low"] <= row["ratio"] <= row["high"] or row["note"] == "trl is not installed"
    bench.main(["--only", "default,scaling", *arguments])
    results = json.loads(out.read_text())                     # the parts of the first call are still there
    assert list(results) == ["rollout", "step", "search", "svd", "default", "scaling"]
    assert results["rollout"]["machine"]["threads"] >= 1
    assert "base and teacher" in results["default"]["rows"][0]["note"]
    assert {point["kind"] for point in results["scaling"]["rows"]} == {"batch", "context", "step"}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_no_answer_of_the_benchmark_ends_early_and_both_sides_have_the_same_weights():
    args = SimpleNamespace(toy=True, device="cpu", model="")
    (_, model, task, batch, new), = bench.models_of(args)
    prompts = [task.encode(p) for p in task.problems(batch, random.Random(0))]
    assert bool(model.generate(prompts, new, eos_token_id=task.end).mask.all()) and new == task.max_response
    ids = torch.tensor(prompts)
    torch.testing.assert_close(bench.as_transformers(model)(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory on the CPU is read from /proc")
def test_both_forms_of_the_loss_are_measured(capsys):
    for form in ("chunked", "whole"):
        bench.measure_loss(form, 8, 50, 4, "cpu")
        assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_a_loss_that_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 10 ** 6)
    with pytest.raises(SystemExit, match="bench.py: --only loss: 1024 positions need 6 GB, and 0 GB are free"):
        bench.main(["--only", "loss", "--out", str(tmp_path / "bench.json")])


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "speed"])
    assert "got 'speed'" in capsys.readouterr().err
