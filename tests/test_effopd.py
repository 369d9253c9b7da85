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


def awkward_net(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"attn": nn.Linear(5, 5), "mlp": nn.Linear(5, 5), "norm": nn.LayerNorm(5),
                          "embed": nn.Embedding(7, 5)})


def train_step(net, optimizer, t):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(t))
    y = net["mlp"](net["norm"](net["attn"](x)) + net["embed"].weight)
    (y - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def without_seconds(history):
    return [{key: value for key, value in r.items() if key != "seconds"} for r in history]


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


@pytest.mark.parametrize("best, kept", [
    (9.0, 2), (4.2, 0),                                       # 4, 8, 12; and 4, 8, then back to 3
    (2.4, -0.75), (2.0, -0.96875)])                           # 4, 8, 3, 2.5, 2.25, ...
def test_the_line_search_goes_back_where_forward_is_worse(best, kept):
    model, validate = Line(2.0), Recorder(score=lambda at: -abs(at - best))
    effopd = EffOPD(model, validate, candidates="line")       # W_prev = 2
    model.move_to(4.0)
    assert effopd.step(1)["multiple"] == kept and model.at == 4 + 2 * kept


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
    (dict(every=15), [1, 2, 4, 8, 15, 16, 30, 32]), (dict(every=1), list(range(1, 41)))])
def test_triggers(settings, steps):
    effopd = EffOPD(Line(), lambda m: 0.0, **settings)
    assert [t for t in range(41) if effopd.is_trigger(t)] == steps


def test_a_search_a_direction_and_a_rule_of_your_own():
    model, validate = Line(0.0), Recorder(score=lambda at: -at)

    def golden(score_at, improves, last):
        return 1.5 if improves(score_at(1.5), score_at(0)) else -last

    effopd = EffOPD(model, validate, candidates=golden, direction=lambda delta: -3 * delta)
    model.move_to(1.0)                                        # Δ = 1 becomes -3
    record = effopd.step(1)
    assert validate.seen == [-3.5, 1.0] and model.at == -3.5
    assert record["multiples"] == [1.5, 0] and record["delta_norm"] == 3
    model.move_to(-4.5)                                       # Δ = -1 becomes 3: 0 is worse
    assert effopd.step(2)["multiple"] == -1.5 and model.at == -9.0


# What is not finite, and what goes wrong.

def test_after_a_rejected_search_the_weights_are_bit_identical():
    net = awkward_net()
    effopd = EffOPD(net, lambda m: 0.0, scope="all")
    for p in net.parameters():
        p.data.mul_(1 + 1e-3 * math.pi)                       # subtracting Δ again would round
    before = copy.deepcopy(net.state_dict())
    assert effopd.step(1)["multiple"] == 0
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


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
    histories = []
    for fails_at in (0, 1, 3):
        model, calls = Line(0.0), []

        def validate(m):
            calls.append(m.at)
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return m.at + torch.rand(()).item() + random.random()

        effopd = EffOPD(model, validate)
        model.move_to(1.0)
        if fails_at:
            with pytest.raises(KeyboardInterrupt):
                effopd.step(1)
            assert model.at == 1.0 and effopd.previous["mlp.weight"].item() == 0.0
        effopd.step(1)
        histories.append(without_seconds(effopd.history))
        assert model.at == 11.0
    assert histories[0] == histories[1] == histories[2]


# What is not disturbed.

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.norm, self.dropout = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.norm.eval()                                      # a mixture of modes stays one


def test_validation_leaves_no_trace():
    model = Noisy()

    def validate(m):
        assert not any(module.training for module in m.modules()) and not torch.is_grad_enabled()
        m.train()
        m.norm(m.dropout(torch.randn(9, 3)))
        return random.random() + np.random.rand() - 99        # and a score that is never better

    def state():
        tensors = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        numpy_state = np.random.get_state()[1].tolist()
        return tensors, modes, numpy_state, random.getstate(), torch.get_rng_state().tolist()

    effopd, before = EffOPD(model, validate), state()
    assert effopd.step(1)["multiple"] == 0 and effopd.step(2)["multiple"] == 0
    assert state() == before and torch.is_grad_enabled()


def test_candidates_share_their_random_numbers_and_searches_do_not():
    drawn = []

    def validate(m):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return len(drawn)

    model = Line()
    effopd = EffOPD(model, validate, num_candidates=2)
    effopd.step(1)
    effopd.step(2)
    EffOPD(model, validate, num_candidates=2, seed=1).step(1)
    assert [len(set(drawn[i:i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len({drawn[0], drawn[3], drawn[6]}) == 3


ALL = {"attn.weight", "attn.bias", "mlp.weight", "mlp.bias", "norm.weight", "norm.bias",
       "embed.weight"}


@pytest.mark.parametrize("scope, moved", [("attention+mlp", {"attn.weight", "mlp.weight"}),
                                          ("mlp", {"mlp.weight"}), ("all", ALL)])
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


def test_resumed_equals_uninterrupted_across_triggers_bit_for_bit():
    def start():
        net = awkward_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        return net, optimizer, EffOPD(net, lambda m: m["mlp"].weight.sum().item() - torch.rand(()),
                                      candidates="line", optimizer=optimizer, move_lr=True)

    def run(parts, steps):
        for t in steps:
            train_step(parts[0], parts[1], t)
            parts[2].step(t)

    whole = start()
    run(whole, range(1, 9))
    assert any(r["multiple"] for r in whole[2].history)
    for stop_after in (1, 2, 3, 5, 7):
        first, resumed, file = start(), start(), io.BytesIO()
        run(first, range(1, stop_after + 1))
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for part, state in zip(resumed, torch.load(file, weights_only=True)):
            part.load_state_dict(state)
        run(resumed, range(stop_after + 1, 9))
        for a, b in zip(whole[0].parameters(), resumed[0].parameters()):
            assert torch.equal(a, b)
        assert without_seconds(whole[2].history) == without_seconds(resumed[2].history)


def test_a_state_of_another_scope_is_refused():
    state = EffOPD(awkward_net(), lambda m: 0.0, scope="mlp").state_dict()
    with pytest.raises(ValueError, match="scope"):
        EffOPD(awkward_net(), lambda m: 0.0).load_state_dict(state)


# What is recorded of Δ, and the gates.

class Two(nn.Module):
    """Two matrices, whose update is given by hand."""

    def __init__(self, size=1):
        super().__init__()
        self.attn = nn.Linear(size, size, bias=False)
        self.mlp = nn.Linear(size, size, bias=False)

    @torch.no_grad()
    def move_by(self, *deltas, gradients=(None, None)):
        for p, delta, gradient in zip(self.parameters(), deltas, gradients):
            p.add_(delta)
            p.grad = None if gradient is None else torch.full(p.shape, float(gradient))


def test_each_search_records_cosine_and_utility():
    model = Two()
    effopd = EffOPD(model, lambda m: 0.0)                     # accepts nothing
    model.move_by(3.0, 0.0, gradients=(-2.0, 5.0))
    record = effopd.step(1)
    assert record["cosine"] is None and record["alignment"] is None
    assert record["utility"] == pytest.approx({"attn.weight": 2.0, "mlp.weight": 0.0})
    model.move_by(3.0, 4.0, gradients=(-2.0, 5.0))
    record = effopd.step(2)
    assert record["cosine"] == pytest.approx(3 / 5) and record["delta_norm"] == pytest.approx(5)
    assert record["utility"] == pytest.approx({"attn.weight": 2.0, "mlp.weight": -5.0})
    model.move_by(-4.0, 3.0)                                  # and the gradients are gone
    record = effopd.step(4)
    assert record["cosine"] == pytest.approx(0, abs=1e-7) and record["utility"] == {}
    assert effopd.step(8)["cosine"] == 0 == effopd.step(16)["cosine"]     # Δ = 0 has no direction
    assert effopd.history[-1]["alignment"] is None


def decaying(seed, m, n):
    """A matrix whose singular values halve."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator))
    return U * 0.5 ** torch.arange(min(m, n)) @ V.T


def test_the_alignment_recorded_is_the_exact_one_nearly():
    shapes = {"q": (48, 48), "k": (48, 48), "up": (96, 48), "down": (48, 96), "thin": (2, 30)}
    a = {name: decaying(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    b = {name: d + 0.2 * decaying(9 + i, *d.shape) for i, (name, d) in enumerate(a.items())}
    exact = [subspace_alignment(a[name], b[name], ALIGNMENT_K, side)
             for name in a for side in ("left", "right")]
    torch.manual_seed(0)
    value = mean_alignment(a | {"bias": torch.ones(9)}, b | {"bias": torch.ones(9)})
    assert value == pytest.approx(np.mean(exact), abs=0.01) and 0.5 < value < 0.95
    assert mean_alignment(a, a) == pytest.approx(1, abs=1e-4)
    a["q"], b["k"] = torch.zeros(48, 48), torch.zeros(48, 48)     # did not move: left out
    assert mean_alignment(a, b) == pytest.approx(np.mean(exact[4:]), abs=0.01)


def test_the_alignment_gate_goes_by_subspaces_not_by_the_cosine():
    first = torch.diag(torch.tensor([1.0] * 4 + [0.9] * 4))   # its leading four: the first four
    turned = first.flip(0, 1)                                 # cosine .99, other leading four
    for update, cosine, alignment, searches in [(-first, -1, 1, True), (turned, 0.99, 0, False)]:
        model, calls = Two(8), []
        effopd = EffOPD(model, lambda m: calls.append(1) or 0.0, alignment_gate=0.5)
        model.move_by(first, first)
        effopd.step(1)
        assert len(calls) == 2                                # nothing to compare with: a search
        calls.clear()
        model.move_by(update, update)
        record = effopd.step(2)
        assert record["cosine"] == pytest.approx(cosine, abs=0.01)
        assert record["alignment"] == pytest.approx(alignment, abs=1e-3)
        assert bool(calls) == searches == bool(record["scores"])
        model.move_by(update, update)                         # also a skipped Δ is the last Δ
        assert effopd.step(4)["alignment"] == pytest.approx(1, abs=1e-3)


def test_the_utility_gate_leaves_out_what_is_not_useful():
    model, scores = Two(), iter(range(9))
    effopd = EffOPD(model, lambda m: next(scores), num_candidates=1, utility_gate=True)
    start = [p.item() for p in model.parameters()]
    model.move_by(1.0, 2.0, gradients=(-1.0, 1.0))            # the second went up the loss
    effopd.step(1)
    assert [p.item() - w for p, w in zip(model.parameters(), start)] == pytest.approx([3, 2])
    model.move_by(1.0, -1.0, gradients=(-1.0, 1.0))           # both go down it
    effopd.step(2)
    assert [p.item() - w for p, w in zip(model.parameters(), start)] == pytest.approx([6, -1])
    model.move_by(1.0, 1.0, gradients=(1.0, 1.0))             # neither: nothing to search for
    assert effopd.step(4)["scores"] == []
    model.move_by(1.0, 1.0)
    with pytest.raises(ValueError, match="zero_grad"):
        effopd.step(8)


# The learning rate.

@pytest.mark.parametrize("score, multiple", [(lambda at: at, 2), (lambda at: -at, -0.5)])
@pytest.mark.parametrize("several", [False, True])
def test_move_lr_multiplies_every_rate(several, score, multiple):
    model = Line(0.0)
    first = torch.optim.SGD([{"params": model.mlp.weight, "lr": 0.5}], lr=1.0)
    second = torch.optim.SGD([torch.zeros(1)], lr=4.0)
    effopd = EffOPD(model, Recorder(score), candidates="line", num_candidates=1, move_lr=True,
                    optimizer=[first, second] if several else first)
    model.move_to(1.0)
    record = effopd.step(1)
    assert record["multiple"] == multiple
    assert record["lr"] == first.param_groups[0]["lr"] == 0.5 * (1 + multiple)
    assert second.param_groups[0]["lr"] == (4.0 * (1 + multiple) if several else 4.0)


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
    (dict(scope="heads"), "scope"), (dict(num_candidates=0), "num_candidates"),
    (dict(first_trigger=0), "first_trigger"), (dict(every=-1), "every"),
    (dict(move_lr=True), "move_lr needs the optimizer"), (dict(), "scope='all'")])
def test_wrong_options(settings, words):
    with pytest.raises(ValueError, match=words):
        EffOPD(nn.Linear(2, 2) if words == "scope='all'" else Line(), lambda m: 0.0, **settings)
