"""Two processes (gloo, CPU): DDP and FSDP2 end where one process that saw all the data ends."""

import math
import multiprocessing
import os
from datetime import timedelta

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="the callback's tests need trl: pip install trl==1.16.0")

import torch.distributed as dist
from test_trl import minus_loss, timeless, tiny_llama, trainer_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from extras.trl_callback import DistributedEffOPD, EffOPDCallback, whole


def truncated(delta):
    """Δ without its last singular direction: it takes the whole matrix."""
    if delta.ndim < 2:
        return delta
    U, sigma, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    sigma[-1] = 0
    return torch.from_numpy(U * sigma @ Vh)


GATES = dict(utility_gate=True, alignment_gate=0.91, candidates="doubling")
CASES = {"ddp": GATES, "blocks": GATES, "root": dict(direction=truncated)}


# A training loop of one's own.

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(5, 7)                           # 7 and 5 rows: uneven shards
        self.mlp = nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return x + self.mlp(torch.tanh(self.attn(x)))


def net(wrap=None):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(5))
    if wrap == "ddp":
        return DistributedDataParallel(model)
    sharded = {None: [], "root": [model], "blocks": [*model[:2], model]}         # FSDP2's groups
    for module in sharded[wrap]:
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return model


def loss_of(model, t, rows):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t))[rows]
    return (model(x) - x.flip(1)).square().mean()


def train(model, rows, settings):
    """History and last weights of 5 steps on these rows of each batch, scored on such rows too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    effopd = DistributedEffOPD(model, lambda model: -loss_of(model, 99, rows).item(), scope="all",
                               **settings)
    for t in range(1, 6):
        loss_of(model, t, rows).backward()
        optimizer.step()
        effopd.step(t)
        optimizer.zero_grad()
    return effopd.history, whole_weights(model)


def whole_weights(model):
    weights = model.state_dict().items()
    return {name.removeprefix("module."): whole(w).detach().clone() for name, w in weights}


def disagree(rank):
    """What is kept where, alone, rank 0 would accept everything, rank 1 nothing, and 40 is NaN."""
    model = nn.ModuleDict({"mlp": nn.Linear(1, 1, bias=False)})
    weight = nn.init.zeros_(model["mlp"].weight)

    def validate(model):
        at = weight.item()
        return [2 * at, -at if at < 40 else math.nan][rank]

    effopd = DistributedEffOPD(model, validate, num_candidates=2)
    kept = []
    for t in (1, 2, 4):
        nn.init.constant_(weight, weight.item() + 2 ** t)
        kept.append((effopd.step(t)["multiple"], weight.item()))
    return kept


def overflow(rank):
    """Scores where the first candidate is infinite in rank 1's rows alone."""
    model = net("blocks")
    effopd = DistributedEffOPD(model, lambda model: 1.0, accept="ge", scope="mlp")
    with torch.no_grad():
        model[0].mlp.weight.to_local().add_(2e38 * rank)
    return effopd.step(1)["scores"]


# A Trainer.

def train_with_trainer(folder, model=None, resume=None, **settings):
    callback = EffOPDCallback(minus_loss, num_candidates=2)
    trainer = trainer_of(folder, callback, model=model or tiny_llama(num_hidden_layers=1),
                         max_steps=4, resume_from_checkpoint=resume, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return callback.effopd.history, whole_weights(trainer.model), callback.effopd.sharded


def train_with_two(folder):
    """DDP, FSDP2 by transformers, FSDP2 by accelerate, the same from step 3 on."""
    each = dict(per_device_train_batch_size=2)
    ddp = train_with_trainer(folder, **each)
    from transformers.distributed import DistributedConfig
    config = DistributedConfig(fsdp_size=2)
    model = LlamaForCausalLM.from_pretrained(f"{folder}/base", distributed_config=config)
    by_transformers = train_with_trainer(folder, model, **each)

    # accelerate shards on GPUs only: say that these are GPUs. The rest is what its launcher says.
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    AcceleratorState._reset_state()
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true")
    start = PartialState.__init__

    def start_on_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_on_gpus
    by_accelerate = train_with_trainer(folder, **each, save_strategy="steps", save_steps=3)
    resumed = train_with_trainer(folder, resume=f"{folder}/checkpoint-3", **each)
    return [ddp, by_transformers, by_accelerate, resumed]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(minutes=2))
    rows = slice(4 * rank, 4 * rank + 4)                      # half of every batch
    results = {wrap: train(net(wrap), rows, settings) for wrap, settings in CASES.items()}
    results |= {"kept": disagree(rank), "overflow": overflow(rank)}
    fsdp1 = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        DistributedEffOPD(fsdp1, lambda model: 0.0)
    results["trainer"] = train_with_two(folder)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "base")
    multiprocessing.set_forkserver_preload([__name__])        # imports once for both: quicker
    torch.multiprocessing.start_processes(one_rank, [str(folder)], 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


# What came of it.

def assert_same(result, expected, **tolerance):
    for record, other in zip(timeless(result[0]), timeless(expected[0]), strict=True):
        record["utility"] = list(record["utility"].values())  # the names differ under DDP
        other["utility"] = list(other["utility"].values())
        assert record.keys() == other.keys()
        for key, value in other.items():
            near = None if value is None else pytest.approx(value, **tolerance)
            assert record[key] == near, key
    for name, w in expected[1].items():
        assert result[1][name].numpy() == pytest.approx(w.numpy(), **tolerance), name


EXACTLY = dict(rel=0, abs=0)
CLOSELY = dict(rel=1e-3, abs=1e-5)                            # float32, summed in another order


def test_ranks_that_disagree_decide_alike(ranks):
    # the mean score is half the weight: all is accepted until 40, where one rank has no score
    assert ranks[0]["kept"] == ranks[1]["kept"] == [(4, 10.0), (4, 30.0), (0, 46.0)]
    assert ranks[0]["overflow"] == ranks[1]["overflow"] == [1.0, None]


def test_both_ranks_have_the_same_weights_and_records(ranks):
    mine, theirs = ([*map(rank.get, CASES), *rank["trainer"]] for rank in ranks)
    for result, other in zip(mine, theirs, strict=True):
        assert_same(result, other, **EXACTLY)


@pytest.mark.parametrize("wrap", CASES)
def test_two_processes_are_one(ranks, wrap):
    single = train(net(), slice(None), CASES[wrap])
    searches = [(record["step"], len(record["scores"]) > 1) for record in single[0]]
    gate_closed = CASES[wrap] is GATES
    assert searches == [(1, True), (2, not gate_closed), (4, True)]
    assert_same(ranks[0][wrap], single, **CLOSELY)


def test_a_trainer_on_two_processes_is_one(ranks, tmp_path):
    single = train_with_trainer(tmp_path, per_device_train_batch_size=4)
    assert any(record["multiple"] for record in single[0])
    *two, resumed = ranks[0]["trainer"]
    assert [sharded for *_, sharded in two] == [False, True, True]
    for result in two:
        assert_same(result, single, **CLOSELY)
    assert_same(resumed, two[-1], **EXACTLY)                  # over the search at step 4
