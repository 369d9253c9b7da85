"""Two processes (gloo, CPU): DDP and FSDP2 end where one process that saw all the data ends."""

import math
import multiprocessing
import os
from datetime import timedelta

import pytest
import torch

pytest.importorskip("trl", reason="the callback's tests need trl: pip install trl==1.16.0")

import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from test_trl import minus_loss, timeless, tiny_llama, trainer_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing import assert_close

from effopd import EffOPD
from extras import trl_callback
from extras.trl_callback import DistributedEffOPD, EffOPDCallback, whole


def disagree(rank):
    """What is kept where, alone, rank 0 would accept everything, rank 1 nothing, and 40 is NaN.

    By rank 1's gradient there is no utility, and its gate is closed: rank 0's counts.
    """
    model = nn.ModuleDict({"mlp": nn.Linear(1, 1, bias=False)})
    weight = nn.init.zeros_(model["mlp"].weight)

    def validate(model):
        at = weight.item()
        return [2 * at, -at if at < 40 else math.nan][rank]

    effopd = DistributedEffOPD(model, validate, num_candidates=2, utility_gate=True)
    weight.grad = torch.tensor([[2.0 * rank - 1]])
    kept = []
    for t in (1, 2, 4):
        nn.init.constant_(weight, weight.item() + 2 ** t)
        kept.append((effopd.step(t)["multiple"], weight.item()))
    return kept


def overflow(rank):
    """Scores where the first candidate is infinite in rank 1's rows alone."""
    model = nn.Linear(2, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    effopd = DistributedEffOPD(model, lambda model: 1.0, accept="ge", scope="all")
    with torch.no_grad():
        model.weight.to_local().add_(2e38 * rank)
    return effopd.step(1)["scores"]


# A Trainer.

def train_with_trainer(folder, batch_size, resume=None, **settings):
    callback = EffOPDCallback(minus_loss, num_candidates=2, scope="all", alignment_gate=0.72)
    trainer = trainer_of(folder, callback, model=tiny_llama(), max_steps=4,
                         per_device_train_batch_size=batch_size, resume_from_checkpoint=resume,
                         **settings)
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: whole(w).detach().clone() for name, w in trainer.model.state_dict().items()}
    return callback.effopd.history, weights


def train_with_two(folder):
    """By DDP, by accelerate's FSDP2, and by this again from step 3 on."""
    ddp = train_with_trainer(folder, 2)
    # accelerate shards on GPUs only: say that these are GPUs. The rest is what its launcher says.
    AcceleratorState._reset_state()
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true")
    start = PartialState.__init__

    def start_on_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_on_gpus
    sharded = train_with_trainer(folder, 2, save_strategy="steps", save_steps=3)
    assert os.path.exists(f"{folder}/checkpoint-3/effopd-00001-of-00002.safetensors")
    return [ddp, sharded, train_with_trainer(folder, 2, resume=f"{folder}/checkpoint-3")]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(minutes=2))
    results = {"kept": disagree(rank), "scores": overflow(rank), "trainer": train_with_two(folder)}
    fsdp1 = FullyShardedDataParallel(nn.Linear(2, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        DistributedEffOPD(fsdp1, lambda model: 0.0)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])        # imports once for both: quicker
    torch.multiprocessing.start_processes(one_rank, [str(folder)], 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


# What came of it.

def assert_same(result, expected, **tolerance):
    for record, other in zip(timeless(result[0]), timeless(expected[0]), strict=True):
        assert record.keys() == other.keys()
        for key, value in other.items():
            near = None if value is None else pytest.approx(value, **tolerance)
            assert record[key] == near, key
    assert_close(result[1], expected[1], rtol=tolerance["rel"], atol=tolerance["abs"])


EXACTLY = dict(rel=0, abs=0)
CLOSELY = dict(rel=1e-3, abs=1e-5)                            # float32, summed in another order


def test_ranks_that_disagree_decide_alike(ranks):
    # the mean score is half the weight: all is accepted until 40, where one rank has no score
    assert ranks[0]["kept"] == ranks[1]["kept"] == [(4, 10.0), (4, 30.0), (0, 46.0)]
    assert ranks[0]["scores"] == ranks[1]["scores"] == [1.0, None]


def test_both_ranks_have_the_same_weights_and_records(ranks):
    for result, other in zip(ranks[0]["trainer"], ranks[1]["trainer"], strict=True):
        assert_same(result, other, **EXACTLY)


def test_a_trainer_on_two_processes_is_plain_effopd_on_one(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_callback, "DistributedEffOPD", EffOPD)
    single = train_with_trainer(tmp_path, 4)
    assert [(record["step"], record["multiple"]) for record in single[0]] == [
        (1, 4), (2, 0), (4, 4)]                               # the gate was closed at step 2
    ddp, sharded, resumed = ranks[0]["trainer"]
    assert_same(ddp, single, **CLOSELY)
    assert_same(sharded, single, **CLOSELY)
    assert_same(resumed, sharded, **EXACTLY)                  # over the search at step 4
