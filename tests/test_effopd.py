"""The search, step by step: what is tried, what is kept, and that nothing else is touched."""

import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from effopd import ALIGNMENT_K, EffOPD, mean_alignment, subspace_alignment


class Line(nn.Module):
    """One weight matrix of one number, so that every move can be worked out by hand."""

    def __init__(self, value=0.0):
        super().__init__()
        self.mlp = nn.Linear(1, 1, bias=False)
        self.move_to(value)

    def move_to(self, value):
        nn.init.constant_(self.mlp.weight, value)

    @property
    def at(self):
        return self.mlp.weight.item()


class Recorder:
    """validate() that notes the weights it is shown and answers from a function of them."""

    def __init__(self, score=lambda at: at):
        self.score, self.seen = score, []

    def __call__(self, model):
        self.seen.append(model.at)
        return self.score(model.at)


def awkward_net():
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.Linear(5, 5), "mlp": nn.Linear(5, 5), "norm": nn.LayerNorm(5),
                          "embed": nn.Embedding(7, 5)})


# What is tried, and what is kept.

@pytest.mark.parametrize("candidates, multiples", [("linear", [2, 4, 6, 8, 10]),
                                                   ("doubling", [2, 4, 8, 16, 32])])
def test_candidates_are_w_t_plus_multiples_of_delta(candidates, multiples):
    model, validate = Line(3.0), Recorder()
    effopd = EffOPD(model, validate, candidates=candidates)
    model.move_to(5.0)                                        # Δ = 2
    record = effopd.step(1)
    assert validate.seen == [5.0] + [5.0 + 2.0 * m for m in multiples]
    assert record["multiples"] == [0, *multiples] and record["scores"] == validate.seen
    assert record["multiple"] == multiples[-1] and model.at == 5.0 + 2.0 * multiples[-1]
    assert record["delta_norm"] == 2.0 and record["step"] == 1 and record["seconds"] > 0


def test_three_triggers_by_hand():
    """W_prev is what the last search kept: no Δ holds a jump, none is the whole displacement."""
    model, validate = Line(0.0), Recorder(score=lambda at: -abs(at - 20.5))
    effopd = EffOPD(model, validate)
    for step, at, seen, kept in [
            (1, 2.0, [2, 6, 10, 14, 18, 22], 22),             # Δ = 2 - 0; 22 is nearest to 20.5
            (2, 23.0, [23, 25], 23),                          # Δ = 23 - 22; 25 is worse
            (3, 22.5, [], 22.5),                              # no trigger
            (4, 22.0, [22, 20, 18], 20)]:                     # Δ = 22 - 23; 20 is nearer, 18 is not
        validate.seen.clear()
        model.move_to(at)
        record = effopd.step(step)
        assert validate.seen == seen and model.at == kept and (record is None) == (seen == [])
    assert effopd.previous["mlp.weight"].item() == 20
    assert [r["step"] for r in effopd.history] == [1, 2, 4]


def test_a_line_search_starts_from_half_of_what_the_last_one_kept():
    model, validate = Line(0.0), Recorder(score=lambda at: -abs(at - 30))
    effopd = EffOPD(model, validate, candidates="line")
    back = [-0.5, -0.75, -0.875, -0.9375, -0.96875]
    for t, at, tried, kept in [
            (1, 4.0, [0, 2, 4, 8, 16], 8),                    # Δ = 4: 12, 20, 36, 68
            (2, 34.0, [0, 4, 2, -0.5], 2),                    # Δ = -2, from half of 8: 26 is a tie
            (4, 31.0, [0, 2, *back], -0.96875),               # Δ = 1, from 2 at least: 33 is worse
            (8, 30.0, [0, 2, -0.5], 0)]:
        model.move_to(at)
        record = effopd.step(t)
        assert record["multiples"] == tried and record["multiple"] == kept


@pytest.mark.parametrize("accept, kept", [("gt", 0), ("ge", 10), (lambda new, old: False, 0),
                                          (lambda new, old: new > old - 0.1, 10)])
def test_a_tie(accept, kept):
    model = Line(0.0)
    effopd = EffOPD(model, lambda m: 0.5, accept=accept)
    model.move_to(1.0)
    assert effopd.step(1)["multiple"] == kept and model.at == 1 + kept


@pytest.mark.parametrize("settings, steps", [
    (dict(), [1, 2, 4, 8, 16, 32]), (dict(first_trigger=3), [3, 6, 12, 24]),
    (dict(every=15), [1, 2, 4, 8, 15, 16, 30, 32]), (dict(every=1), list(range(1, 41))),
    (dict(searches=1), [1]), (dict(every=3, searches=4), [1, 2, 3, 4])])
def test_triggers(settings, steps):
    effopd = EffOPD(Line(), lambda m: 0.0, **settings)
    assert [t for t in range(41) if effopd.step(t)] == steps


def test_a_direction_of_your_own():
    model, validate = Line(0.0), Recorder(score=lambda at: -at)
    effopd = EffOPD(model, validate, direction=lambda delta: -3 * delta, num_candidates=2)
    model.move_to(1.0)                                        # Δ = 1 becomes -3
    assert effopd.step(1)["delta_norm"] == 3
    assert validate.seen == [1.0, -5.0, -11.0] and model.at == -11.0


# What is not finite, and what goes wrong.

@pytest.mark.parametrize("accept", ["gt", "ge", lambda new, old: True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_rejected_and_recorded(bad, accept):
    model = Line(0.0)
    effopd = EffOPD(model, Recorder(lambda at: bad if at > 4 else at), accept=accept)
    model.move_to(1.0)
    record = effopd.step(1)                                   # 3 is kept, 5 scores `bad`
    assert model.at == 3.0 and record["scores"] == [1.0, 3.0, None]
    effopd = EffOPD(model, Recorder(lambda at: bad if at == 4 else at), accept="ge")
    model.move_to(4.0)
    assert effopd.step(1)["scores"] == [None, 6.0] and model.at == 4.0    # W_t's own


def test_weights_that_are_not_finite_are_not_even_scored():
    model, validate = Line(0.0), Recorder()
    effopd = EffOPD(model, validate)
    model.move_to(1e38)
    record = effopd.step(1)                                   # 3e38 fits float32, 5e38 does not
    assert len(validate.seen) == 2 and all(map(math.isfinite, validate.seen))
    assert record["multiple"] == 2 and record["scores"][2] is None and math.isfinite(model.at)


def test_an_error_in_validate_leaves_w_t_and_the_search_can_be_made_again():
    model, calls, random_state = Line(0.0), [], torch.get_rng_state()

    def validate(m):
        calls.append(m.at)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return m.at

    effopd = EffOPD(model, validate)
    model.move_to(1.0)
    with pytest.raises(KeyboardInterrupt):
        effopd.step(1)
    assert model.at == 1.0 and torch.equal(torch.get_rng_state(), random_state)
    assert effopd.step(1)["scores"] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0] and model.at == 11.0


# What is not disturbed.

def test_a_rejected_search_leaves_no_trace_in_weights_modes_buffers_or_random_states():
    """And its candidates see common random numbers: equal scores, of which none is better."""
    net = nn.ModuleDict({"mlp": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3),
                         "dropout": nn.Dropout(0.5)})
    net["norm"].eval()                                        # a mixture of modes stays one

    def validate(m):
        assert not any(module.training for module in m.modules()) and not torch.is_grad_enabled()
        m.train()
        m["norm"](m["dropout"](torch.randn(9, 3)))
        return random.random() + np.random.rand() + torch.rand(()).item()

    def state():
        tensors = {name: tensor.tolist() for name, tensor in net.state_dict().items()}
        modes = [module.training for module in net.modules()]
        numpy_state = np.random.get_state()[1].tolist()
        return tensors, modes, numpy_state, random.getstate(), torch.get_rng_state().tolist()

    effopd, other = EffOPD(net, validate, scope="all"), EffOPD(net, validate, seed=1)
    for p in net.parameters():
        p.data.mul_(1 + 1e-3 * math.pi)                       # subtracting Δ again would round
    before = state()
    scores = [effopd.step(1)["scores"], effopd.step(2)["scores"], other.step(1)["scores"]]
    assert state() == before and torch.is_grad_enabled()
    assert all(len(each) == 2 and len(set(each)) == 1 for each in scores)
    assert len(set(map(tuple, scores))) == 3                  # another search, other numbers


@pytest.mark.parametrize("scope, moved", [
    ("attention+mlp", {"attn.weight", "mlp.weight"}), ("mlp", {"mlp.weight"}),
    ("all", set(awkward_net().state_dict()))])
def test_scope(scope, moved):
    net = awkward_net()
    start = copy.deepcopy(net.state_dict())
    effopd = EffOPD(net, lambda m: sum(p.sum().item() for p in m.parameters()), scope=scope,
                    num_candidates=1)
    for p in net.parameters():
        p.data.add_(1.0)
    assert effopd.step(1)["multiple"] == 2
    for name, w in net.state_dict().items():
        torch.testing.assert_close(w, start[name] + (3.0 if name in moved else 1.0))


def test_a_tied_matrix_moves_once_and_a_frozen_one_not_at_all():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False),
                         "frozen": nn.Linear(4, 4)})
    net["head"].weight = net["embed"].weight
    net["frozen"].requires_grad_(False)
    start = net["embed"].weight.detach().clone()
    effopd = EffOPD(net, lambda m: m["embed"].weight.sum().item(), scope="all", num_candidates=1)
    assert list(effopd.parameters) == ["embed.weight"]
    net["embed"].weight.data.add_(1.0)
    effopd.step(1)
    torch.testing.assert_close(net["head"].weight, start + 3.0)
    assert net["head"].weight is net["embed"].weight


def test_a_state_that_is_loaded_goes_on_as_the_saved_one_does():
    file, records = io.BytesIO(), []
    models = [Line(0.0), Line(9.0)]
    saved, loaded = (EffOPD(model, Recorder(), candidates="line") for model in models)
    models[0].move_to(1.0)
    assert saved.step(1)["multiple"] == 32
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for model, effopd in zip(models, (saved, loaded)):
        model.move_to(36.0)
        records.append(effopd.step(2) | {"seconds": None})
    assert records[0] == records[1] and records[0]["multiples"] == [0, 16, 32]
    assert records[0]["delta_norm"] == 3 and records[0]["cosine"] == 1
    with pytest.raises(ValueError, match="scope"):
        EffOPD(awkward_net(), lambda m: 0.0).load_state_dict(saved.state_dict())


# What is recorded of Δ, and the gates.

def two_matrices(size=1):
    return nn.ModuleDict({"attn": nn.Linear(size, size, bias=False),
                          "mlp": nn.Linear(size, size, bias=False)})


@torch.no_grad()
def move_by(model, *deltas, gradients=(None, None)):
    for p, delta, gradient in zip(model.parameters(), deltas, gradients):
        p.add_(delta)
        p.grad = None if gradient is None else torch.full(p.shape, float(gradient))


def test_the_alignment_recorded_is_that_of_an_exact_svd():
    a, b, exact = {}, {}, []
    torch.manual_seed(0)
    for m, n in ((48, 48), (48, 49), (96, 48), (2, 30)):
        name = f"{m} x {n}"
        a[name] = torch.randn(m, 4) @ torch.randn(4, n)
        b[name] = torch.randn(m, 4) @ torch.randn(4, n) + a[name]
        exact.append(subspace_alignment(a[name], b[name], ALIGNMENT_K, "left"))
        exact.append(subspace_alignment(a[name], b[name], ALIGNMENT_K, "right"))
    others = dict(bias=torch.ones(9), still=torch.zeros(48, 48))     # they do not count
    value = mean_alignment(a | others, b | others)
    assert value == pytest.approx(np.mean(exact), abs=1e-3) and 0.3 < value < 0.95


def test_the_alignment_gate_goes_by_subspaces_not_by_the_cosine():
    first = torch.diag(torch.tensor([1.0] * 4 + [0.9] * 4))   # its leading four: the first four
    turned = first.flip(0, 1)                                 # cosine .99, other leading four
    for update, cosine, alignment, num_scores in [(-first, -1, 1, 2), (turned, 0.99, 0, 0)]:
        model = two_matrices(8)
        effopd = EffOPD(model, lambda m: 0.0, alignment_gate=0.5)
        move_by(model, first, first)
        record = effopd.step(1)
        assert record["cosine"] is None and record["alignment"] is None
        assert len(record["scores"]) == 2                     # nothing to compare with: a search
        move_by(model, update, update)
        record = effopd.step(2)
        assert record["cosine"] == pytest.approx(cosine, abs=0.01)
        assert record["alignment"] == pytest.approx(alignment, abs=1e-3)
        assert len(record["scores"]) == num_scores
        move_by(model, update, update)                        # also a skipped Δ is the last Δ
        assert effopd.step(4)["alignment"] == pytest.approx(1, abs=1e-3)


def test_the_utility_gate_leaves_out_what_is_not_useful():
    model, scores = two_matrices(), iter(range(9))
    effopd = EffOPD(model, lambda m: next(scores), num_candidates=1, utility_gate=True)
    start = [p.item() for p in model.parameters()]
    move_by(model, 1.0, 2.0, gradients=(-3.0, 5.0))           # the second went up the loss
    record = effopd.step(1)
    assert record["utility"] == pytest.approx({"attn.weight": 3.0, "mlp.weight": -5.0})
    assert [p.item() - w for p, w in zip(model.parameters(), start)] == pytest.approx([3, 2])
    move_by(model, 1.0, 1.0, gradients=(1.0, 1.0))            # neither: nothing to search for
    assert effopd.step(2)["scores"] == []
    move_by(model, 1.0, 1.0)
    with pytest.raises(ValueError, match="zero_grad"):
        effopd.step(4)


# The learning rate.

@pytest.mark.parametrize("multiple", [2, -0.5])
@pytest.mark.parametrize("move_lr", [True, False])
def test_move_lr_multiplies_every_rate(move_lr, multiple):
    def search(score_at, improves, last):
        lasts.append(last)
        return multiple

    model, lasts, factor = Line(0.0), [], 1 + multiple if move_lr else 1
    first = torch.optim.SGD([{"params": model.mlp.weight, "lr": 0.5}], lr=1.0)
    second = torch.optim.SGD([torch.zeros(1)], lr=4.0)
    effopd = EffOPD(model, lambda m: 0.0, candidates=search, optimizer=[first, second],
                    move_lr=move_lr)
    model.move_to(1.0)
    record = effopd.step(1)
    assert record["multiple"] == multiple and model.at == 1 + multiple
    assert record["lr"] == first.param_groups[0]["lr"] == 0.5 * factor
    assert second.param_groups[0]["lr"] == 4.0 * factor
    effopd.step(2)
    assert lasts == [0, 0 if move_lr else multiple]           # Δ has grown as the rate has


def test_the_first_jump_with_plain_sgd_is_the_first_step_at_the_larger_rate():
    model = Line(8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    effopd = EffOPD(model, lambda m: -m.at, optimizer=optimizer, move_lr=True)
    model.mlp.weight.square().sum().backward()                # g = 16
    optimizer.step()
    assert effopd.step(1)["multiple"] == 10
    assert model.at == 8 - 0.25 * (1 + 10) * 16 and optimizer.param_groups[0]["lr"] == 0.25 * 11


@pytest.mark.parametrize("settings, words", [
    (dict(accept="maybe"), "gt, ge"), (dict(candidates="cubic"), "linear, doubling, line"),
    (dict(num_candidates=0), "num_candidates"), (dict(searches=-1), "searches"),
    (dict(move_lr=True), "move_lr needs the optimizer"), (dict(), "scope='all'")])
def test_wrong_options(settings, words):
    with pytest.raises(ValueError, match=words):
        EffOPD(nn.Linear(2, 2) if words == "scope='all'" else Line(), lambda m: 0.0, **settings)
