"""Two processes (gloo, CPU): DDP and FSDP2 end with the weights and records of one process that saw all the data."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from effopd import EffOPD, EffOPDCallback

WRAPS = ["ddp", "blocks", "root"]                             # FSDP2: a group a block; all in the root's one group
SETTINGS = [dict(), dict(utility_gate=True, alignment_gate=0.0, candidates="doubling")]
STEPS = 5                                                     # searches at 1, 2 and 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)       # 7 and 5 rows: uneven shards

    def forward(self, x):
        return x + self.mlp(torch.tanh(self.attn(x)))


def net(wrap=None):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(5))
    if wrap == "ddp":
        return DistributedDataParallel(model)
    for module in {None: [], "root": [model], "blocks": [*model[:2], model]}[wrap]:
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return model


def loss_of(model, t, rows):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t))[rows]
    return (model(x) - x.flip(1)).square().mean()


def train(model, rows, settings):
    """EffOPD's records of STEPS steps on these rows of each batch, scored on these rows of a batch for validation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    effopd = EffOPD(model, lambda m: -loss_of(m, 99, rows).item(), scope="all", **settings)
    for t in range(1, STEPS + 1):
        loss_of(model, t, rows).backward()
        optimizer.step()
        effopd.step(t)
        optimizer.zero_grad()
    return effopd.history


def whole_weights(model):
    return {name.removeprefix("module."): w.full_tensor() if hasattr(w, "full_tensor") else w.clone()
            for name, w in model.state_dict().items()}


def through_a_checkpoint(rows, folder, stop_after):
    """The callback's events as a Trainer calls them, interrupted after a step: a new model, a new callback."""
    args = SimpleNamespace(deepspeed_plugin=None, output_dir=folder, resume_from_checkpoint=None, save_only_model=False,
                           should_save=dist.get_rank() == 0, process_index=dist.get_rank(), world_size=2, device="cpu")
    state = SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True)
    model, optimizer_state = net("blocks"), None
    for steps in (range(1, stop_after + 1), range(stop_after + 1, STEPS + 1)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
        callback = EffOPDCallback(lambda m: -loss_of(m, 99, rows).item(), scope="all")
        callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
        for t in steps:
            loss_of(model, t, rows).backward()
            optimizer.step()
            callback.on_optimizer_step(args, state, None)
            optimizer.zero_grad()
            state.global_step = t
        callback.on_save(args, state, None)
        weights, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model = net("blocks")
        model.load_state_dict(weights)
    return callback.effopd.history, whole_weights(model)


def disagree(rank):
    """One weight at 0, 2, ...: alone, rank 0 would accept everything and rank 1 nothing; at 46 rank 1 has no score."""
    model = nn.ModuleDict({"mlp": nn.Linear(1, 1, bias=False)})
    weight = nn.init.zeros_(model["mlp"].weight)
    score = {0: lambda at: 2 * at, 1: lambda at: -at if at < 40 else math.nan}[rank]
    effopd, kept = EffOPD(model, lambda m: score(weight.item()), num_candidates=2), []
    for t in (1, 2, 4):
        nn.init.constant_(weight, weight.item() + 2 ** t)
        kept.append((effopd.step(t)["accepted"], weight.item()))
    return kept


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, results = slice(4 * rank, 4 * rank + 4), []         # half of every batch, half of the validation
    for wrap, settings in itertools.product(WRAPS, SETTINGS):
        model = net(wrap)
        results.append((train(model, rows, settings), whole_weights(model)))
    for stop_after in (1, 3):
        results.append(through_a_checkpoint(rows, f"{folder}/run{stop_after}", stop_after))
    refused = []
    fsdp1 = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    for model, settings in [(net("blocks"), dict(offload=True)), (fsdp1, {})]:
        try:
            EffOPD(model, lambda m: 0.0, **settings)
        except ValueError as error:
            refused.append(str(error))
    torch.save({"results": results, "refused": refused, "kept": disagree(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_that_disagree_decide_alike(ranks):
    # mean score: at / 2, so all is accepted until 40, from where one rank's score is not a number
    assert ranks[0]["kept"] == ranks[1]["kept"] == [(2, 10.0), (2, 30.0), (0, 46.0)]


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def test_both_ranks_have_the_same_weights_and_records(ranks):
    for (history_0, weights_0), (history_1, weights_1) in zip(*(rank["results"] for rank in ranks), strict=True):
        for record_0, record_1 in zip(timeless(history_0), timeless(history_1), strict=True):
            assert record_0 == record_1
        assert all(torch.equal(w, weights_1[name]) for name, w in weights_0.items())


@pytest.mark.parametrize("case, wrap, settings", [
    (i, *case) for i, case in enumerate(itertools.product(WRAPS, SETTINGS))])
def test_two_processes_are_one(ranks, case, wrap, settings):
    """Scores, Δ, alignment and utility too, to float32's rounding: the sums are in another order."""
    history, weights = ranks[0]["results"][case]
    single = net()
    expected = train(single, slice(None), settings)
    assert [record["step"] for record in expected] == [1, 2, 4] and any(record["accepted"] for record in expected)
    for record, other in zip(history, expected, strict=True):
        utility = {name.removeprefix("module."): u for name, u in record["utility"].items()}
        assert utility == pytest.approx(other["utility"], rel=1e-3, abs=1e-5)
        for key in ("step", "multiples", "accepted", "multiple", "stopped"):
            assert record[key] == other[key]
        for key in ("scores", "delta_norm", "alignment"):
            assert record[key] == (other[key] and pytest.approx(other[key], rel=1e-4))
    for name, w in single.state_dict().items():
        torch.testing.assert_close(weights[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_sharded_resumed_equals_uninterrupted(ranks, case):
    history, weights = ranks[0]["results"][len(WRAPS) * len(SETTINGS) + case]
    expected_history, expected = ranks[0]["results"][WRAPS.index("blocks") * len(SETTINGS)]
    assert timeless(history) == timeless(expected_history)
    assert all(torch.equal(w, expected[name]) for name, w in weights.items())


def test_offload_of_shards_and_fsdp1_are_refused(ranks):
    offload, fsdp1 = ranks[0]["refused"]
    assert "offload=True" in offload and "fsdp_version: 2" in fsdp1
