"""The search, step by step: what is tried, what is kept, and that nothing else is touched."""

import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from effopd import EffOPD, EffOPDCallback


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
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t))
    loss = (net["mlp"](net["norm"](net["attn"](x)) + net["embed"](torch.arange(8) % 7)) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("candidates, multiples", [("linear", [2, 4, 6, 8, 10]), ("doubling", [2, 4, 8, 16, 32])])
def test_candidates_lie_on_the_line_from_w_t(candidates, multiples):
    model, validate = Line(3.0), Recorder()
    effopd = EffOPD(model, validate, candidates=candidates)
    model.move_to(5.0)                                        # Δ = 2
    record = effopd.step(1)
    assert validate.seen == [5.0] + [5.0 + 2.0 * m for m in multiples]
    assert record["multiples"] == [0, *multiples] and record["scores"] == validate.seen
    assert record["accepted"] == 5 and record["multiple"] == multiples[-1] and model.at == 5.0 + 2.0 * multiples[-1]
    assert record["stopped"] == "no candidate left" and record["delta_norm"] == 2.0


def test_three_triggers_by_hand():
    """W_prev is what the last search kept: no Δ contains a jump, none is the total displacement."""
    model, validate = Line(0.0), Recorder(score=lambda at: -abs(at - 20.5))
    effopd = EffOPD(model, validate)
    model.move_to(2.0)                                        # step 1: Δ = 2 - 0
    effopd.step(1)                                            # 2, 6, 10, 14, 18, 22: 22 is nearest to 20.5
    assert validate.seen == [2, 6, 10, 14, 18, 22] and model.at == 22
    validate.seen.clear()
    model.move_to(23.0)                                       # step 2: Δ = 23 - 22
    assert effopd.step(2)["accepted"] == 0                    # 25 is worse
    assert validate.seen == [23, 25] and model.at == 23
    validate.seen.clear()
    model.move_to(22.5)
    assert effopd.step(3) is None and model.at == 22.5 and not validate.seen
    model.move_to(22.0)                                       # step 4: Δ = 22 - 23
    record = effopd.step(4)                                   # 20 is nearer, 18 is not
    assert validate.seen == [22, 20, 18] and model.at == 20 and record["accepted"] == 1
    assert record["stopped"] == "score no better"
    assert effopd.previous[0].item() == 20 and [r["step"] for r in effopd.history] == [1, 2, 4]


def test_stops_at_the_first_failure():
    scores = iter([0.1, 0.2, 0.15, 0.9])
    model = Line(0.0)
    effopd = EffOPD(model, lambda m: next(scores))
    model.move_to(1.0)
    assert effopd.step(1)["accepted"] == 1 and model.at == 3.0 and next(scores) == 0.9   # never asked for


@pytest.mark.parametrize("best, kept, stopped", [
    (9.0, 2, "score no better"), (4.2, 0, "score no better"),              # 4, 8, 12; and 4, 8, then back to 3
    (2.4, -0.75, "score no better"), (2.0, -0.96875, "no candidate left")])      # 4, 8, 3, 2.5, 2.25, ...
def test_the_line_goes_back_where_forward_is_worse(best, kept, stopped):
    """W_prev = 2, W_t = 4: and what a trainer's log says is the score of the weights that were kept."""
    model, validate = Line(2.0), Recorder(score=lambda at: -abs(at - best))
    effopd = EffOPD(model, validate, candidates="line")
    model.move_to(4.0)
    record = effopd.step(1)
    assert record["multiple"] == kept and model.at == 4 + 2 * kept and record["stopped"] == stopped
    entry = EffOPDCallback(None).entry(record)
    assert entry["effopd_score"] == validate.score(model.at) and entry["effopd_accepted"] == record["accepted"]


def test_a_line_starts_near_where_the_last_one_ended():
    model, validate = Line(0.0), Recorder(score=lambda at: -abs(at - 30))
    effopd = EffOPD(model, validate, candidates="line")
    for at, tried, kept, accepted in [
            (4.0, [0, 2, 4, 8, 16], 8, 3),                    # Δ = 4: 12, 20, 36, 68
            (34.0, [0, 4, 2, -0.5], 2, 1),                    # Δ = -2, from half of 8: 26 is a tie; so 30, then 35
            (31.0, [0, 2, -0.5, -0.75, -0.875, -0.9375, -0.96875], -0.96875, 5),       # Δ = 1, from 2 at least: 33
            (30.0, [0, 2, -0.5], 0, 0)]:                      # after one that went back, again from 2
        model.move_to(at)
        record = effopd.step(2 ** len(effopd.history))
        assert (record["multiples"], record["multiple"], record["accepted"]) == (tried, kept, accepted)


@pytest.mark.parametrize("accept, kept", [("gt", 0), ("ge", 5)])
def test_a_tie(accept, kept):
    model = Line(0.0)
    effopd = EffOPD(model, lambda m: 0.5, accept=accept)
    model.move_to(1.0)
    assert effopd.step(1)["accepted"] == kept


@pytest.mark.parametrize("settings, steps", [
    (dict(), [1, 2, 4, 8, 16, 32]), (dict(first_trigger=2), [2, 4, 8, 16, 32]), (dict(first_trigger=4), [4, 8, 16, 32]),
    (dict(every=5), [1, 2, 4, 5, 8, 10, 15, 16, 20, 25, 30, 32, 35, 40]), (dict(every=1), list(range(1, 41))),
])
def test_triggers(settings, steps):
    effopd = EffOPD(Line(), lambda m: 0.0, **settings)
    assert [t for t in range(41) if effopd.is_trigger(t)] == steps


def test_after_a_rejected_search_the_weights_are_bit_identical():
    net = awkward_net()
    effopd = EffOPD(net, lambda m: 0.0, scope="all")
    for p in net.parameters():
        p.data.mul_(1 + 1e-3 * math.pi)                       # subtracting Δ again would round
    before = copy.deepcopy(net.state_dict())
    assert effopd.step(1)["accepted"] == 0
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_rejected_and_logged(bad):
    model = Line(0.0)
    effopd = EffOPD(model, Recorder(lambda at: bad if at > 4 else at), accept="ge")
    model.move_to(1.0)
    record = effopd.step(1)                                   # 3 is kept, 5 scores `bad`
    assert model.at == 3.0 and record["scores"] == [1.0, 3.0, None] and record["stopped"] == "score not finite"


def test_w_t_whose_own_score_is_not_finite_stays():
    model = Line(0.0)
    effopd = EffOPD(model, Recorder(lambda at: math.nan if at == 1 else at), accept="ge")
    model.move_to(1.0)
    record = effopd.step(1)
    assert model.at == 1.0 and record["accepted"] == 0 and record["scores"] == [None]


def test_weights_that_are_not_finite_are_not_even_scored():
    model, validate = Line(0.0), Recorder()
    effopd = EffOPD(model, validate)
    model.move_to(1e38)
    record = effopd.step(1)                                   # 3e38 fits float32, 5e38 does not
    assert len(validate.seen) == 2 and all(map(math.isfinite, validate.seen))
    assert record["accepted"] == 1 and record["stopped"] == "weights not finite" and math.isfinite(model.at)


def test_an_error_in_validate_leaves_w_t():
    model = Line(0.0)

    def validate(m):
        if m.at > 4:
            raise KeyboardInterrupt
        return m.at

    effopd = EffOPD(model, validate)
    model.move_to(1.0)
    with pytest.raises(KeyboardInterrupt):
        effopd.step(1)
    assert model.at == 1.0 and effopd.previous[0].item() == 0.0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.norm, self.dropout = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.norm.eval()                                      # a mixture of modes, to be kept as it is


def test_validation_leaves_no_trace():
    model = Noisy()

    def validate(m):
        assert not any(module.training for module in m.modules()) and not torch.is_grad_enabled()
        m.train()
        m.norm(m.dropout(torch.randn(9, 3)))
        return random.random() + np.random.rand() - 99        # and a score that is never better

    effopd = EffOPD(model, validate)
    state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                     {k: v.tolist() for k, v in model.state_dict().items()}, [m.training for m in model.modules()])
    before = state()
    assert effopd.step(1)["accepted"] == 0
    assert state() == before


def test_candidates_share_their_random_numbers_and_searches_do_not():
    drawn = []

    def validate(m):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return len(drawn)

    model = Line()
    effopd = EffOPD(model, validate, num_candidates=2)
    effopd.step(1), effopd.step(2)
    EffOPD(model, validate, num_candidates=2, seed=1).step(1)
    assert [len(set(drawn[i:i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len({drawn[0], drawn[3], drawn[6]}) == 3


def test_a_search_that_accepts_nothing_changes_nothing_in_training():
    """Weights, optimiser and random state equal those of the loop without EffOPD, bit for bit."""
    results = []
    for search in (False, True):
        net = awkward_net()
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        effopd = EffOPD(net, lambda m: -torch.rand(()).item() * 0) if search else None
        for t in range(1, 10):
            train_step(net, optimizer, t)
            if search:
                effopd.step(t)
        moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        results.append([*net.state_dict().values(), *moments, torch.get_rng_state()])
    assert len(effopd.history) == 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scope, moved", [
    ("attention+mlp", {"attn.weight", "mlp.weight"}), ("mlp", {"mlp.weight"}),
    ("all", {"attn.weight", "attn.bias", "mlp.weight", "mlp.bias", "norm.weight", "norm.bias", "embed.weight"}),
])
def test_scope(scope, moved):
    net = awkward_net()
    start = copy.deepcopy(net.state_dict())
    effopd = EffOPD(net, lambda m: sum(p.sum().item() for p in m.parameters()), scope=scope, num_candidates=1)
    for p in net.parameters():
        p.data.add_(1.0)
    assert effopd.step(1)["accepted"] == 1
    for name, w in net.state_dict().items():
        torch.testing.assert_close(w, start[name] + (3.0 if name in moved else 1.0))


def test_a_tied_matrix_moves_once_and_a_frozen_one_not_at_all():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False), "frozen": nn.Linear(4, 4)})
    net["head"].weight = net["embed"].weight
    net["frozen"].requires_grad_(False)
    start = net["embed"].weight.detach().clone()
    effopd = EffOPD(net, lambda m: m["embed"].weight.sum().item(), scope="all", num_candidates=1)
    assert list(effopd.parameters) == ["embed.weight"]
    net["embed"].weight.data.add_(1.0)
    effopd.step(1)
    torch.testing.assert_close(net["head"].weight, start + 3.0)
    assert net["head"].weight is net["embed"].weight


def test_resumed_equals_uninterrupted_across_a_trigger():
    def start():
        net = awkward_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        return net, optimizer, EffOPD(net, lambda m: m["mlp"].weight.sum().item())

    def run(parts, steps):
        for t in steps:
            train_step(parts[0], parts[1], t)
            parts[2].step(t)

    whole = start()
    run(whole, range(1, 9))
    assert sum(r["accepted"] for r in whole[2].history) > 0
    for stop_after in (1, 2, 3, 5, 7):
        first = start()
        run(first, range(1, stop_after + 1))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        resumed = start()
        for part, state in zip(resumed, torch.load(file, weights_only=True)):
            part.load_state_dict(state)
        run(resumed, range(stop_after + 1, 9))
        for a, b in zip(whole[0].state_dict().values(), resumed[0].state_dict().values()):
            assert torch.equal(a, b)
        drop = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
        assert drop(whole[2].history) == drop(resumed[2].history)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_offload_changes_no_bit(device):
    results = []
    for offload in (False, True):
        net = awkward_net().to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        effopd = EffOPD(net, lambda m: m["mlp"].weight.sum().item(), scope="all", offload=offload)
        for t in range(1, 10):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(device)
            optimizer.step()
            effopd.step(t)
            if t == 5:                                        # through a checkpoint as well
                effopd.load_state_dict(effopd.state_dict())
        results.append((net, effopd))
    (whole, kept_there), (net, effopd) = results
    assert any(record["accepted"] for record in effopd.history)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters()))
    for a, b in zip(kept_there.history, effopd.history, strict=True):
        assert (a["scores"], a["multiple"]) == (b["scores"], b["multiple"])
    weights = {p.data_ptr() for p in net.parameters()}
    for kept in (*effopd.previous, *effopd.delta):
        assert kept.device.type == "cpu" and kept.data_ptr() not in weights


class Bytes(TorchDispatchMode):
    """How much lies on a make-believe device "far": FakeTensorMode has shapes and devices, not numbers."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def held(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0                                        # all that is ever read
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "far":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        self.peak = max(self.peak, self.held())
        return result


def measure_memory(_, folder):
    _setup_privateuseone_for_python_backend("far")
    sizes = []
    for offload in (False, True):
        with FakeTensorMode(), Bytes() as memory:
            net = nn.ModuleDict({f"mlp{i}": nn.Linear(10, 10, bias=False, device="far") for i in range(9)})
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            before = memory.held()
            effopd = EffOPD(net, lambda m: 0.0, offload=offload)
            effopd.step(1)
            after, memory.peak = memory.held(), 0
            effopd.step(2)
            sizes.append([round((size - before) / 400, 1) for size in (after, memory.peak)])
    with open(f"{folder}/sizes", "w") as f:
        f.write(repr(sizes))


def test_memory_on_the_device_is_what_the_docstring_says(tmp_path):
    """Nine matrices: two copies kept, four in a search (and two for a candidate); offloaded none, and three matrices."""
    torch.multiprocessing.spawn(measure_memory, (str(tmp_path),), nprocs=1)      # alone: a device is for ever
    assert (tmp_path / "sizes").read_text() == "[[18.0, 38.0], [0.0, 3.0]]"


def test_a_state_of_another_model_is_refused():
    state = EffOPD(awkward_net(), lambda m: 0.0, scope="mlp").state_dict()
    with pytest.raises(ValueError, match="scope"):
        EffOPD(awkward_net(), lambda m: 0.0).load_state_dict(state)


class Two(nn.Module):
    """Two matrices of one number: Δ is a vector of the plane."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.move_to(0.0, 0.0)

    def move_to(self, *at, gradient=None):
        for i, p in enumerate(self.parameters()):
            nn.init.constant_(p, at[i])
            p.grad = None if gradient is None else torch.full((1, 1), float(gradient[i]))

    @property
    def at(self):
        return [p.item() for p in self.parameters()]


def test_each_search_records_alignment_and_utility():
    model = Two()
    effopd = EffOPD(model, lambda m: 0.0)                     # accepts nothing
    model.move_to(3.0, 0.0, gradient=(-2.0, 5.0))             # Δ = (3, 0)
    record = effopd.step(1)
    assert record["alignment"] is None and record["utility"] == pytest.approx({"attn.weight": 2.0, "mlp.weight": 0.0})
    model.move_to(6.0, 4.0, gradient=(-2.0, 5.0))             # Δ = (3, 4)
    record = effopd.step(2)
    assert record["alignment"] == pytest.approx(3 / 5)
    assert record["utility"] == pytest.approx({"attn.weight": 2.0, "mlp.weight": -5.0})
    model.move_to(2.0, 7.0)                                   # Δ = (-4, 3), and the gradients are gone
    record = effopd.step(4)
    assert record["alignment"] == pytest.approx(0, abs=1e-7) and record["utility"] == {}
    assert effopd.step(8)["alignment"] == 0 == effopd.step(16)["alignment"]      # Δ = 0 has no direction


def test_utility_gate_leaves_out_what_is_not_useful():
    model, seen = Two(), []
    effopd = EffOPD(model, lambda m: seen.append(m.at) or len(seen), num_candidates=1, utility_gate=True)
    model.move_to(1.0, 2.0, gradient=(-1.0, 1.0))             # the second went up the loss
    effopd.step(1)
    assert seen == [[1, 2], [3, 2]] and model.at == [3, 2]
    model.move_to(4.0, 1.0, gradient=(-1.0, 1.0))             # Δ = (1, -1): both go down it
    effopd.step(2)
    assert model.at == [6, -1]
    model.move_to(7.0, 0.0)
    with pytest.raises(ValueError, match="zero_grad"):
        effopd.step(4)
    assert model.at == [7, 0]


def test_alignment_gate_skips_the_search_and_remembers_the_way():
    model, seen = Two(), []
    effopd = EffOPD(model, lambda m: seen.append(m.at) or len(seen), num_candidates=1, alignment_gate=0.5)
    model.move_to(1.0, 0.0)
    assert effopd.step(1)["accepted"] == 1 and model.at == [3, 0]                # the first has nothing to compare with
    seen.clear()
    model.move_to(3.0, 1.0)                                   # at a right angle
    record = effopd.step(2)
    assert not seen and model.at == [3, 1] and effopd.previous[1].item() == 1
    assert record["stopped"] == "alignment below the gate"
    assert (record["accepted"], record["multiple"], record["scores"]) == (0, 0, [])
    model.move_to(3.0, 2.0)                                   # on along the way of the search that was skipped
    assert effopd.step(4)["alignment"] == 1 and model.at == [3, 4] and len(seen) == 2


def test_a_resumed_search_knows_the_last_direction():
    model = Two()
    effopd = EffOPD(model, lambda m: 0.0)
    model.move_to(1.0, 0.0)
    effopd.step(1)
    again = EffOPD(model, lambda m: 0.0)
    again.load_state_dict(effopd.state_dict())
    model.move_to(2.0, 1.0)
    assert effopd.step(2)["alignment"] == again.step(2)["alignment"] == pytest.approx(0.5 ** 0.5)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("better", [False, True])
def test_moments_are_dropped_only_after_a_jump_only_when_asked_only_of_what_moved(reset, better):
    net = awkward_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scores = iter(range(9)) if better else iter(range(9, 0, -1))
    effopd = EffOPD(net, lambda m: next(scores), scope="mlp", optimizer=optimizer if reset else None)
    train_step(net, optimizer, 1)
    effopd.step(1)
    assert (net["mlp"].weight in optimizer.state) == (not (reset and better))
    assert all(p in optimizer.state for p in net.parameters() if p is not net["mlp"].weight)
    train_step(net, optimizer, 2)                             # and the optimiser goes on


@pytest.mark.parametrize("settings, words", [
    (dict(accept="maybe"), "gt, ge"), (dict(candidates="cubic"), "linear, doubling"), (dict(scope="heads"), "scope"),
    (dict(num_candidates=0), "num_candidates"), (dict(first_trigger=0), "first_trigger"), (dict(every=-1), "every"),
])
def test_wrong_options(settings, words):
    with pytest.raises(ValueError, match=words):
        EffOPD(Line(), lambda m: 0.0, **settings)


def test_a_model_with_nothing_in_scope():
    with pytest.raises(ValueError, match="scope='all'"):
        EffOPD(nn.Sequential(nn.Linear(2, 2)), lambda m: 0.0)
