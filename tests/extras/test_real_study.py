"""extras/real_study.py: KLs along one Δ, and what runs did on the way."""

import copy
import json
import random

import pytest
import torch

import train
from effopd import EffOPD
from extras import real, real_study
from test_real import config_of, home, run                    # noqa: F401 (a fixture)


def test_four_kls_are_those_of_three_batches(home, tmp_path):
    config = config_of(home, out_dir=str(tmp_path))
    task, student, teacher, _ = real.load_real(config)
    problems = task.problems(6, random.Random(0))
    judge = train.Judge(real_study.four_kls, task, teacher, problems[:3])
    generator = torch.Generator().manual_seed(0)
    judge.parts, entry = real.opd_step(config, task, student, teacher, problems[3:], generator)
    judge.num_tokens = entry["num_tokens"]
    other = copy.deepcopy(student)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    torch.manual_seed(5)
    with torch.no_grad():
        assert -judge(student) == pytest.approx(entry["kl"].item(), rel=1e-5)
        judge(other)
    first, second = real_study.read_lines(tmp_path / "kls.jsonl")
    assert second["batch"] == pytest.approx(second["batch, as run"], rel=1e-5)   # it is in float32
    assert first["held out"] == pytest.approx(first["own"], rel=1e-5)    # both of W_t
    assert second["held out"] != pytest.approx(second["own"], rel=1e-3)
    assert first.keys() == real_study.KLS.keys()


def test_a_probe_keeps_nothing(home, tmp_path):
    model = torch.nn.Linear(2, 2)
    tried = []
    def falls_at_5(model):
        tried.append(round(model.weight[0, 0].item() - start))
        return -abs(tried[-1] - 5)

    effopd = EffOPD(model, falls_at_5, candidates=real_study.probe, scope="all")
    start = model.weight[0, 0].item() + 1
    with torch.no_grad():
        model.weight += 1.0                                   # Δ
    before = model.weight.clone()
    effopd.step(1)
    assert torch.equal(model.weight, before)
    assert tried == [0, 1, 2, 4, 8, 16]


def test_a_probe_through_the_command_and_its_figure(home, tmp_path):
    run(home, tmp_path / "run", method="effopd", candidates="extras.real_study:probe",
        score="extras.real_study:four_kls", searches=0)
    lines = (tmp_path / "run" / "kls.jsonl").read_text().splitlines()
    searches = real_study.read_lines(tmp_path / "run" / "search.jsonl")
    assert len(lines) == sum(len(search["multiples"]) for search in searches) >= 6
    assert [search["multiple"] for search in searches] == [0, 0]     # after steps 1 and 2
    real_study.main(["--along", str(tmp_path / "run")])
    assert (tmp_path / "run" / "along.png").stat().st_size > 10_000


def kept() -> dict:
    """Two seeds of one setting: KLs 1 2 ... 12 and twice that, a search that ends at 1e-4, 3e-4."""
    runs = {}
    for seed in (1, 2):
        runs[f"seed={seed}"] = dict(
            row="finder", reference=None, final_accuracy=0.5, searches=[[1, 8, seed ** 2 * 1e-4]],
            curve=[[0, 0.0, 0, 0, 0.0], [6, 0.1 * seed, 100, 50, 1.0], [12, 0.5, 200, 50, 2.0]],
            log=[[float(seed * step), 20 * step] for step in range(1, 13)])
    return dict(grids=[], shared=[], control=None, runs=runs)


def test_the_table_by_hand_and_the_figure(tmp_path, capsys):
    head, _, row = real_study.table(kept())
    cells = dict(zip(head, row))
    assert cells[""] == "finder" and cells["n"] == "2"
    assert cells["KL, steps 1–3"].startswith("3.00 [")        # mean of 2 and 4
    assert cells["KL, steps 10–12"].startswith("16.50 [")
    assert cells["accuracy at 6"].startswith("0.15 [")
    assert cells["tokens sampled + only scored"] == "200 + 50"
    assert cells["rate in the end"] == "1.0e-04 to 4.0e-04"
    (tmp_path / "sweep.json").write_text(json.dumps(kept()))
    real_study.main([str(tmp_path), "--rows", "finder"])
    assert "| finder | 2 |" in capsys.readouterr().out
    assert (tmp_path / "path.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        real_study.main([str(tmp_path), "--rows", "other"])
    assert "there is no 'other'" in capsys.readouterr().err
