"""The metrics against NumPy and by hand, the interventions at their limits, and analyze.py once from end to end."""

import itertools
import json
import math
import random
import shutil
import weakref
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import analyze
import effopd
from analyze import Checkpoint, add, cosines, matrices, principal_components, read_weights, rescaled, truncated, window
from effopd import (module_of, module_utility, reverse_kl, singular_values, spectral_metrics, subspace_alignment,
                    undisturbed)
from model import GPT, GPTConfig
from train import Chains, Config, Score, answer, distil, evaluate, evaluation_problems, load_models, pack, spread

TOY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_ops=1, base_steps=4,
           teacher_steps=2, base_batch_size=8, steps=5, batch_size=6, group_size=3, eval_size=10, dv_size=5,
           device="cpu", lr=1e-2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Spectra.

@pytest.mark.parametrize("noise", [None, 1e-3, 1e-6])         # of a matrix of rank 4; None: Gaussian
@pytest.mark.parametrize("shape", [(7, 7), (30, 12), (12, 30), (150, 220), (1, 5)])
def test_spectral_metrics_equal_numpy(shape, noise):
    delta = randn(*shape)
    if noise is not None:                                     # float32's own Gram matrix would lose it
        delta = randn(shape[0], 4, seed=1) @ randn(4, shape[1], seed=2) + noise * delta
    s = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    p, k = s / s.sum(), math.ceil(len(s) / 100)
    expected = dict(spectral_norm=s[0], spectral_ratio=s[0] / np.sqrt((s ** 2).sum()),
                    effective_rank=np.exp(-(p * np.log(p)).sum()), stable_rank=(s ** 2).sum() / s[0] ** 2,
                    top1_ratio=np.sqrt((s[:k] ** 2).sum() / (s ** 2).sum()))
    for argument in (delta, torch.from_numpy(s), torch.from_numpy(s).flip(0)):
        assert spectral_metrics(argument) == pytest.approx(expected, rel=1e-5)
    assert (k == 2) == (shape == (150, 220))                  # so that "top 1%" is not always the first alone


def test_spectral_metrics_by_hand():
    """Effective rank of σ, not σ²; the top-1% ratio of norms, not of energies: pitfall 24."""
    assert spectral_metrics(torch.diag(torch.tensor([3.0, -4.0]))) == pytest.approx(dict(
        spectral_norm=4, spectral_ratio=4 / 5, stable_rank=25 / 16, top1_ratio=4 / 5,
        effective_rank=math.exp(-4 / 7 * math.log(4 / 7) - 3 / 7 * math.log(3 / 7))), rel=1e-6)
    assert spectral_metrics(2 * torch.eye(9)) == pytest.approx(dict(
        spectral_norm=2, spectral_ratio=1 / 3, stable_rank=9, top1_ratio=1 / 3, effective_rank=9), rel=1e-6)
    one = spectral_metrics(torch.outer(randn(5), randn(8)))   # σ1 aside, every metric of rank 1 is 1
    assert [v for m, v in one.items() if m != "spectral_norm"] == pytest.approx([1] * 4, abs=1e-5)
    spread = torch.zeros(250)
    spread[:4] = torch.tensor([2.0, 2.0, 1.0, 4.0])           # ceil(250 / 100) = 3: 4, 2, 2 of 4, 2, 2, 1
    assert spectral_metrics(spread)["top1_ratio"] == pytest.approx(math.sqrt(24 / 25))
    assert set(spectral_metrics(torch.zeros(3, 3)).values()) == {0.0}
    bf16 = randn(20, 20).bfloat16()
    assert spectral_metrics(bf16) == pytest.approx(spectral_metrics(bf16.float()), rel=1e-6)


def test_singular_values_are_those_they_were_made_of_and_rounding_is_zero():
    U, V = (torch.linalg.qr(randn(n, 6, seed=n).double()).Q for n in (20, 9))
    sigma = torch.tensor([100.0, 1.0, 1e-2, 1e-4, 1e-5, 0.0], dtype=torch.float64)
    for delta in (U * sigma @ V.T, V * sigma @ U.T):
        values = singular_values(delta)
        torch.testing.assert_close(values[:5], sigma[:5], rtol=1e-2, atol=0)               # down to 1e-7 of the largest
        assert len(values) == 9 and values[5:].eq(0).all()


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, 2), torch.tensor(1.0), torch.full((2, 2), math.nan),
                                   torch.zeros(0, 3)])
def test_no_spectrum(wrong):
    with pytest.raises(ValueError, match="finite"):
        spectral_metrics(wrong)


def test_the_gaussian_null_is_the_quarter_circle():
    """Singular values of a square Gaussian fill 0 .. 2 sqrt(r): σ1/||·||_F = 2/sqrt(r), and no low rank."""
    sigma = analyze.gaussian_sigma((300, 300))
    metrics = spectral_metrics(sigma)
    assert sigma.norm().item() == pytest.approx(1)
    assert metrics["spectral_ratio"] == pytest.approx(2 / 300 ** 0.5, rel=0.05)
    assert 0.7 * 300 < metrics["effective_rank"] < 0.9 * 300 and metrics["stable_rank"] == pytest.approx(75, rel=0.1)


# Subspaces.

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 3, 12, range(1, 21), [2, 5]])
def test_subspace_alignment_equals_numpy(k, side):
    a, b = randn(30, 12), randn(30, 12, seed=1) + 0.5 * randn(30, 12)
    if side == "right":
        a, b = a.T, b.T
    U_a, U_b = (np.linalg.svd(x.double().numpy() if side == "left" else x.double().numpy().T)[0] for x in (a, b))
    expected = []
    for i in [k] if isinstance(k, int) else k:
        angles = np.linalg.svd(U_a[:, :min(i, 12)].T @ U_b[:, :min(i, 12)], compute_uv=False)    # cosines of the angles
        expected.append((angles ** 2).mean())
    assert subspace_alignment(a, b, k, side) == pytest.approx(np.mean(expected), rel=1e-5)
    assert subspace_alignment(b, a, k, side) == pytest.approx(np.mean(expected), rel=1e-5)


def test_subspace_alignment_by_hand():
    e = torch.eye(4)
    a, turned = torch.outer(e[0], e[0]), torch.outer(e[0], e[1])
    assert subspace_alignment(a, turned, 1, "left") == 1 and subspace_alignment(a, turned, 1, "right") == 0
    angle = 0.3
    c, s = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[c, -s], [s, c]])
    d = torch.diag(torch.tensor([2.0, 1.0]))
    assert subspace_alignment(d, rotation @ d, 1) == pytest.approx(c * c, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 2) == pytest.approx(1, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 1, "right") == pytest.approx(1, abs=1e-6)
    update = randn(20, 9)
    assert subspace_alignment(update, 3 * update, range(1, 21)) == pytest.approx(1, abs=1e-5)      # with itself
    random_pairs = np.mean([subspace_alignment(randn(40, 40, seed=i), randn(40, 40, seed=99 + i), 10)
                            for i in range(20)])
    assert random_pairs == pytest.approx(10 / 40, rel=0.1)    # not 0: why a null belongs beside it


@pytest.mark.parametrize("a, b, side, words", [
    (torch.eye(2), torch.eye(3), "left", "shapes"), (torch.eye(2), torch.eye(2), "top", "side"),
    (torch.eye(2), torch.zeros(2, 2), "left", "zero matrix"), (torch.ones(2), torch.ones(2), "left", "shapes")])
def test_no_alignment(a, b, side, words):
    with pytest.raises(ValueError, match=words):
        subspace_alignment(a, b, 1, side)


def test_a_random_walk_aligns_more_and_more_with_its_end():
    """Pitfall 25. Its cosine to the end is sqrt(t / T), to the way not yet gone 0; its subspaces rise to 1."""
    steps = (1, 4, 16, 64)
    walk = analyze.walk_alignment([(60, 50)], steps)          # (t, 20)
    assert (np.diff(walk.mean(1)) > 0).all() and walk[-1] == pytest.approx(1, abs=1e-4)
    assert walk[0, 19] == pytest.approx(20 * (1 / 60 + 1 / 50) / 2, abs=0.1)     # one step of 64: chance
    path = torch.cumsum(randn(64, 20_000), 0)[[t - 1 for t in steps]].double()
    gram = path @ path.T
    for i, t in enumerate(steps):
        end, rest = cosines(gram, i, 3)
        assert end == pytest.approx((t / 64) ** 0.5, abs=0.03) and abs(rest) < 0.03
    assert cosines(torch.ones(2, 2).double(), 0, 1) == (1, 0)                    # already there
    turn = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double()    # from (1, 0) on to (2, 1)
    assert cosines(turn @ turn.T, 0, 1) == pytest.approx((2 / 5 ** 0.5, 0.5 ** 0.5))


def test_principal_components_equal_numpys():
    points = randn(6, 40).double()
    coordinates, variance = principal_components(points @ points.T)
    U, s, _ = np.linalg.svd((points - points.mean(0)).numpy(), full_matrices=False)
    assert variance[:5].tolist() == pytest.approx(s[:5] ** 2 / (s ** 2).sum(), rel=1e-6)
    assert coordinates[:, 0].abs().tolist() == pytest.approx(abs(U[:, 0] * s[0]), rel=1e-6)
    line = torch.outer(torch.arange(4.0), randn(9)).double()
    assert principal_components(line @ line.T)[1][0].item() == pytest.approx(1)


# Modules and their utility.

@pytest.mark.parametrize("name, expected", [
    ("model.layers.3.self_attn.q_proj.weight", (3, "q")), ("model.layers.3.self_attn.k_proj.bias", (3, "bias")),
    ("model.layers.12.self_attn.v_proj.weight", (12, "v")), ("model.layers.0.self_attn.o_proj.weight", (0, "o")),
    ("model.layers.1.mlp.gate_proj.weight", (1, "gate")), ("_orig_mod.model.layers.1.mlp.up_proj.weight", (1, "up")),
    ("layers.1.mlp.down_proj.weight", (1, "down")), ("model.layers.1.input_layernorm.weight", (1, "norm")),
    ("model.layers.1.post_attention_layernorm.weight", (1, "norm")),
    ("model.layers.1.self_attn.q_norm.weight", (1, "norm")),
    ("model.norm.weight", (None, "norm")), ("model.embed_tokens.weight", (None, "embedding")),
    ("lm_head.weight", (None, "head")), ("transformer.h.4.attn.c_attn.weight", (4, "c_attn"))])
def test_module_of(name, expected):
    assert module_of(name) == expected


def test_utility_is_the_loss_taken_off_per_unit_of_norm():
    w = randn(4, 3).double().requires_grad_()
    loss = lambda w: (w.sin() * torch.arange(12.0).view(4, 3)).sum()
    loss(w).backward()
    g, sideways = w.grad, torch.zeros(4, 3).double()
    sideways[0, 0], sideways[0, 1] = g[0, 1], -g[0, 0]
    worth = module_utility(dict(down=g, up=g, aside=sideways, still=g, none=None),
                           dict(down=-0.1 * g, up=3 * g, aside=g, still=0 * g, none=g))
    size = g.norm().item()
    assert worth == pytest.approx(dict(down=size, up=-size, aside=0, still=0), rel=1e-6, abs=1e-6)
    step = 1e-4 * randn(4, 3, seed=2).double()                # any small step, against the loss itself
    gained = (loss(w) - loss(w + step)).item() / step.norm().item()
    assert module_utility(dict(w=g), dict(w=step))["w"] == pytest.approx(gained, rel=1e-2)


# Reading.

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tied base and two later selves on disk, and their state dicts."""
    folder, states = tmp_path_factory.mktemp("pair"), []
    model = GPT(GPTConfig(11, 16, 24, 2, 2))
    for i, name in enumerate(("base", "step_000004", "final")):
        with torch.no_grad():
            for n, p in enumerate(model.parameters()):
                p.add_(0.01 * randn(*p.shape, seed=100 * i + n) if i else 0)
        model.save_pretrained(folder / name)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return folder, states


def test_gram_norms_and_svd_are_those_of_the_update(pair):
    folder, (base, *later) = pair
    points = [Checkpoint(folder / name) for name in ("step_000004", "final")]
    weights = read_weights(Checkpoint(folder / "base"), points, whole={1})
    assert set(weights.gram) == set(base) and "lm_head.weight" not in weights.gram     # tied: one entry, pitfall 22
    for name, gram in weights.gram.items():
        flat = np.stack([(state[name] - base[name]).double().numpy().ravel() for state in later])
        assert gram.numpy() == pytest.approx(flat @ flat.T, rel=1e-5)
    assert set(weights.svd) == {n for n, p in base.items() if p.ndim == 2 and "layers" in n} and len(weights.svd) == 14
    for name, (_, (U, sigma, Vh)) in weights.svd.items():
        torch.testing.assert_close(U * sigma @ Vh, later[1][name] - base[name], atol=1e-6, rtol=0)
    shares = weights.norm_shares(1)
    assert sum(shares.values()) == pytest.approx(1) and shares[1, "norm"] > 0 and len(shares) == 2 * 8 + 2
    squares = {n: (later[1][n] - base[n]).square().sum().item() for n in base}
    expected = squares["model.layers.1.mlp.up_proj.weight"] / sum(squares.values())
    assert shares[1, "up"] == pytest.approx(expected, rel=1e-5)
    e, f = base["model.embed_tokens.weight"], later[1]["model.embed_tokens.weight"]
    expected = np.mean([float(x @ y / (x.norm() * y.norm())) for x, y in zip(e, f)])
    assert weights.embedding_cosine[1] == pytest.approx(expected, abs=1e-5)
    assert weights.alignment(1, 1) == pytest.approx(np.ones(20), abs=1e-5)    # a checkpoint with itself
    assert (weights.alignment(0, 1)[:3] < 0.99).all()


def test_rows_in_blocks_shards_and_stored_heads_change_nothing(pair, tmp_path, monkeypatch):
    folder, (base, _, final) = pair
    whole = read_weights(Checkpoint(folder / "base"), [Checkpoint(folder / "final")])
    state = load_file(folder / "final" / "model.safetensors")
    names = sorted(state)
    save_file({n: state[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[5:]} | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
              tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text((folder / "final" / "config.json").read_text())
    real = Checkpoint.read
    heights = []

    def read(self, name, start=0, stop=None):
        heights.append((start, stop))
        return real(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(analyze, "BLOCK", 64)                 # numbers at a time
    blocks = read_weights(Checkpoint(folder / "base"), [Checkpoint(tmp_path)])
    assert max(start for start, _ in heights) > 0 and set(whole.gram) == set(blocks.gram)
    assert all(torch.allclose(whole.gram[n], blocks.gram[n], rtol=1e-6) for n in whole.gram)
    assert whole.embedding_cosine == pytest.approx(blocks.embedding_cosine)


def test_bf16_checkpoints_come_with_a_warning(pair, tmp_path, capsys):
    """Pitfall 23: rounding to bf16 turns a small update into another one."""
    folder, (base, *_) = pair
    read_weights(Checkpoint(folder / "base"), [Checkpoint(folder / "final")])
    assert "warning" not in capsys.readouterr().err
    model = GPT.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    read_weights(Checkpoint(folder / "base"), [Checkpoint(tmp_path)])
    assert "float32 checkpoints" in capsys.readouterr().err


def test_rows_that_did_not_move_are_left_out_of_the_embedding_cosine(pair, tmp_path):
    folder, (base, *_) = pair
    state = load_file(folder / "base" / "model.safetensors")
    points = []
    for name, row in (("model.embed_tokens.weight", 3), ("model.layers.0.mlp.up_proj.weight", 0)):
        moved = {n: w.clone() for n, w in state.items()}
        moved[name][row] *= -1
        (tmp_path / name).mkdir()
        save_file(moved, tmp_path / name / "model.safetensors")
        points.append(Checkpoint(tmp_path / name))
    weights = read_weights(Checkpoint(folder / "base"), points)
    assert weights.embedding_cosine == pytest.approx([-1.0, 1.0])                # the second moved no row at all


# Interventions.

@pytest.fixture(scope="module")
def update(pair):
    _, (base, _, final) = pair
    return base, {name: final[name] - base[name] for name in base}


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def test_windows_partition_and_at_full_width_are_the_whole_update(update):
    base, delta = update
    for layer in (0, 1):
        close(window(delta, layer, 1, "mlp") | window(delta, layer, 1, "attention"), matrices(delta))
        assert len(window(delta, layer, 0, "mlp")) == 3 and len(window(delta, layer, 0, "attention")) == 4
        assert all(f"layers.{layer}.mlp" in name for name in window(delta, layer, 0, "mlp"))
    trained = add(base, window(delta, 0, 2, "mlp") | window(delta, 0, 2, "attention"))
    for name, w in trained.items():
        torch.testing.assert_close(w, base[name] + delta[name] if "proj" in name else base[name])
    assert [analyze.window_reach(layers) for layers in (1, 3, 8, 36)] == [0, 0, 1, 8]     # the paper: 8 of 28 to 48


def test_low_rank_parts(update):
    _, delta = update
    delta = matrices(delta)
    svds = {name: torch.linalg.svd(d, full_matrices=False) for name, d in delta.items()}
    close(truncated(svds, 100, "top"), delta)
    close(truncated(svds, 100, "bottom"), delta)
    close(add(truncated(svds, 50, "top"), truncated(svds, 50, "bottom")), delta)   # 8 of 16 directions and the other 8
    for name, d in truncated(svds, 25, "top").items():
        s = torch.linalg.svdvals(d)
        torch.testing.assert_close(s[:4], svds[name][1][:4], atol=1e-6, rtol=0)
        assert s[4] < 1e-6 and torch.linalg.matrix_rank(truncated(svds, 1, "bottom")[name]) == 1
    assert analyze.frobenius(analyze.scaled_to(delta, 7.0)) == pytest.approx(7, rel=1e-5)


def test_an_early_update_rescaled(update):
    _, final = update
    early = {name: (0.1 + i) * randn(*d.shape, seed=i) for i, (name, d) in enumerate(final.items())}
    early["model.norm.weight"].zero_()
    close(rescaled(early, final, 0.0), early)
    for name, d in rescaled(early, final, 1.0).items():       # module by module, in the early direction
        if early[name].any():
            assert d.norm().item() == pytest.approx(final[name].norm().item(), rel=1e-4)
            assert torch.cosine_similarity(d.flatten(), early[name].flatten(), 0).item() == pytest.approx(1, abs=1e-5)
        else:
            assert not d.any()
    half = rescaled(dict(w=torch.tensor([[2.0]])), dict(w=torch.tensor([[-6.0]])), 0.5)
    assert half["w"].item() == 4.0                            # 2 (1 + 0.5 (6 / 2 - 1))


def test_interventions_start_and_end_where_they_should(update):
    base, delta = update
    svds = {name: torch.linalg.svd(d, full_matrices=False) for name, d in matrices(delta).items()}
    halves = {name: d / 2 for name, d in delta.items()}
    run = analyze.Run("x", None, [1, 10], range(2))
    jobs = analyze.interventions(base, [halves, delta].__getitem__, svds, run, 0.5, num_layers=2)
    trained = add(base, delta)
    close(jobs["step", 10](), trained)
    close(jobs["step", 1](), add(base, halves))
    close(jobs["alpha", 0.4](), add(base, delta, 0.4))
    close(jobs["early", 1, 1.0](), trained)                   # half the update has its direction
    close(jobs["bottom", 50](), add(base, truncated(svds, 50, "bottom")))
    close(add(jobs["leave out", "mlp", 1](), window(delta, 1, 0, "mlp")), trained)
    close(jobs["inject", "attention", 0](), add(base, window(delta, 0, 0, "attention")))
    back = jobs["embeddings back",]()
    assert torch.equal(back["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    back["model.embed_tokens.weight"] = trained["model.embed_tokens.weight"]
    close(back, trained)
    for k in (1, 100):
        moved = {name: w - base[name] for name, w in jobs["top", k]().items()}
        assert analyze.frobenius(moved) == pytest.approx(0.5, rel=1e-4)          # one norm for every k and method
    assert analyze.Run("x", None, [1, 2, 4, 8, 40], range(5)).early == 2
    assert analyze.Run("x", None, [1], range(1)).early == 0


def test_interventions_keep_no_update_but_the_last(update):
    base, delta = update
    svds = {name: torch.linalg.svd(d, full_matrices=False) for name, d in matrices(delta).items()}
    read, name = [], "model.norm.weight"

    def delta_at(i):
        piece = {n: (i + 1) / 3 * d for n, d in delta.items()}
        read.append((i, weakref.ref(piece[name])))
        return piece

    jobs = analyze.interventions(base, delta_at, svds, analyze.Run("x", None, [1, 2, 20], range(3)), 0.5, num_layers=2)
    assert [i for i, _ in read] == [2]
    for what, make in jobs.items():
        make()
        assert not any(alive() is not None for _, alive in read[1:]), what
    assert {i for i, _ in read} == {0, 1, 2} and read[0][1]() is not None


def test_the_kl_is_that_of_all_logits_without_ever_holding_them(runs, monkeypatch):
    config = Config(**TOY, cache_dir=str(runs / "cache"))
    task = Chains(config.num_ops, config.digits)
    student, teacher = load_models(config, task)
    problems = task.problems(20, random.Random(0))
    weights = {name: p.detach() * 1.1 for name, p in student.named_parameters()}
    most = 0

    class Logits(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal most
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (task.vocab_size,):
                most = max(most, out.numel() // task.vocab_size)
            return out

    monkeypatch.setattr(effopd, "rows_at_once", lambda head: 20)
    with Logits():
        right, kl = analyze.measure_with(student, teacher, task, problems)(weights)
    assert 0 < most <= 20                                     # 20 prompts, and as many tokens at a time
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())
    expected, answers = evaluate(student, task, problems)
    batch = pack([task.encode(p) for p in problems], answers, "cpu")
    whole = reverse_kl(student(batch.ids[:, :-1]), teacher(batch.ids[:, :-1]), batch.mask)
    assert batch.mask.sum() > 60 and right == expected and kl == pytest.approx(whole.item(), rel=1e-5)
    with pytest.raises(KeyError):
        analyze.put(student, {name: w for name, w in weights.items() if "norm" not in name})


def test_statistics_by_hand():
    assert spread(dict(mean=0.12345, low=0.1, high=2, n=3), ".2f") == "0.12 [0.10, 2.00]"
    assert spread(dict(mean=1234.5, low=None, high=None, n=1), ",.0f") == "1,234"
    assert analyze.interval([2.0]) == {"mean": 2.0, "half": None, "n": 1} and analyze.interval([None]) is None
    three = analyze.interval([1.0, 2.0, None, 3.0])           # sd 1, t(2) = 4.303, sqrt(3)
    assert three["mean"] == 2 and three["n"] == 3 and three["half"] == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)
    assert analyze.crossing([0, 1, 2], [0.4, 0.6, 0.8], 0.7) == pytest.approx(1.5)
    assert analyze.crossing([0, 1], [0.4, 0.6], 0.7) is None


# Drawing.

@pytest.fixture
def study(tmp_path):
    """Four settings, two seeds each."""
    labels = ("OPD", *(f"EffOPD, candidates doubling, dv_size {size}, lr 0.0003" for size in (10, 100, 1000)))
    runs = [analyze.Run(label, Path(f"{label}{seed}"), [1], range(1)) for label in labels for seed in (0, 1)]
    return analyze.Study(None, runs, (), (), {}, tmp_path)


def boxes(figure, artists):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [artist.get_tightbbox(canvas.get_renderer()) for artist in artists]


def test_the_legend_covers_no_panel_and_bars_labels_do_not_touch(study, tmp_path):
    figure, axes = analyze.canvas("title", *[("panel", "x", "y")] * 3)
    stats = study.each(lambda run: 0.55)
    for axis in axes:
        analyze.bars(axis, stats, offset=-0.2, width=0.4)
        analyze.bars(axis, stats, offset=0.2, width=0.4, alpha=0.4)
    analyze.draw(axes[0], study, lambda run: ([0, 1], [0, 1]), named=True)
    axes[1].axhline(0.5, label="null")
    axes[2].axhline(0.5, label="null")
    analyze.save(figure, tmp_path / "figure.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*study.groups, "null"]
    (legend,) = boxes(figure, [legend])
    assert legend.x0 > 0 and legend.x1 < figure.bbox.x1 and not any(map(legend.overlaps, boxes(figure, axes)))
    for axis in axes:
        labels = boxes(figure, axis.texts)
        assert len(labels) == 8 and not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))


def test_a_band_stays_on_a_logarithmic_axis(study):
    _, (plain, log) = analyze.canvas("title", *[("panel", "x", "y")] * 2)
    log.set_yscale("log")
    asked = []

    def f(run):                                               # seeds far apart: the interval reaches below zero
        asked.append(run)
        return [1, 2], [0.1, 1.0] if run.directory.name.endswith("0") else [0.2, 3.0]

    for axis in (plain, log):
        analyze.draw(axis, study, f)
    assert len(asked) == 2 * len(study.runs)                  # each is asked once
    low = [min(path.vertices[:, 1].min() for band in axis.collections for path in band.get_paths())
           for axis in (plain, log)]
    assert low[0] < 0 and low[1] == pytest.approx(0.015)      # a tenth of the mean


def test_the_figure_of_dv_in_plain_words(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(analyze.plt, "close", figures.append)
    one, five = dict(mean=0.3, low=None, high=None, n=1), dict(mean=0.3, low=0.2, high=0.5, n=5)
    for stats in (one, five):
        analyze.draw_dv({name: {str(size): stats for size in analyze.DV_SIZES} for name in analyze.RATES},
                        tmp_path / "dv.png")
        words = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert not {"curse", "null accepted", "false accepts"} & set(words) and len(set(words)) == 5
        assert max(map(len, words)) < 30
        caps = [line for axis in figures[-1].axes for line in axis.lines if line.get_marker() in ("_", "|")]
        assert len(caps) == (0 if stats["n"] == 1 else 10)
    monkeypatch.undo()
    for figure in figures:
        analyze.plt.close(figure)


# The size of D_v.

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for method, seed in [("opd", 0), ("opd", 1), ("effopd", 0), ("sft", 0)]:
        config = Config(**TOY, method=method, seed=seed, score="batch_kl", cache_dir=str(home / "cache"))
        task = Chains(config.num_ops, config.digits)
        student, teacher = load_models(config, task)
        (home / "runs" / f"{method}-s{seed}").mkdir(parents=True)
        distil(config, task, student, teacher, home / "runs" / f"{method}-s{seed}", method)
    return home


def test_decisions_are_those_of_all_subsets():
    """Against every choice of 3 of 8 problems, searched by the letter."""
    right = np.array([[1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1, 0, 0],
                      [1, 1, 1, 1, 0, 1, 1, 0]], dtype=float)
    again = np.array([0, 1, 0, 0, 1, 0, 0, 0], dtype=float)
    truth, sums, subsets = right.mean(1), dict.fromkeys(analyze.decisions(right, again, 3), 0.0), 0
    assert truth[1] > truth[0] and truth[2] <= truth[1] and truth[3] > truth[2]  # both kinds of error can occur
    for subset in map(list, itertools.combinations(range(8), 3)):
        kept, others = 0, [i for i in range(8) if i not in subset]
        for k in (1, 2, 3):
            accepted, better = right[k, subset].sum() > right[k - 1, subset].sum(), truth[k] > truth[k - 1]
            sums["better_asked" if better else "worse_asked"] += 1
            sums["worse_accepted"] += accepted and not better
            sums["better_rejected"] += better and not accepted
            if not accepted:
                break
            kept = k
        sums["lost"] += truth[1] - truth[kept]                # all 8 problems keep the first candidate
        sums["jumps"] += kept > 0
        sums["curse"] += (right[kept, subset].mean() - right[kept, others].mean()) * (kept > 0)
        sums["null_higher"] += again[subset].sum() > right[0, subset].sum()
        subsets += 1
    got = analyze.decisions(right, again, 3, draws=20_000)
    assert got.pop("draws") == 20_000 and sums.pop("draws") == 0
    for name, value in sums.items():
        assert got[name] / 20_000 == pytest.approx(value / subsets, abs=0.015), name


def test_searches_are_rebuilt_to_the_bit(runs):
    """The rebuilt candidates score what the run itself wrote down."""
    directory = runs / "runs" / "effopd-kl"
    config = Config(**TOY, method="effopd", score="rollout_kl", accept="always", num_candidates=2, seed=3,
                    cache_dir=str(runs / "cache"))
    task = Chains(config.num_ops, config.digits)
    student, teacher = load_models(config, task)
    directory.mkdir()
    try:
        distil(config, task, student, teacher, directory, "EffOPD")
        score = Score(config, task, teacher, task.problems(config.dv_size, random.Random("D_v 3"),
                                                           set(evaluation_problems(config, task))))
        moved = [name for name in dict(student.named_parameters()) if "proj" in name]
        searches = list(analyze.searches_of(directory, moved))
        assert [record["step"] for record, _, _ in searches] == [1, 2, 4]
        for record, now, delta in searches:
            assert record["multiple"] == 4 and record["scores"][0] != record["scores"][1]
            for multiple, expected in zip(record["multiples"], record["scores"]):
                student.load_state_dict(add(now, delta, multiple), strict=False)
                with undisturbed(student, seed=3 * 1_000_003 + record["step"]):
                    assert score(student) == expected
    finally:
        shutil.rmtree(directory)


def test_an_evaluations_chunks_are_seeded_by_their_start(runs):
    config = Config(**TOY, cache_dir=str(runs / "cache"))
    task = Chains(config.num_ops, config.digits, rollout_batch_size=4)
    student, _ = load_models(config, task)
    problems = task.problems(10, random.Random(0))
    for seed in (0, 7_000_021):
        expected = [a for i in (0, 4, 8) for a in answer(student, task, problems[i:i + 4],
                                                         torch.Generator().manual_seed(seed + i))]
        assert evaluate(student, task, problems, seed)[1] == expected
    assert evaluate(student, task, problems) == evaluate(student, task, problems, 0)
    assert evaluate(student, task, problems, 0)[1] != expected


def test_the_random_numbers_behind_the_published_sizes_of_dv(runs, monkeypatch):
    """A candidate's marks are under search step * 1,000,003 + the place of the chunk of 500; W_t's again, others."""
    asked = []

    def fake(model, task, problems, seed):
        asked.append((seed, len(problems), task.rollout_batch_size))
        return 1.0, [task.encode_answer(task.solve(p)) for p in problems]

    monkeypatch.setattr(analyze, "evaluate", fake)
    args = analyze.parse_args(["--dv", "x", "--problems", "401"])
    counts, _ = analyze.score_run(runs / "runs" / "effopd-s0", args)
    steps = [json.loads(line)["step"] for line in (runs / "runs" / "effopd-s0" / "search.jsonl").open()]
    assert steps == [1, 2, 4] and {of["draws"] for of in counts.values()} == {3000}
    assert asked == [(seed * 1_000_003, 401, 500) for step in steps for seed in [step] * 6 + [step + 500_000]]


@pytest.mark.parametrize("setting", [dict(search_every=1), dict(first_trigger=3), dict(direction="random"),
                                     dict(candidates="line"), dict(data=__file__, student="s", teacher="t")])
def test_runs_that_the_size_of_dv_cannot_be_asked_of(setting, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "final").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(TOY | dict(method="effopd") | setting))
    with pytest.raises(SystemExit):
        analyze.main(["--dv", str(tmp_path / "run"), "--out_dir", str(tmp_path)])
    assert "powers of two" in capsys.readouterr().err


def test_the_size_of_dv_from_end_to_end(runs, capsys):
    out = runs / "dv"
    analyze.main(["--dv", str(runs / "runs" / "effopd-s0"), "--problems", "500", "--out_dir", str(out)])
    assert "accepted under other random numbers |" in capsys.readouterr().out
    assert (out / "10_dv_size.png").stat().st_size > 10_000
    table = json.loads((out / "dv.json").read_text())["table"]
    assert set(table["null_accepted"]) == {str(size) for size in analyze.DV_SIZES}
    for args, words in [(["--dv"], "--dv needs"), (["--dv", str(runs / "runs" / "opd-s0")], "EffOPD run"),
                        (["--dv", str(runs), "--problems", "400"], "401 or more")]:
        with pytest.raises(SystemExit):
            analyze.main([*args, "--out_dir", str(out)])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("analyze.py: ") and words in said


# From end to end.

def test_everything_from_four_runs(runs, monkeypatch, capsys):
    out, figures, close = runs / "analysis", [], analyze.plt.close
    monkeypatch.setattr(analyze.plt, "close", lambda figure: (figures.append(figure), close(figure)))
    analyze.main([*(str(runs / "runs" / r) for r in ("sft-s0", "opd-s0", "opd-s1", "effopd-s0")), "--out_dir", str(out),
                  "--problems", "20"])
    said, warned = capsys.readouterr()
    titles = [figure.get_suptitle() for figure in figures]
    assert len(titles) == 9 and "windows of one layer:" in titles[2]
    (scale,) = {image.get_clim() for axis in figures[1].axes for image in axis.images}             # one colour bar
    assert said.count("paper says") == said.count("these runs") == 9 and "warning" not in warned
    results = json.loads((out / "analysis.json").read_text(), parse_constant=lambda s: pytest.fail(f"{s} in the JSON"))
    assert set(results["compared_steps"]) == {"end", "equal steps", "equal accuracy", "equal norm"}
    for number in range(1, 10):
        (figure,) = out.glob(f"{number}_*.png")
        height, width, _ = matplotlib.image.imread(figure).shape
        assert width >= 900 and height >= 300
    norms = results["norm_scaling"]["norm"]
    assert list(norms) == ["OPD", "EffOPD batch_kl", "SFT"]
    assert norms["OPD"]["n"] == 2 and norms["OPD"]["half"] > 0 and norms["SFT"]["half"] is None
    sft = runs / "runs" / "sft-s0"
    final, base = (load_file(sft / "checkpoints" / name / "model.safetensors") for name in ("final", "step_000000"))
    moved = sum((w - base[n]).square().sum().item() for n, w in final.items()) ** 0.5
    assert norms["SFT"]["mean"] == pytest.approx(moved, rel=1e-5)
    share = results["update_norms"]["share"][sft.as_posix()]
    assert sum(share.values()) == pytest.approx(1) and {"embedding", "norm", "0 q", "1 down"} <= set(share)
    aligned = results["directions"]["runs"][sft.as_posix()]
    assert aligned["steps"] == [1, 2, 4, 5] and aligned["alignment_by_k"][-1] == pytest.approx([1] * 20, abs=1e-4)
    ranks = {n: spectral_metrics(final[n] - base[n])["effective_rank"] for n in base if "proj" in n}
    reported = results["spectrum"]["effective_rank"]
    assert reported["mean"]["end"]["SFT"]["mean"] == pytest.approx(np.mean(list(ranks.values())), rel=1e-4)
    assert reported["mean"]["end"]["SFT"]["mean"] < reported["gaussian"]["end"]["SFT"]["mean"]


def test_the_newest_run_of_each_method(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    newest = analyze.newest_runs()
    assert [run.name for run in newest] == ["opd-s1", "effopd-s0", "sft-s0"]
    said = capsys.readouterr().out                            # --score batch_kl is not the paper's EffOPD
    assert "python train.py --method rl" in said and "--method effopd" in said and "--method sft" not in said


def copied(runs, name, directory, **settings):
    """A run of the fixture, elsewhere, with other settings written down."""
    shutil.copytree(runs / "runs" / name, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    return directory


def test_a_race_and_a_sweep_are_their_runs(runs, tmp_path):
    race, sweep = tmp_path / "race", tmp_path / "sweep"
    for name in ("opd", "effopd"):
        copied(runs, f"{name}-s0", race / name)
    for seed in (0, 1):
        copied(runs, f"opd-s{seed}", sweep / f"method=opd,seed={seed}")
    (race / "config.json").write_text(json.dumps(TOY | dict(method="race")))
    (race / "summary.json").write_text("{}")
    (sweep / "sweep.json").write_text("{}")
    assert analyze.expand(race) == [race / "effopd", race / "opd"]
    assert analyze.expand(sweep) == [sweep / "method=opd,seed=0", sweep / "method=opd,seed=1"]
    assert analyze.expand(runs / "runs" / "sft-s0") == [runs / "runs" / "sft-s0"]
    assert [run.label for run in analyze.load_runs([race, sweep])[2]] == ["OPD"] * 3 + ["EffOPD batch_kl"]
    shutil.rmtree(race / "opd" / "checkpoints" / "final")
    with pytest.raises(ValueError, match="race/opd holds no finished run"):
        analyze.expand(race)


def test_bases_are_compared_without_being_read_whole(runs, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"all of {path} was read at once"))
    assert analyze.same_base(runs / "runs" / "opd-s0", runs / "runs" / "sft-s0")


def test_runs_that_differ_in_a_setting_are_no_seeds():
    def labels(*settings):
        return list(analyze.labels_of({i: Config(**TOY | s) for i, s in enumerate(settings)}).values())

    opd, effopd = dict(method="opd"), dict(method="effopd")
    four = opd, effopd, dict(method="rl", lr=3e-4), dict(method="sft", steps=7)
    assert labels(*four) == ["OPD", "EffOPD", "RL", "SFT"]
    assert labels(opd | dict(seed=1, out_dir="a", save_every=3, keep_last=2, offload=True, eval_every=1),
                  opd | dict(dv_size=9)) == ["OPD", "OPD"]    # OPD has no D_v
    assert labels(opd, opd | dict(lr=1e-3), effopd) == ["OPD, lr 0.01", "OPD, lr 0.001", "EffOPD"]
    assert labels(effopd, effopd | dict(candidates="doubling", seed=1), effopd | dict(score="batch_kl"), effopd) == [
        "EffOPD, candidates linear", "EffOPD, candidates doubling", "EffOPD batch_kl", "EffOPD, candidates linear"]
    for other in (dict(loss="sampled"), dict(batch_size=12), dict(gap="habit"), dict(teacher_steps=3)):
        assert len(set(labels(opd, opd | other))) == 2
    for other in (dict(dv_size=9), dict(scope="mlp"), dict(accept="ge"), dict(first_trigger=2), dict(search_every=3)):
        assert len(set(labels(effopd, effopd | other))) == 2


def test_seeds_with_other_checkpoints_have_no_mean(runs, tmp_path, capsys):
    other = copied(runs, "opd-s1", tmp_path / "other", keep_last=1)
    shutil.rmtree(other / "checkpoints" / "step_000002")
    with pytest.raises(SystemExit):
        analyze.main([str(runs / "runs" / "opd-s0"), str(other), "--out_dir", str(tmp_path / "out")])
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("analyze.py: ") and "--keep_last" in said and str(other) in said


def test_runs_without_a_teacher(runs, tmp_path, capsys):
    """--method sft --data may have none; then another run's serves, and without any the SVDs are not even begun."""
    real = dict(data=__file__, student="somewhere")
    alone = copied(runs, "sft-s0", tmp_path / "alone", **real, teacher="")
    taught = copied(runs, "opd-s0", tmp_path / "taught", **real, teacher="elsewhere")
    assert analyze.load_runs([alone, taught])[3].teacher == analyze.load_runs([taught])[3].teacher == "elsewhere"
    with pytest.raises(SystemExit):
        analyze.main([str(alone), "--out_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err.strip() == ("analyze.py: none of these runs has a teacher to measure the KL to; "
                                               "--base and --checkpoints need none")


def test_weights_alone(pair, tmp_path, capsys):
    folder, _ = pair
    analyze.main(["--base", str(folder / "base"), "--checkpoints", str(folder / "step_000004"), str(folder / "final"),
                  "--out_dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert {"update_norms", "embeddings", "spectrum", "directions", "paths"} < set(results)
    assert "norm_scaling" not in results and capsys.readouterr().out.count("paper says") == 5
    assert sorted(p.name[0] for p in (tmp_path / "out").glob("*.png")) == ["2", "4", "5", "6", "9"]
    analyze.main(["--base", str(folder / "base"), "--checkpoints", str(folder / "final"),
                  "--out_dir", str(tmp_path / "one")])
    assert sorted(p.name[0] for p in (tmp_path / "one").glob("*.png")) == ["2", "4", "5"]      # no path from one point


@pytest.mark.parametrize("args, words", [
    (["nowhere"], "no directory nowhere"), (["--base", "nowhere", "--checkpoints", "also"], "no directory nowhere"),
    (["--base", "empty"], "--checkpoints"), (["--checkpoints", "empty"], "--base"),
    (["empty", "--base", "a", "--checkpoints", "b"], "run directories, or"),
    (["empty"], "no finished run"), (["--base", "empty", "--checkpoints", "empty"], "no model*.safetensors"),
    (["--problems", "0"], "--problems"), (["--problems", "x"], "--problems"), (["--nonsense"], "--nonsense"),
    ([], "--method opd"),
    (["--base", "small", "--checkpoints", "wide"], "is (11, 16) in small and (11, 32) in wide"),
    (["--base", "small", "--checkpoints", "deep"], "missing in small"), (["unfinished"], "no finished run"),
    (["--base", "small", "--checkpoints", "small"], "did not move"),
    (["--base", "flat", "--checkpoints", "flat"], "no matrices"),
    (["--base", "small", "--checkpoints", "broken"], "broken/model.safetensors: "),
    (["small", "--out_dir", "flat/model.safetensors"], "exists")])
def test_bad_input_ends_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    for name, shape in (("small", (16, 24, 1, 2)), ("wide", (32, 24, 1, 2)), ("deep", (16, 24, 2, 2))):
        GPT(GPTConfig(11, *shape)).save_pretrained(tmp_path / name)
    (tmp_path / "flat").mkdir()
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "flat" / "model.safetensors")
    (tmp_path / "broken").mkdir()
    whole = (tmp_path / "small" / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(SystemExit) as stopped:
        analyze.main(args)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("weights: ")]
    assert stopped.value.code not in (0, None) and words in said and said.startswith("analyze.py: ")


def test_runs_from_different_bases_are_not_compared(runs, tmp_path, capsys):
    config = Config(**TOY, method="opd", cache_dir=str(runs / "cache"))
    task = Chains(1, 1)
    torch.manual_seed(1)
    student = GPT(GPTConfig(17, 16, 24, 2, 2))
    (tmp_path / "other").mkdir()
    distil(config, task, student, load_models(config, task)[1], tmp_path / "other", "opd")
    with pytest.raises(SystemExit):
        analyze.main([str(runs / "runs" / "opd-s0"), str(tmp_path / "other"), "--out_dir", str(tmp_path / "out")])
    assert "different weights" in capsys.readouterr().err
