"""The metrics against NumPy and by hand, what is read from disk, and analyze.py end to end."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

import analyze
import train
from analyze import (Checkpoint, Trajectory, cosines, in_two_components, interval, rescaled,
                     truncated)
from effopd import (module_of, module_utility, singular_values, spectral_metrics,
                    subspace_alignment)
from model import GPT, GPTConfig

TOY = dict(num_ops=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, base_steps=150,
           teacher_steps=60, steps=4, batch_size=32, group_size=4, eval_size=20, lr=1e-3,
           device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def svd(matrix):
    return np.linalg.svd(matrix.double().numpy(), full_matrices=False)


# Spectra.

@pytest.mark.parametrize("noise", [None, 1e-3, 1e-6])         # beside rank 4; None: Gaussian
@pytest.mark.parametrize("shape", [(7, 7), (30, 12), (12, 30), (150, 220), (1, 5)])
def test_spectral_metrics_equal_numpy(shape, noise):
    delta = randn(*shape)
    if noise is not None:                                     # float32's Gram would lose it
        delta = randn(shape[0], 4, seed=1) @ randn(4, shape[1], seed=2) + noise * delta
    s = svd(delta)[1]
    p, k = s / s.sum(), math.ceil(len(s) / 100)
    norm = np.sqrt((s ** 2).sum())
    expected = dict(spectral_norm=s[0], spectral_ratio=s[0] / norm,
                    effective_rank=np.exp(-(p * np.log(p)).sum()), stable_rank=(norm / s[0]) ** 2,
                    top1_ratio=np.sqrt((s[:k] ** 2).sum()) / norm)
    for argument in (delta, torch.from_numpy(s), torch.from_numpy(s).flip(0)):
        assert spectral_metrics(argument) == pytest.approx(expected, rel=1e-5)


def test_spectral_metrics_by_hand():
    """Effective rank of σ, not σ²; the top-1% ratio of norms, not of energies: pitfall 24."""
    entropy = -4 / 7 * math.log(4 / 7) - 3 / 7 * math.log(3 / 7)
    assert spectral_metrics(torch.diag(torch.tensor([3.0, -4.0]))) == pytest.approx(dict(
        spectral_norm=4, spectral_ratio=4 / 5, stable_rank=25 / 16, top1_ratio=4 / 5,
        effective_rank=math.exp(entropy)), rel=1e-6)
    assert spectral_metrics(2 * torch.eye(9)) == pytest.approx(dict(
        spectral_norm=2, spectral_ratio=1 / 3, stable_rank=9, top1_ratio=1 / 3, effective_rank=9))
    sigma = torch.zeros(250)
    sigma[:4] = torch.tensor([2.0, 2.0, 1.0, 4.0])            # ceil(250 / 100) = 3: 4, 2 and 2
    assert spectral_metrics(sigma)["top1_ratio"] == pytest.approx(math.sqrt(24 / 25))
    assert set(spectral_metrics(torch.zeros(3, 3)).values()) == {0.0}
    half = randn(20, 20).bfloat16()
    assert spectral_metrics(half) == pytest.approx(spectral_metrics(half.float()), rel=1e-6)


def test_singular_values_are_those_it_was_made_of_and_rounding_is_zero():
    U, V = (torch.linalg.qr(randn(n, 6, seed=n).double()).Q for n in (20, 9))
    sigma = torch.tensor([100.0, 1.0, 1e-2, 1e-4, 1e-5, 0.0], dtype=torch.float64)
    for delta in (U * sigma @ V.T, V * sigma @ U.T):
        values = singular_values(delta)
        torch.testing.assert_close(values[:5], sigma[:5], rtol=1e-2, atol=0)
        assert len(values) == 9 and values[5:].eq(0).all()


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, 2), torch.tensor(1.0), torch.zeros(0, 3),
                                   torch.full((2, 2), math.nan)])
def test_no_spectrum(wrong):
    with pytest.raises(ValueError, match="finite"):
        spectral_metrics(wrong)


def test_the_gaussian_null_is_the_quarter_circle():
    """Singular values of a square Gaussian fill 0 .. 2 sqrt(r): σ1 / norm = 2 / sqrt(r)."""
    sigma = analyze.gaussian_sigma((300, 300))
    metrics = spectral_metrics(sigma)
    assert sigma.norm().item() == pytest.approx(1)
    assert metrics["spectral_ratio"] == pytest.approx(2 / 300 ** 0.5, rel=0.05)
    assert metrics["stable_rank"] == pytest.approx(75, rel=0.1)
    assert 0.7 * 300 < metrics["effective_rank"] < 0.9 * 300


# Subspaces and paths.

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 3, 12, range(1, 21), [2, 5]])
def test_subspace_alignment_equals_numpy(k, side):
    a, b = randn(30, 12), randn(30, 12, seed=1) + 0.5 * randn(30, 12)
    expected = []
    for i in [k] if isinstance(k, int) else k:
        bases = [svd(matrix)[0][:, :min(i, 12)] for matrix in (a, b)]
        angles = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)          # their cosines
        expected.append((angles ** 2).mean())
    if side == "right":
        a, b = a.T, b.T
    assert subspace_alignment(a, b, k, side) == pytest.approx(np.mean(expected), rel=1e-5)
    assert subspace_alignment(b, a, k, side) == pytest.approx(np.mean(expected), rel=1e-5)


def test_subspace_alignment_by_hand():
    e = torch.eye(4)
    a, turned = torch.outer(e[0], e[0]), torch.outer(e[0], e[1])
    assert subspace_alignment(a, turned, 1, "left") == 1
    assert subspace_alignment(a, turned, 1, "right") == 0
    c, s = math.cos(0.3), math.sin(0.3)
    d, rotation = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[c, -s], [s, c]])
    assert subspace_alignment(d, rotation @ d, 1) == pytest.approx(c * c, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 2) == pytest.approx(1, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 1, "right") == pytest.approx(1, abs=1e-6)
    pairs = [subspace_alignment(randn(40, 40, seed=i), randn(40, 40, seed=99 + i), 10)
             for i in range(20)]
    assert np.mean(pairs) == pytest.approx(10 / 40, rel=0.1)  # not 0: why a null belongs beside it


@pytest.mark.parametrize("a, b, side, words", [
    (torch.eye(2), torch.eye(3), "left", "shapes"), (torch.eye(2), torch.eye(2), "top", "side"),
    (torch.eye(2), torch.zeros(2, 2), "left", "zero"), (torch.ones(2), torch.ones(2), "left", "s")])
def test_no_alignment(a, b, side, words):
    with pytest.raises(ValueError, match=words):
        subspace_alignment(a, b, 1, side)


def test_a_random_walk_aligns_more_and_more_with_its_end():
    """Pitfall 25. Its cosine to the end is sqrt(t / T), to what is left 0; its subspaces rise."""
    steps = (1, 4, 16, 64)
    walk = analyze.walk_alignment((60, 50), steps)
    assert (np.diff(walk) > 0).all() and walk[-1] == pytest.approx(1, abs=1e-4)
    chance = np.mean([k * (1 / 60 + 1 / 50) / 2 for k in range(1, 21)])
    assert walk[0] == pytest.approx(chance, abs=0.1)          # one step of 64
    path = torch.cumsum(randn(64, 20_000), 0)[[t - 1 for t in steps]].double()
    to_end, to_rest = cosines(path @ path.T)
    assert to_end.tolist() == pytest.approx([(t / 64) ** 0.5 for t in steps], abs=0.03)
    assert to_rest.tolist() == pytest.approx([0.0] * 4, abs=0.03)


def test_cosines_by_hand():
    turn = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double()    # to (1, 0), then on by (1, 1)
    to_end, to_rest = cosines(turn @ turn.T)
    assert to_end.tolist() == pytest.approx([2 / 5 ** 0.5, 1])
    assert to_rest.tolist() == pytest.approx([0.5 ** 0.5, 0])
    for ahead in (0.0, 1e-9):                                 # there already, but for rounding
        line = (1 + torch.tensor([0.0, ahead]).double()[:, None]) * randn(1, 99).double()
        assert cosines(line @ line.T)[1].tolist() == [0, 0]


def test_variance_in_two_components_equals_numpys():
    points = np.vstack([np.zeros(40), np.cumsum(randn(6, 40).numpy(), axis=0)])
    s = np.linalg.svd(points - points.mean(0), compute_uv=False)
    gram = torch.from_numpy(points[1:] @ points[1:].T)
    expected = 100 * (s[:2] ** 2).sum() / (s ** 2).sum()
    assert in_two_components(gram.double()) == pytest.approx(expected, rel=1e-4)


# Modules and their utility.

@pytest.mark.parametrize("name, module, role", [
    ("model.layers.3.self_attn.q_proj.weight", (3, "q"), "attention"),
    ("model.layers.3.self_attn.k_proj.bias", (3, "bias"), "attention"),
    ("model.layers.12.self_attn.v_proj.weight", (12, "v"), "attention"),
    ("model.layers.0.self_attn.o_proj.weight", (0, "o"), "attention"),
    ("_orig_mod.model.layers.1.mlp.up_proj.weight", (1, "up"), "mlp"),
    ("layers.1.mlp.down_proj.weight", (1, "down"), "mlp"),
    ("model.layers.1.post_attention_layernorm.weight", (1, "norm"), "norm"),
    ("model.layers.1.self_attn.q_norm.weight", (1, "norm"), "norm"),
    ("model.norm.weight", (None, "norm"), "norm"),
    ("model.embed_tokens.weight", (None, "embedding"), "embedding"),
    ("lm_head.weight", (None, "head"), "head"),
    ("model.layers.2.self_attn.qkv_proj.weight", (2, "qkv"), "attention"),       # Phi-3
    ("model.layers.2.mlp.gate_up_proj.weight", (2, "gate_up"), "mlp"),
    ("transformer.h.4.attn.c_attn.weight", (4, "qkv"), "attention"),             # GPT-2
    ("transformer.h.4.attn.c_proj.weight", (4, "o"), "attention"),
    ("transformer.h.4.mlp.c_fc.bias", (4, "bias"), "mlp"),
    ("transformer.h.4.mlp.c_proj.weight", (4, "down"), "mlp"),
    ("transformer.h.4.ln_1.bias", (4, "bias"), "norm"),
    ("transformer.wpe.weight", (None, "embedding"), "embedding"),
    ("model.decoder.layers.0.fc1.weight", (0, "fc1"), "other")])                 # OPT
def test_module_and_role(name, module, role):
    assert module_of(name) == module and analyze.role_of(name) == role


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
    step = 1e-4 * randn(4, 3, seed=2).double()                # any small step, against the loss
    gained = (loss(w) - loss(w + step)).item() / step.norm().item()
    assert module_utility(dict(w=g), dict(w=step))["w"] == pytest.approx(gained, rel=1e-2)


# Statistics.

@pytest.mark.parametrize("n", [2, 5, 6, 8, 30])
def test_the_interval_has_95_percent_of_students_t(n):
    s = interval([0.0, 2.0] * (n // 2) + [1.0] * (n % 2))
    assert s["mean"] == 1 and s["n"] == n
    assert s["mean"] - s["low"] == pytest.approx(s["high"] - s["mean"])
    error = np.std([0.0, 2.0] * (n // 2) + [1.0] * (n % 2), ddof=1) / n ** 0.5
    t, df = (s["high"] - 1) / error, n - 1
    x = np.linspace(0, t, 100_001)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = scale * (1 + x ** 2 / df) ** (-(df + 1) / 2)
    assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=3e-4)


def test_intervals_of_lists_of_dicts_and_of_nothing():
    lists = interval([[1.0, 5.0], [3.0, 5.0]])
    assert lists["mean"] == [2.0, 5.0] and lists["high"] == pytest.approx([14.706, 5.0], abs=1e-3)
    assert interval([{"a": {"b": 1.0}}, {"a": {"b": 3.0}}])["a"]["b"]["mean"] == 2
    assert interval([None, 4.0]) == dict(mean=4.0, low=None, high=None, n=1)
    assert interval([None]) == interval([]) == dict(mean=None, low=None, high=None, n=0)
    numbers = {"OPD": {"x": interval([1.0, 2.0])}, "RL": {"x": interval([None])}}
    assert analyze.say(numbers, "x") == "OPD 1.5 ± 6.4, RL -"


# Reading.

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tied base and two later selves on disk, and their weights."""
    folder, states = tmp_path_factory.mktemp("pair"), []
    model = GPT(GPTConfig(11, 16, 24, 2, 2))
    for i, name in enumerate(("base", "step_000004", "final")):
        for n, p in enumerate(model.parameters()):
            p.data += 0.01 * randn(*p.shape, seed=100 * i + n) if i else 0.0
        model.save_pretrained(folder / name)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return folder, states


def trajectory(folder, *names):
    points = [Checkpoint(folder / name) for name in names]
    return Trajectory(Checkpoint(folder / "base"), points, list(range(1, 1 + len(points))))


def test_what_is_kept_of_the_updates(pair):
    folder, (base, early, final) = pair
    run = trajectory(folder, "step_000004", "final")
    deltas = [{name: w - base[name] for name, w in state.items()} for state in (early, final)]
    flat = [torch.cat([d.flatten() for d in delta.values()]).double().numpy() for delta in deltas]
    assert run.gram.numpy() == pytest.approx(np.array(flat) @ np.array(flat).T, rel=1e-5)
    assert run.squares == pytest.approx({n: d.norm().item() ** 2 for n, d in deltas[1].items()})
    assert len(run.sigmas) == 14 and set(run.squares) == set(base)
    alignments = []
    for name, sigmas in run.sigmas.items():
        assert sigmas[0].numpy() == pytest.approx(svd(deltas[0][name])[1], abs=1e-6)
        for side in ("left", "right"):
            pair_of = deltas[0][name], deltas[1][name]
            alignments.append(subspace_alignment(*pair_of, range(1, 21), side))
    assert run.alignment == pytest.approx([np.mean(alignments), 1], abs=1e-4)
    rows = [float(x @ y / (x.norm() * y.norm())) for x, y in
            zip(base["model.embed_tokens.weight"], final["model.embed_tokens.weight"])]
    assert run.embedding_cosine == pytest.approx(np.mean(rows), abs=1e-5)


def test_blocks_of_rows_shards_and_a_stored_head_change_nothing(pair, tmp_path, monkeypatch):
    """Only the shards that the index names are read; a tied head is one entry: pitfall 22."""
    folder, _ = pair
    whole = trajectory(folder, "final")
    shutil.copytree(folder / "base", tmp_path / "base")
    state = load_file(folder / "final" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    shards, files = tmp_path / "final", ("a.safetensors", "b.safetensors")
    shards.mkdir()
    names = [sorted(state)[:5], sorted(state)[5:]]
    for file, part in zip(files, names):
        save_file({name: state[name] for name in part}, shards / file)
    save_file({"old": torch.ones(3)}, shards / "model.safetensors")              # not in the index
    index = {name: file for file, part in zip(files, names) for name in part}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    most, read = [], Checkpoint.read

    def recorded(self, name, rows=slice(None)):
        tensor = read(self, name, rows)
        if rows != slice(None):
            most.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", recorded)
    monkeypatch.setattr(analyze, "BLOCK", 64)
    blocks = trajectory(tmp_path, "final")
    assert set(Checkpoint(shards).shapes) == set(whole.squares)
    assert max(most) <= 64 and blocks.squares == pytest.approx(whole.squares)
    assert blocks.embedding_cosine == pytest.approx(whole.embedding_cosine)


def test_rows_that_did_not_move_are_left_out_of_the_embedding_cosine(pair, tmp_path):
    folder, _ = pair
    state = load_file(folder / "base" / "model.safetensors")
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "moved").mkdir()
    state["model.embed_tokens.weight"][3] *= -1
    state["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(state, tmp_path / "moved" / "model.safetensors")
    assert trajectory(tmp_path, "moved").embedding_cosine == pytest.approx(-1)


# Interventions.

def test_parts_of_the_directions():
    delta = {"w": randn(16, 24), "v": randn(24, 16, seed=1)}
    svds = {name: torch.linalg.svd(d, full_matrices=False) for name, d in delta.items()}
    halves = [truncated(svds, 50, end) for end in ("top", "bottom")]             # 8 of 16 each
    for name, d in delta.items():
        torch.testing.assert_close(truncated(svds, 100, "top")[name], d, atol=1e-5, rtol=0)
        torch.testing.assert_close(halves[0][name] + halves[1][name], d, atol=1e-5, rtol=0)
        sigma = svd(truncated(svds, 25, "top")[name])[1]
        assert sigma[:4] == pytest.approx(svd(d)[1][:4], abs=1e-4) and sigma[4] < 1e-5
        assert torch.linalg.matrix_rank(truncated(svds, 1, "bottom")[name]) == 1


def test_an_early_update_rescaled():
    early = {"a": torch.tensor([[2.0]]), "b": randn(3, 4), "zero": torch.zeros(2)}
    final = {"a": torch.tensor([[-6.0]]), "b": 5 * randn(3, 4, seed=1), "zero": torch.ones(2)}
    assert rescaled(early, final, 0.5)["a"].item() == 4.0     # 2 (1 + 0.5 (6 / 2 - 1))
    for name, d in rescaled(early, final, 0.0).items():
        torch.testing.assert_close(d, early[name])
    stretched = rescaled(early, final, 1.0)
    assert stretched["b"].norm().item() == pytest.approx(final["b"].norm().item(), rel=1e-5)
    assert torch.cosine_similarity(stretched["b"].flatten(), early["b"].flatten(), 0) > 0.9999
    assert not stretched["zero"].any()


def test_what_the_interventions_keep():
    """The updates that are assessed, of a study that only looks at them."""
    up = "layers.0.mlp.up_proj.weight"

    class Look:
        task, start, runs, seen = True, [0.1, 2.0], [], []

        def update(self, run):
            return {"lm_head.weight": randn(5, 4), "model.embed_tokens.weight": randn(5, 4),
                    "model.norm.weight": randn(4), up: 3 * randn(8, 4)}

        def accuracy(self, update, alpha=1.0):
            self.seen.append({name: alpha * d for name, d in update.items()})
            return len(self.seen) / 100

    look = Look()
    run = SimpleNamespace(end=[0.5, 1.0], embedding_cosine=0.9, sigmas={up: None},
                          squares={up: 4.0, "model.norm.weight": 9.0})
    look.runs.append(run)
    analyze.measure_embeddings(look, run)
    assert list(look.seen.pop()) == ["model.norm.weight", up]
    analyze.measure_low_rank(look, run)
    norms = [update[up].norm().item() for update in look.seen]
    top, half, noise = norms[:6], norms[6], norms[-1]
    assert [*top, noise] == pytest.approx([2.0] * 7)          # the smallest norm of the matrices
    look.start, look.colder, run.end = [0.4, 0.2], [[0.4, 0.2], [0.6, 0.3], [0.5, 0.1]], [0.8, 0.04]
    scalar = analyze.measure_one_scalar(look, run)
    assert scalar["% of the gain in accuracy"] == pytest.approx(50)
    assert scalar["% of the fall in KL"] == pytest.approx(62.5)
    assert half == pytest.approx(3 * np.linalg.norm(svd(randn(8, 4))[1][2:]))    # as it is


# End to end.

def train_toy(home, directory, **settings):
    options = TOY | dict(cache_dir=home / "cache", out_dir=home / directory) | settings
    train.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    return home / directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    train_toy(home, "runs/opd", method="opd")
    train_toy(home, "runs/opd-1", method="opd", seed=1, eval_every=2)
    train_toy(home, "runs/rl", method="rl")
    return home


@pytest.fixture(scope="module")
def answers(home):
    runs = [str(home / "runs" / name) for name in ("rl", "opd", "opd-1")]
    analyze.main([*runs, "--problems", "15", "--out_dir", str(home / "analysis")])
    return json.loads((home / "analysis" / "analysis.json").read_text())


def test_three_runs_from_end_to_end(home, answers):
    """Ten questions, the norms and shares against the files themselves."""
    assert list(answers) == list(analyze.QUESTIONS)
    assert all(list(numbers) == ["OPD", "RL"] for numbers in answers.values())
    pictures = sorted(path.name for path in (home / "analysis").glob("*.png"))
    assert len(pictures) == 10 and "10_one_scalar.png" in pictures
    base, final = weights_of(home / "runs" / "rl", "step_000000", "final")
    squares = {name: (final[name] - w).double().square().sum().item() for name, w in base.items()}
    norm = sum(squares.values()) ** 0.5
    scaling, shares = answers["norm_scaling"]["RL"], answers["update_norms"]["RL"]
    assert scaling["norms"]["mean"][-1] == pytest.approx(norm, rel=1e-5)
    in_mlp = sum(square for name, square in squares.items() if "mlp" in name)
    assert shares["% in mlp"]["mean"] == pytest.approx(100 * in_mlp / norm ** 2, rel=1e-5)
    sizes = {name: w.numel() for name, w in base.items()}
    by_chance = sizes["model.embed_tokens.weight"] / sum(sizes.values())
    share = squares["model.embed_tokens.weight"] / norm ** 2
    density = shares["modules"]["embedding"]["mean"]
    assert density == pytest.approx(share / by_chance, rel=1e-5)
    ranks = [spectral_metrics(final[n] - base[n])["effective_rank"] for n in base if "proj" in n]
    assert answers["spectra"]["RL"]["effective rank"]["mean"] == pytest.approx(np.mean(ranks), 1e-4)
    opd = answers["norm_scaling"]["OPD"]["norms"]
    assert opd["n"] == 2 and opd["low"][-1] < opd["mean"][-1] < opd["high"][-1]
    assert scaling["equal norm"]["mean"] == pytest.approx(min(norm, opd["mean"][-1]), rel=0.1)
    assert answers["alignment"]["RL"]["progress"]["mean"] == [0.25, 0.5, 1.0]    # no step_000004


def weights_of(run, *names):
    return [load_file(run / "checkpoints" / name / "model.safetensors") for name in names]


def accuracy_and_kl(config, weights, temperature=1.0):
    """Of these weights, by train.py and torch's own KL."""
    task, student, teacher, _ = train.load(config)
    student.load_state_dict(weights, strict=False)
    problems = train.evaluation_problems(config, task)[:15]
    right, rows = train.evaluate(student, task, problems, temperature=temperature)
    total = 0.0
    for problem, row in zip(problems, rows):
        ids = torch.tensor([task.encode(problem) + row])
        with torch.no_grad():
            log_p = F.log_softmax(student(ids)[0, -len(row) - 1:-1] / temperature, -1)
            log_q = F.log_softmax(teacher(ids)[0, -len(row) - 1:-1], -1)
        total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    return right, total / sum(map(len, rows))


def test_accuracies_and_kls_are_those_of_the_intervened_weights(home, answers):
    run = home / "runs" / "rl"
    config, _ = analyze.read_run(run)
    base, early, final = weights_of(run, "step_000000", "step_000001", "final")
    start, end = accuracy_and_kl(config, base), accuracy_and_kl(config, final)

    def found(question, key, i=...):
        return np.array(answers[question]["RL"][key]["mean"])[i]

    assert start[0] > end[0] + 0.05                           # so that something can be seen
    for i, temperature in enumerate(train.TEMPERATURES[:-1]):                    # 0: its limit
        accuracy, kl = accuracy_and_kl(config, base, temperature)
        assert found("one_scalar", "accuracy", i) == accuracy
        assert found("one_scalar", "KL", i) == pytest.approx(kl, rel=1e-4)
    ends = answers["one_scalar"]["RL"]["end"]
    assert (ends["accuracy"]["mean"], ends["KL"]["mean"]) == pytest.approx(end, rel=1e-4)
    near = {name: w + 0.4 * (final[name] - w) for name, w in base.items()}
    assert found("norm_scaling", "accuracies", 2) == accuracy_and_kl(config, near)[0]
    back = final | {"model.embed_tokens.weight": base["model.embed_tokens.weight"]}
    assert found("embeddings", "with the base's") == accuracy_and_kl(config, back)[0]
    in_window = [name for name in base if "layers.1.mlp" in name and "proj" in name]
    gained = accuracy_and_kl(config, base | {name: final[name] for name in in_window})[0]
    left = accuracy_and_kl(config, final | {name: base[name] for name in in_window})[0]
    norm = math.sqrt(sum((final[n] - base[n]).square().sum().item() for n in in_window))
    assert found("utility", "mlp utility", 1) == pytest.approx((gained - start[0]) / norm, rel=1e-4)
    assert found("utility", "mlp lost", 1) == pytest.approx(end[0] - left)
    deltas = {name: (early[name] - w, final[name] - w) for name, w in base.items()}
    stretched = {name: base[name] + a * b.norm() / a.norm() for name, (a, b) in deltas.items()}
    kl = accuracy_and_kl(config, stretched)[1]
    assert found("early_rescaled", "KL", analyze.BETAS.index(1.0)) == pytest.approx(kl, rel=1e-3)


def test_figures_drawn_again_are_the_same(home, answers, tmp_path, capsys):
    analyze.main(["--redraw", str(home / "analysis" / "analysis.json"), "--out_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("paper says") == said.count("these runs") == 10
    for path in (home / "analysis").glob("*.png"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_newest_comparable_run_of_each_method(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("runs/opd", "runs/race/opd")              # a race's
    rewrite("runs/race/opd", gap="slip")
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    for age, name in enumerate(("rl", "race/opd", "opd-1", "opd")):
        train.os.utime(f"runs/{name}/summary.json", (1e9 - age, 1e9 - age))
    assert [path.as_posix() for path in analyze.newest_runs()] == ["runs/rl", "runs/opd-1"]
    assert analyze.expand(train.Path("runs/race")) == [train.Path("runs/race/opd")]
    shutil.rmtree("runs/rl")
    analyze.newest_runs()
    assert "--method rl" in capsys.readouterr().out


def rewrite(directory, **settings):
    path = train.Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_runs_that_differ_in_a_setting_are_no_seeds():
    def labels(*runs):
        configs = {i: (train.Config(**TOY | settings), name)
                   for i, (name, settings) in enumerate(runs)}
        return list(analyze.labels_of(configs).values())

    assert labels(("OPD", dict(seed=1, out_dir="a")), ("OPD", dict(eval_every=1))) == ["OPD"] * 2
    assert labels(("OPD", {}), ("OPD", dict(lr=0.5)), ("RL", {})) == [
        "OPD, lr 0.001", "OPD, lr 0.5", "RL"]


# Weights alone.

def toy_phi3():
    return Phi3ForCausalLM(Phi3Config(
        vocab_size=23, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def toy_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=8, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("make, mlp, attention", [
    (toy_phi3, ("gate_up_proj", "down_proj"), ("qkv_proj", "o_proj")),
    (toy_gpt2, (".mlp.",), (".attn.",))])
def test_weights_alone_of_other_families(make, mlp, attention, tmp_path, capsys):
    torch.manual_seed(0)
    model = make()
    tokens = model.get_input_embeddings().weight
    rows = tokens.detach().clone()
    for i, name in enumerate(("base", "ckpt-10", "ckpt-20")):
        for n, p in enumerate(model.parameters()):
            p.data += 0.01 * i * randn(*p.shape, seed=100 * i + n)
        model.save_pretrained(tmp_path / name)
    analyze.main(["--base", str(tmp_path / "base"), "--out_dir", str(tmp_path / "out"),
                  "--checkpoints", str(tmp_path / "ckpt-10"), str(tmp_path / "ckpt-20")])
    said = capsys.readouterr()
    assert said.out.count("paper says") == 5 and "warning" not in said.err
    answers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    turned = 1 - F.cosine_similarity(rows, tokens).mean().item()
    found = answers["embeddings"]["checkpoints"]["1 - cosine"]["mean"]
    assert found == pytest.approx(turned, rel=1e-3)
    shares = answers["update_norms"]["checkpoints"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    roles = dict(mlp=mlp, attention=attention, embedding=("embed_", ".wte", ".wpe"))
    for role, words in roles.items():
        size = sum(n for name, n in sizes.items() if any(word in name for word in words))
        expected = 100 * size / sum(sizes.values())
        assert shares[f"% of parameters in {role}"]["mean"] == pytest.approx(expected)
        assert shares[f"% in {role}"]["mean"] == pytest.approx(expected, rel=0.1)    # white noise
    assert answers["alignment"]["checkpoints"]["progress"]["mean"] == [0.5, 1.0]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


def test_one_checkpoint_is_no_path_and_doubts_are_said(pair, tmp_path, capsys):
    """Half precision: pitfall 23. Names that nobody knows."""
    folder, _ = pair
    for name in ("base", "final"):
        state = load_file(folder / name / "model.safetensors")
        state["model.layers.0.mixer.weight"] = torch.ones(3, 3)
        (tmp_path / name).mkdir()
        half = {n: w.bfloat16() for n, w in state.items()}
        save_file(half, tmp_path / name / "model.safetensors")
    analyze.main(["--base", str(tmp_path / "base"), "--checkpoints", str(tmp_path / "final"),
                  "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "analyse float32 checkpoints" in said and "layers.0.mixer.weight" in said
    assert sorted(path.name[0] for path in (tmp_path / "out").glob("*.png")) == ["2", "4", "5"]


# What is refused, in one line.

@pytest.mark.parametrize("change, words", [
    (dict(gap="slip"), "--gap slip and habit"), (dict(teacher_steps=9), "--teacher_steps 9 and 60"),
    ("base", "different weights"), ("final", "final has no model.safetensors"),
    ("summary.json", "no finished run"),
    (dict(student="SmolLM2"), "--base and --checkpoints")])
def test_runs_that_are_not_analysed(change, words, home, tmp_path, capsys):
    shutil.copytree(home / "runs" / "opd-1", tmp_path / "other")
    checkpoints = tmp_path / "other" / "checkpoints"
    if change == "base":
        shutil.copy(checkpoints / "final" / "model.safetensors", checkpoints / "step_000000")
    elif change == "final":
        shutil.rmtree(checkpoints / "final")
    elif change == "summary.json":
        (tmp_path / "other" / change).unlink()
    else:
        rewrite(tmp_path / "other", **change)
    refused([str(home / "runs" / "opd"), str(tmp_path / "other")], words, tmp_path, capsys)


def refused(args, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze.main([*args, "--out_dir", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    said = [line for line in lines if line.strip() and not line.startswith("weights of")]
    assert stopped.value.code == 2 and len(said) == 1
    assert said[0].startswith("analyze.py: ") and words in said[0]


@pytest.mark.parametrize("args, words", [
    ("nowhere", "nowhere is no finished run"), ("", "python train.py makes three"),
    ("--base nowhere --checkpoints a", "nowhere"), ("--base small", "go together"),
    ("--checkpoints small", "go together"), ("small --redraw x.json", "or nothing"),
    ("--problems 0", "--problems"), ("--problems x", "--problems"), ("--nonsense", "--nonsense"),
    ("--base small --checkpoints wide", "is (11, 16) in small and (11, 32) in wide"),
    ("--base small --checkpoints deep", "missing in small"),
    ("--base small --checkpoints small", "did not move"),
    ("--base flat --checkpoints flat", "no attention or MLP"),
    ("--base small --checkpoints broken", "is damaged"),
    ("--redraw nowhere.json", "nowhere.json"), ("--redraw old.json", "no numbers of this"),
    ("--redraw small/model.safetensors", "small/model.safetensors")])
def test_bad_input(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, width, depth in (("small", 16, 1), ("wide", 32, 1), ("deep", 16, 2)):
        GPT(GPTConfig(11, width, 24, depth, 2)).save_pretrained(tmp_path / name)
    for name in ("flat", "broken"):
        (tmp_path / name).mkdir()
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "flat" / "model.safetensors")
    whole = (tmp_path / "small" / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:-9])
    (tmp_path / "old.json").write_text(json.dumps({"compared_steps": {}}))
    refused(args.split(), words, tmp_path, capsys)
