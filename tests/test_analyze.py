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
START = "checkpoints/step_000000/model.safetensors"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def svd(matrix):
    return np.linalg.svd(matrix.double().numpy(), full_matrices=False)


# Spectra.

@pytest.mark.parametrize("noise", [None, 1e-3, 1e-6])         # beside rank 4; None: Gaussian
@pytest.mark.parametrize("shape", [(7, 7), (12, 30), (220, 150), (1, 5)])
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
    for argument in (delta, torch.from_numpy(s).flip(0)):
        assert spectral_metrics(argument) == pytest.approx(expected, rel=1e-5)


def test_spectral_metrics_by_hand():
    """Effective rank of σ, not σ²; the top-1% ratio of norms, not of energies: pitfall 24."""
    entropy = -4 / 7 * math.log(4 / 7) - 3 / 7 * math.log(3 / 7)
    assert spectral_metrics(torch.diag(torch.tensor([3.0, -4.0]))) == pytest.approx(dict(
        spectral_norm=4, spectral_ratio=4 / 5, stable_rank=25 / 16, top1_ratio=4 / 5,
        effective_rank=math.exp(entropy)), rel=1e-6)
    sigma = torch.zeros(250)
    sigma[:4] = torch.tensor([2.0, 2.0, 1.0, 4.0])            # ceil(250 / 100) = 3: 4, 2 and 2
    assert spectral_metrics(sigma)["top1_ratio"] == pytest.approx(math.sqrt(24 / 25))
    assert set(spectral_metrics(torch.zeros(3, 3)).values()) == {0.0}


def test_singular_values_are_those_it_was_made_of_and_rounding_is_zero():
    U, V = (torch.linalg.qr(randn(n, 6, seed=n).double()).Q for n in (20, 9))
    sigma = torch.tensor([100.0, 1.0, 1e-2, 1e-4, 1e-5, 0.0], dtype=torch.float64)
    for delta in (U * sigma @ V.T, V * sigma @ U.T):
        values = singular_values(delta)
        torch.testing.assert_close(values[:5], sigma[:5], rtol=1e-2, atol=0)
        assert len(values) == 9 and values[5:].eq(0).all()


def test_the_gaussian_null_is_the_quarter_circle():
    """Singular values of a square Gaussian fill 0 .. 2 sqrt(r): σ1 / norm = 2 / sqrt(r)."""
    sigma = analyze.gaussian_sigma((300, 300))
    metrics = spectral_metrics(sigma)
    assert sigma.norm().item() == pytest.approx(1)
    assert metrics["spectral_ratio"] == pytest.approx(2 / 300 ** 0.5, rel=0.05)
    assert metrics["stable_rank"] == pytest.approx(75, rel=0.1)


# Subspaces and paths.

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 12, range(1, 21)])
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


def test_subspace_alignment_by_hand():
    c, s = math.cos(0.3), math.sin(0.3)
    d, rotation = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[c, -s], [s, c]])
    assert subspace_alignment(d, rotation @ d, 1) == pytest.approx(c * c, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 2) == pytest.approx(1, abs=1e-6)
    assert subspace_alignment(d, rotation @ d, 1, "right") == pytest.approx(1, abs=1e-6)
    pairs = [subspace_alignment(randn(40, 40, seed=i), randn(40, 40, seed=99 + i), 10)
             for i in range(20)]
    assert np.mean(pairs) == pytest.approx(10 / 40, rel=0.1)  # not 0: why a null belongs beside it


@pytest.mark.parametrize("metric, args, words", [
    (spectral_metrics, (torch.zeros(2, 2, 2),), "finite"),
    (spectral_metrics, (torch.zeros(0, 3),), "finite"),
    (spectral_metrics, (torch.full((2, 2), math.nan),), "finite"),
    (subspace_alignment, (torch.eye(2), torch.eye(3), 1), "shapes"),
    (subspace_alignment, (torch.eye(2), torch.eye(2), 1, "top"), "side"),
    (subspace_alignment, (torch.eye(2), torch.zeros(2, 2), 1), "zero")])
def test_what_has_no_spectrum_or_no_alignment(metric, args, words):
    with pytest.raises(ValueError, match=words):
        metric(*args)


def test_a_random_walk_aligns_more_and_more_with_its_end():
    """Pitfall 25: all of it by construction. Here against AdamW on random gradients."""
    steps = (1, 4, 16, 64)
    walk = analyze.walk_alignment((60, 50), steps)
    assert (np.diff(walk) > 0).all() and walk[-1] == pytest.approx(1, abs=1e-4)
    chance = np.mean([k * (1 / 60 + 1 / 50) / 2 for k in range(1, 21)])
    assert walk[0] == pytest.approx(chance, abs=0.1)          # one step of 64
    p = torch.zeros(20_000, requires_grad=True)
    optimizer, path = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 1 - 1e-6), weight_decay=0), []
    for gradient in randn(64, 20_000).sign():                 # of one size, as in theory
        p.grad = gradient
        optimizer.step()
        path.append(p.detach().double().clone())
    path = torch.stack(path)[[t - 1 for t in steps]]
    for ours, theirs in zip(cosines(analyze.walk_gram(steps)), cosines(path @ path.T)):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=0.03)
    without = cosines(analyze.walk_gram(steps, momentum=0.0))
    assert without[0].tolist() == pytest.approx([(t / 64) ** 0.5 for t in steps])
    assert without[1].tolist() == pytest.approx([0.0] * 4)


def test_cosines_by_hand():
    turn = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double()    # to (1, 0), then on by (1, 1)
    to_end, to_rest = cosines(turn @ turn.T)
    assert to_end.tolist() == pytest.approx([2 / 5 ** 0.5, 1])
    assert to_rest.tolist() == pytest.approx([0.5 ** 0.5, 0])
    there = (1 + torch.tensor([[0.0], [1e-9]]).double()) * randn(1, 99).double()
    assert cosines(there @ there.T)[1].tolist() == [0, 0]     # only rounding remains


def in_two_by_numpy(points):
    s = np.linalg.svd(points - points.mean(0), compute_uv=False)
    return 100 * (s[:2] ** 2).sum() / (s ** 2).sum()


def test_variance_in_two_components_equals_numpys():
    points = np.vstack([np.zeros(40), np.cumsum(randn(6, 40).numpy(), axis=0)])
    gram = torch.from_numpy(points[1:] @ points[1:].T)
    assert in_two_components(gram.double()) == pytest.approx(in_two_by_numpy(points), rel=1e-4)


def test_a_path_beside_its_line():
    points = torch.tensor([[1.0, 1.0], [2.0, -1.0], [4.0, 0.0]]).double()
    gram = points @ points.T
    run = SimpleNamespace(gram=gram, norms=gram.diagonal().sqrt(), steps=[1, 2, 3])
    numbers = analyze.measure_paths(None, run)
    assert numbers["along"] == pytest.approx([0, 1, 2, 4])
    assert numbers["aside"] == pytest.approx([0, 1, 1, 0])
    walk = in_two_components(analyze.walk_gram([1, 2, 3]))
    assert numbers["of a random walk"] == walk
    steps = np.tril(np.ones((4, 3)), -1)                      # each step at a right angle
    without = in_two_components(analyze.walk_gram([1, 2, 3], momentum=0.0))
    assert without == pytest.approx(in_two_by_numpy(steps))


# Modules and their utility.

@pytest.mark.parametrize("name, module, role", [
    ("model.layers.3.self_attn.q_proj.weight", (3, "q"), "attention"),
    ("layers.3.self_attn.k_proj.bias", (3, "bias"), "attention"),
    ("_orig_mod.model.layers.12.mlp.up_proj.weight", (12, "up"), "mlp"),
    ("model.layers.1.post_attention_layernorm.weight", (1, "norm"), "norm"),
    ("model.layers.1.self_attn.q_norm.weight", (1, "norm"), "norm"),
    ("model.embed_tokens.weight", (None, "embedding"), "embedding"),
    ("lm_head.weight", (None, "head"), "head"),
    ("model.layers.2.mlp.gate_up_proj.weight", (2, "gate_up"), "mlp"),           # Phi-3
    ("transformer.h.4.attn.c_proj.weight", (4, "o"), "attention"),               # GPT-2
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
    g = w.grad
    worth = module_utility(dict(down=g, up=g, still=g, none=None),
                           dict(down=-0.1 * g, up=3 * g, still=0 * g, none=g))
    size = g.norm().item()
    assert worth == pytest.approx(dict(down=size, up=-size, still=0))
    step = 1e-4 * randn(4, 3, seed=2).double()                # any small step, against the loss
    gained = (loss(w) - loss(w + step)).item() / step.norm().item()
    assert module_utility(dict(w=g), dict(w=step))["w"] == pytest.approx(gained, rel=1e-2)


# Statistics.

@pytest.mark.parametrize("n", [2, 5, 6, 30])
def test_the_interval_has_95_percent_of_students_t(n):
    values = [0.0, 2.0] * (n // 2) + [1.0] * (n % 2)
    s = interval(values)
    assert s["mean"] == 1 and s["n"] == n
    assert s["mean"] - s["low"] == pytest.approx(s["high"] - s["mean"])
    t, df = (s["high"] - 1) * n ** 0.5 / np.std(values, ddof=1), n - 1
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
        move_and_save(model, folder / name, i)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return folder, states


def move_and_save(model, directory, i):
    """Adds noise of size 0.01 i to all weights."""
    for n, p in enumerate(model.parameters()):
        p.data += 0.01 * i * randn(*p.shape, seed=100 * i + n)
    model.save_pretrained(directory)


def save(state, directory):
    directory.mkdir()
    save_file(state, directory / "model.safetensors")


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
            two = deltas[0][name], deltas[1][name]
            alignments.append(subspace_alignment(*two, range(1, 21), side))
    assert run.alignment == pytest.approx([np.mean(alignments), 1], abs=1e-4)
    rows = F.cosine_similarity(base["model.embed_tokens.weight"],
                               final["model.embed_tokens.weight"])
    assert run.embedding_cosine == pytest.approx(rows.mean().item(), abs=1e-5)


def test_blocks_of_rows_shards_and_a_stored_head_change_nothing(pair, tmp_path, monkeypatch):
    """Only the shards that the index names are read; a tied head is one entry: pitfall 22."""
    folder, (base, _, final) = pair
    whole = trajectory(folder, "final")
    save(base, tmp_path / "base")
    names = [*final, "lm_head.weight"]
    state = final | {"lm_head.weight": final["model.embed_tokens.weight"].clone()}
    save({"old": torch.ones(3)}, tmp_path / "final")                             # not in the index
    files = {name: "a.safetensors" if i < 5 else "b.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file},
                  tmp_path / "final" / file)
    index = tmp_path / "final" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    monkeypatch.setattr(analyze, "BLOCK", 64)
    blocks = trajectory(tmp_path, "final")
    assert blocks.squares == pytest.approx(whole.squares)
    assert blocks.embedding_cosine == pytest.approx(whole.embedding_cosine)


def test_rows_that_did_not_move_are_left_out_of_the_embedding_cosine(pair, tmp_path):
    _, (base, _, _) = pair
    save(base, tmp_path / "base")
    state = {name: w.clone() for name, w in base.items()}
    state["model.embed_tokens.weight"][3] *= -1
    state["model.layers.0.mlp.up_proj.weight"] += 0.1
    save(state, tmp_path / "moved")
    assert trajectory(tmp_path, "moved").embedding_cosine == pytest.approx(-1)


# Interventions.

def test_parts_of_the_directions():
    d = randn(16, 24)
    svds = {"w": torch.linalg.svd(d, full_matrices=False)}
    top, bottom = (truncated(svds, 50, end)["w"] for end in ("top", "bottom"))   # 8 of 16 each
    torch.testing.assert_close(truncated(svds, 100, "top")["w"], d, atol=1e-5, rtol=0)
    torch.testing.assert_close(top + bottom, d, atol=1e-5, rtol=0)
    sigma = svd(truncated(svds, 25, "top")["w"])[1]
    assert sigma[:4] == pytest.approx(svd(d)[1][:4], abs=1e-4) and sigma[4] < 1e-5
    assert torch.linalg.matrix_rank(truncated(svds, 1, "bottom")["w"]) == 1


def test_an_early_update_rescaled():
    early = {"a": torch.tensor([[2.0]]), "b": randn(3, 4), "zero": torch.zeros(2)}
    final = {"a": torch.tensor([[-6.0]]), "b": 5 * randn(3, 4, seed=1), "zero": torch.ones(2)}
    assert rescaled(early, final, 0.5)["a"].item() == 4.0     # 2 (1 + 0.5 (6 / 2 - 1))
    stretched = rescaled(early, final, 1.0)
    ratio = final["b"].norm() / early["b"].norm()
    torch.testing.assert_close(stretched["b"], ratio * early["b"])
    assert not stretched["zero"].any()


def test_what_the_interventions_keep():
    """The updates that are assessed, of a study that only looks at them."""
    up, seen = "layers.0.mlp.up_proj.weight", []

    def look(update, alpha=1.0):
        seen.append({name: alpha * d for name, d in update.items()})
        return len(seen) / 100

    update = {"lm_head.weight": randn(5, 4), "model.embed_tokens.weight": randn(5, 4),
              "model.norm.weight": randn(4), up: 3 * randn(8, 4)}
    run = SimpleNamespace(end=[0.8, 0.04], embedding_cosine=0.9, sigmas={up: None},
                          squares={up: 4.0, "model.norm.weight": 9.0})
    longer = SimpleNamespace(sigmas={up: None}, squares={up: 25.0})
    study = SimpleNamespace(task=True, runs=[run, longer], start=[0.4, 0.2], accuracy=look,
                            update=lambda run: update,
                            colder=[[0.4, 0.2], [0.6, 0.3], [0.5, 0.1]])
    analyze.measure_embeddings(study, run)
    assert list(seen.pop()) == ["model.norm.weight", up]
    analyze.measure_low_rank(study, run)
    norms = [update[up].norm().item() for update in seen]
    top, half, noise = norms[:6], norms[6], norms[-1]
    assert [*top, noise] == pytest.approx([2.0] * 7)          # the smallest of the runs' norms
    assert half == pytest.approx(3 * np.linalg.norm(svd(randn(8, 4))[1][2:]))    # as it is
    scalar = analyze.measure_one_scalar(study, run)
    assert scalar["% of the gain in accuracy"] == pytest.approx(50)
    assert scalar["% of the fall in KL"] == pytest.approx(62.5)


def test_a_window_is_its_middle_and_the_layers_beside_it():
    """8 layers, windows of 3. Accuracy is here the number of matrices whose update is kept."""
    names = [f"layers.{i}.{module}.weight" for i in range(8)
             for module in ("mlp.up_proj", "self_attn.q_proj")]
    update = dict.fromkeys(names, torch.ones(4)) | {"model.norm.weight": torch.ones(4)}
    study = SimpleNamespace(base=SimpleNamespace(matrices=names), start=[1.0, 0.0], accuracy=len,
                            update=lambda run: update)
    numbers = analyze.measure_utility(study, SimpleNamespace(end=[17.0, 0.0]))
    assert numbers["layers"] == list(range(8)) and numbers["layers in a window"] == 3
    for role in ("mlp", "attention"):
        assert numbers[f"{role} lost"] == [2, 3, 3, 3, 3, 3, 3, 2]
        edge, middle = 1 / 8 ** 0.5, 2 / 12 ** 0.5            # (gained - 1) / norm
        assert numbers[f"{role} utility"] == pytest.approx([edge, *[middle] * 6, edge])
        assert numbers[f"best utility of {role}"] == pytest.approx(middle)


# End to end.

def train_toy(directory, **settings):
    options = TOY | dict(cache_dir=directory.parents[1] / "cache", out_dir=directory) | settings
    train.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    train_toy(home / "runs" / "opd", method="opd")
    train_toy(home / "runs" / "opd-1", method="opd", seed=1, eval_every=2)
    train_toy(home / "runs" / "rl", method="rl")
    return home


@pytest.fixture(scope="module")
def answers(home):
    runs = [str(home / "runs" / name) for name in ("rl", "opd", "opd-1")]
    analyze.main([*runs, "--problems", "15", "--out_dir", str(home / "analysis")])
    return json.loads((home / "analysis" / "analysis.json").read_text())


def weights_of(run, *names):
    return [load_file(run / "checkpoints" / name / "model.safetensors") for name in names]


def test_three_runs_from_end_to_end(home, answers):
    """Ten questions, the norms and shares against the files themselves."""
    assert list(answers) == list(analyze.QUESTIONS)
    assert all(list(numbers) == ["OPD", "RL"] for numbers in answers.values())
    base, final = weights_of(home / "runs" / "rl", "step_000000", "final")
    squares = {name: (final[name] - w).double().square().sum().item() for name, w in base.items()}
    norm = sum(squares.values()) ** 0.5
    scaling, shares = answers["norm_scaling"]["RL"], answers["update_norms"]["RL"]
    assert scaling["norms"]["mean"][-1] == pytest.approx(norm, rel=1e-5)
    in_mlp = sum(square for name, square in squares.items() if "mlp" in name)
    assert shares["% in mlp"]["mean"] == pytest.approx(100 * in_mlp / norm ** 2, rel=1e-5)
    by_chance = base["model.embed_tokens.weight"].numel() / sum(w.numel() for w in base.values())
    density = squares["model.embed_tokens.weight"] / norm ** 2 / by_chance
    assert shares["modules"]["embedding"]["mean"] == pytest.approx(density, rel=1e-5)
    ranks = [spectral_metrics(final[n] - base[n])["effective_rank"] for n in base if "proj" in n]
    assert answers["spectra"]["RL"]["effective rank"]["mean"] == pytest.approx(np.mean(ranks), 1e-4)
    opd = answers["norm_scaling"]["OPD"]["norms"]
    assert opd["n"] == 2 and opd["low"][-1] < opd["mean"][-1] < opd["high"][-1]
    assert scaling["equal norm"]["mean"] == pytest.approx(min(norm, opd["mean"][-1]), rel=0.1)
    null, other = (answers["spectra"][label]["a Gaussian's"]["mean"] for label in ("RL", "OPD"))
    assert null == other and np.mean(ranks) < null            # one for all runs
    path = {key: s["mean"] for key, s in answers["alignment"]["RL"].items()}
    assert path["progress"] == [0.25, 0.5, 1.0]               # no step_000004
    assert path["walk to end"] == cosines(analyze.walk_gram([1, 2, 4]))[0].tolist()
    assert len(path["to rest"]) == 2                          # at the end nothing remains


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
    deltas = {name: (early[name] - w, final[name] - w) for name, w in base.items()}
    stretched = {name: base[name] + a * b.norm() / a.norm() for name, (a, b) in deltas.items()}
    kl = accuracy_and_kl(config, stretched)[1]
    assert found("early_rescaled", "KL", analyze.BETAS.index(1.0)) == pytest.approx(kl, rel=1e-3)


def test_figures_drawn_again_are_the_same(home, answers, tmp_path, capsys):
    analyze.main(["--redraw", str(home / "analysis" / "analysis.json"), "--out_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("these runs") == 10
    pictures = list((home / "analysis").glob("*.png"))
    assert len(pictures) == 10
    for path in pictures:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_newest_comparable_run_of_each_method(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("runs/opd", "runs/race/opd")              # a race's
    rewrite("runs/race/opd", gap="slip")
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    shutil.copytree("runs/opd", "runs/kept-the-end-alone")    # --checkpoints false
    shutil.rmtree("runs/kept-the-end-alone/checkpoints/step_000000")
    for age, name in enumerate(("kept-the-end-alone", "rl", "race/opd", "opd-1", "opd")):
        train.os.utime(f"runs/{name}/summary.json", (1e9 - age, 1e9 - age))
    assert [path.as_posix() for path in analyze.newest_runs()] == ["runs/rl", "runs/opd-1"]
    assert analyze.expand(train.Path("runs/race")) == [train.Path("runs/race/opd")]
    shutil.rmtree("runs/rl")
    analyze.newest_runs()
    assert "--method rl" in capsys.readouterr().out


def rewrite(directory, **settings):
    path = train.Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("runs, labels", [
    ([("OPD", dict(seed=1, out_dir="a")), ("OPD", dict(eval_every=1))], ["OPD", "OPD"]),
    ([("OPD", {}), ("OPD", dict(lr=0.5)), ("RL", {})], ["OPD, lr 0.001", "OPD, lr 0.5", "RL"])])
def test_runs_that_differ_in_a_setting_are_no_seeds(runs, labels):
    configs = [(train.Config(**TOY | settings), name) for name, settings in runs]
    assert list(analyze.labels_of(dict(enumerate(configs))).values()) == labels


# Weights alone.

PHI3 = Phi3Config(vocab_size=23, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
GPT2 = GPT2Config(vocab_size=23, n_positions=8, n_embd=16, n_layer=2, n_head=2)


@pytest.mark.parametrize("make, config, mlp, attention", [
    (Phi3ForCausalLM, PHI3, ("gate_up_proj", "down_proj"), ("qkv_proj", "o_proj")),
    (GPT2LMHeadModel, GPT2, (".mlp.",), (".attn.",))])
def test_weights_alone_of_other_families(make, config, mlp, attention, tmp_path, capsys):
    torch.manual_seed(0)
    model = make(config)
    tokens = model.get_input_embeddings().weight
    rows = tokens.detach().clone()
    checkpoints = [str(tmp_path / name) for name in ("base", "ckpt-10", "ckpt-40")]
    for i, directory in enumerate(checkpoints):
        move_and_save(model, directory, i)
    analyze.main(["--base", checkpoints[0], "--checkpoints", *checkpoints[1:],
                  "--out_dir", str(tmp_path / "out")])
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
    assert answers["alignment"]["checkpoints"]["progress"]["mean"] == [0.25, 1.0]


def test_one_checkpoint_is_no_path_and_doubts_are_said(pair, tmp_path, capsys):
    """Half precision: pitfall 23. Names that nobody knows."""
    for name, state in zip(("base", "final"), (pair[1][0], pair[1][2])):
        state = state | {"model.layers.0.mixer.weight": torch.ones(3, 3)}
        save({n: w.bfloat16() for n, w in state.items()}, tmp_path / name)
    analyze.main(["--base", str(tmp_path / "base"), "--checkpoints", str(tmp_path / "final"),
                  "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "analyse float32 checkpoints" in said and "layers.0.mixer.weight" in said
    assert sorted(path.name[0] for path in (tmp_path / "out").glob("*.png")) == ["2", "4", "5"]


# What is refused, in one line.

@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Checks that analyze.py stops at these arguments, with these words in its only line."""
    monkeypatch.chdir(tmp_path)

    def check(args, words):
        with pytest.raises(SystemExit) as stopped:
            analyze.main(args)
        lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
        said, = [line for line in lines if line.strip() and not line.startswith("weights of")]
        assert stopped.value.code == 2
        assert said.startswith("analyze.py: ") and words in said

    return check


@pytest.mark.parametrize("spoil, words", [
    (lambda run: rewrite(run, gap="slip"), "--gap slip and habit"),
    (lambda run: rewrite(run, teacher_steps=9), "--teacher_steps 9 and 60"),
    (lambda run: rewrite(run, student="SmolLM2"), "--base and --checkpoints"),
    (lambda run: (run / "summary.json").unlink(), "no finished run"),
    (lambda run: shutil.rmtree(run / "checkpoints/final"), "final has no model.safetensors"),
    (lambda run: shutil.copy(run / "summary.json", run / START), "different weights")])
def test_runs_that_are_not_analysed(spoil, words, home, tmp_path, refused):
    spoil(shutil.copytree(home / "runs" / "opd-1", tmp_path / "other"))
    refused([str(home / "runs" / "opd"), "other"], words)


@pytest.mark.parametrize("args, words", [
    ("nowhere", "nowhere is no finished run"), ("", "python train.py makes four"),
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
def test_bad_input(args, words, tmp_path, refused):
    for name, width, depth in (("small", 16, 1), ("wide", 32, 1), ("deep", 16, 2)):
        GPT(GPTConfig(11, width, 24, depth, 2)).save_pretrained(tmp_path / name)
    save({"weight": torch.ones(2, 2)}, tmp_path / "flat")
    whole = (tmp_path / "small" / "model.safetensors").read_bytes()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:-9])
    (tmp_path / "old.json").write_text(json.dumps({"compared_steps": {}}))
    refused(args.split(), words)
