"""EffOPD in transformers.Trainer and TRL, on one process or many (DDP, FSDP2).

Needs `pip install trl==1.16.0` (tested with transformers 5.23.0). `EffOPDCallback` goes into a
trainer; `DistributedEffOPD`, which it makes, can also be called in a training loop of your own.
"""

import json
import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from effopd import EffOPD, cosine, inner, mean_alignment, module_utility, undisturbed

log = logging.getLogger(__name__)


class EffOPDCallback(TrainerCallback):
    """EffOPD in a transformers.Trainer, for example TRL's DistillationTrainer.

        from trl import DistillationConfig, DistillationTrainer
        from extras.trl_callback import EffOPDCallback

        def validate(model):                      # -> higher is better: the share of right answers
            inputs = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
            tokens = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=True)
            replies = tokens[:, inputs["input_ids"].shape[1]:]
            replies = tokenizer.batch_decode(replies, skip_special_tokens=True)
            return sum(map(is_right, replies, answers)) / len(answers)

        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, processing_class=tokenizer, train_dataset=prompts,
            args=DistillationConfig("runs/trl", max_steps=4, learning_rate=1e-4, bf16=False,
                                    max_completion_length=16),
            callbacks=[EffOPDCallback(validate)])             # searches at steps 1, 2, 4, 8, ...
        trainer.train()

    validate and settings are EffOPD's. The optimizer is the trainer's; with move_lr its scheduler's
    base rates move as well, so that from then on every rate is 1 + m times what it would have been.
    A search comes before the step's gradients are cleared. It adds effopd_multiple, effopd_score
    (None: not finite) and effopd_lr to the trainer's log_history; its whole record is in
    `callback.effopd.history`.

    Checkpoints get effopd-*.safetensors (W_prev, Δ and history; under FSDP2 one for each rank's
    shards). A resumed run takes them from args.resume_from_checkpoint if that is a folder, else
    from output_dir/checkpoint-<step>, and ends where an uninterrupted one does.

    Many processes: `validate` gets the model without its DDP wrapper, and each rank may score other
    problems. Under FSDP2 all need as many forward passes: model.generate(..., synced_gpus=True).
    vLLM has no candidate's weights: `validate` must not ask it, unless it sends them first.
    LoRA: A and B each move along their own Δ, so that their product also moves by a term in m².

    ValueError when training begins: a wrong setting; DeepSpeed, whose master weights would
    overwrite a jump; FSDP1; a checkpoint of another run, model or scope.
    """

    def __init__(self, validate, **settings):
        self.validate, self.settings = validate, settings
        self.effopd = None                                    # made when training begins

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.deepspeed_plugin is not None:
            raise ValueError("EffOPD does not work with DeepSpeed, which keeps weights of its own: "
                             "use DDP or FSDP2")
        if getattr(args, "use_vllm", False) and state.is_world_process_zero:
            log.warning("EffOPD: validate must not ask vLLM, which has no candidate's weights, "
                        "unless it sends them first")
        settings = {**self.settings, "optimizer": optimizer}
        self.effopd = DistributedEffOPD(model, self.validate, **settings)        # remembers W_0
        if state.global_step > 0:
            self.resume(args, state)

    def on_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        record = self.effopd.step(state.global_step + 1)      # counted up after this event
        if record is None:
            return
        state.log_history.append(log_entry(record))
        if self.effopd.move_lr and hasattr(lr_scheduler, "base_lrs"):
            factor = 1 + record["multiple"]
            lr_scheduler.base_lrs = [factor * rate for rate in lr_scheduler.base_lrs]

    def on_save(self, args, state, control, **kwargs):
        writes = args.should_save or self.effopd.sharded
        if args.save_only_model or not writes:
            return
        saved = self.effopd.state_dict()
        tensors = {}
        for kind in ("previous", "delta"):
            for name, tensor in (saved[kind] or {}).items():
                tensors[f"{kind}.{name}"] = local(tensor).contiguous()
        folder = newest_checkpoint(args, state)
        folder.mkdir(parents=True, exist_ok=True)             # a rank may come before rank 0
        save_file(tensors, self.file_in(folder), {"history": json.dumps(saved["history"])})

    def resume(self, args, state):
        """Load what `on_save` wrote; where there is nothing, warn and take these weights as W_0."""
        folder = newest_checkpoint(args, state)
        given = args.resume_from_checkpoint                   # a folder's name, True or None
        if isinstance(given, (str, Path)) and Path(given).is_dir():
            folder = Path(given)
        path = self.file_in(folder)
        if mean_over_ranks(path.exists(), args.device) < 1:   # all ranks start anew, or none
            log.warning(f"EffOPD starts anew from these weights: no {path}. If the checkpoint is "
                        "elsewhere, set args.resume_from_checkpoint to its folder")
            return
        saved = {"previous": {}, "delta": {}}
        with safe_open(path, "pt") as file:
            saved["history"] = json.loads(file.metadata()["history"])
            for key in file.keys():
                kind, name = key.split(".", 1)
                parameter = self.effopd.parameters.get(name)
                saved[kind][name] = from_local(file.get_tensor(key), parameter)
        saved["delta"] = saved["delta"] or None
        logged = [entry for entry in state.log_history if "effopd_multiple" in entry]
        if logged != [log_entry(record) for record in saved["history"]]:
            raise ValueError(f"{path} is of another run: set args.resume_from_checkpoint to the "
                             "folder that the trainer resumes from")
        self.effopd.load_state_dict(saved)

    def file_in(self, folder) -> Path:
        rank, ranks = 0, 1
        if self.effopd.sharded:
            rank, ranks = dist.get_rank(), dist.get_world_size()
        return folder / f"effopd-{rank:05d}-of-{ranks:05d}.safetensors"


def newest_checkpoint(args, state) -> Path:
    """Where the trainer has just saved; after resume_from_checkpoint=True, where it loaded from."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def log_entry(record) -> dict:
    score = dict(zip(record["multiples"], record["scores"])).get(record["multiple"])
    return {"step": record["step"], "effopd_multiple": record["multiple"], "effopd_score": score,
            "effopd_lr": record["lr"]}


class DistributedEffOPD(EffOPD):
    """EffOPD on one rank or many, with DDP or FSDP2 (fully_shard). All ranks must call `step`.

    The mean of their scores decides for all; where one of them has no finite score, none has.
    W_prev and Δ are sharded as the parameters are, and `direction` gets them so. For the record,
    few whole matrices at a time are gathered. ValueError also for FSDP1.
    """

    def __init__(self, model, validate, **settings):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("FSDP1 flattens the parameters: use FSDP2 (fully_shard; in "
                             "accelerate, fsdp_version: 2)")
        reshard(model)
        super().__init__(model, validate, **settings)
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device

    def place(self, current, delta, multiple):
        reshard(self.model)                                   # gathered weights would be stale
        super().place(current, delta, multiple)

    def score(self, seed) -> float:
        """The mean of the ranks' scores; NaN on all where a score, or a weight, is not finite."""
        finite = torch.stack([local(p).isfinite().all() for p in self.parameters.values()]).all()
        if mean_over_ranks(finite, self.device) < 1:
            return math.nan
        with undisturbed(self.model, seed):
            score = mean_over_ranks(self.validate(self.model), self.device)
        return score if math.isfinite(score) else math.nan

    def look_at(self, delta) -> dict:
        """EffOPD's, of whole tensors. Rank 0's numbers on all ranks: the two gates go by them."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.utility_gate and not gradients:
            raise ValueError("utility_gate needs gradients: call step() before zero_grad()")
        delta = Gathered(delta)
        record = {"delta_norm": math.sqrt(inner(delta, delta)), "cosine": None, "alignment": None,
                  "utility": module_utility(Gathered(gradients), delta)}
        if self.delta is not None:
            last = Gathered(self.delta)
            record["cosine"] = cosine(delta, last)
            record["alignment"] = mean_alignment(delta, last)
        records = [record]
        if dist.is_initialized():
            dist.broadcast_object_list(records, src=0)
        return records[0]


class Gathered(dict):
    """Tensors by name, each gathered from all ranks when it is looked up by its name."""

    def __getitem__(self, name):
        return whole(super().__getitem__(name))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's part of a tensor, in the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def from_local(part, parameter):
    """This rank's part of a tensor that is sharded as the parameter is; `part` where it is not."""
    if not isinstance(parameter, DTensor) or part.shape != local(parameter).shape:
        return part                                           # load_state_dict refuses other shapes
    tensor = torch.empty_like(parameter, requires_grad=False)
    local(tensor).copy_(part)
    return tensor


def reshard(model):
    """Back to shards: FSDP2 leaves the root's parameters gathered after a forward pass."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def mean_over_ranks(value, device) -> float:
    """The mean of a number over all ranks, the same float on each of them."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
