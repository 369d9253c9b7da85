"""EffOPD in one file: the on-policy distillation losses and the step-size search.

On-policy distillation (OPD): the student π samples answers, the frozen teacher π* scores the same tokens,
and the student is moved along the gradient of the reverse KL(π || π*) at the states it visits itself.

EffOPD ("Learning to Foresee", arXiv:2605.11739): the direction of such an update settles early, so one can
look further along it. After optimiser steps 1, 2, 4, 8, ...

    Δ = W_t - W_prev                     the way travelled since the last trigger (W_0 at the first)
    W_t + 2Δ, W_t + 4Δ, ..., W_t + 10Δ   candidates, each from W_t
    keep the last one before the score on a small validation set stops improving, else W_t
    W_prev = what was kept               so that no Δ ever contains a jump

Everything here works on any torch.nn.Module and any training loop; nothing is imported from the other scripts.

Where the paper is silent or says two things, this is what we chose:
  - a tie is a failure: accept="gt". The paper's formula has >=, its next sentence says "improve"; accept="ge" is there.
  - Adam's moments are kept after a jump. Passing `optimizer` resets those of the moved weights.
  - the attention and MLP matrices move; embeddings, norms and biases do not (scope="attention+mlp").
  - all candidates of one search are scored under one random seed, the next search has another.
"""

import math
import random
import time
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------------
# Losses. Logits (B, T, V) in any floating dtype, computed on in float32; mask (B, T) is 1 where a token counts.
# Position t of the logits is the one that predicts token t: shift before you call. The student's side carries the
# gradient, the teacher's never does. The sum over tokens is divided by num_tokens (default: the mask's), so
# micro-batches that are all given the whole batch's count add up to the whole batch's gradient.

def reverse_kl(student_logits, teacher_logits, mask, num_tokens=None):
    """Mean over tokens of KL(π || π*) = Σ_v π(v) [log π(v) - log π*(v)], in nats: a scalar.

    The objective of discount 0 over the full vocabulary; the paper trains with its sampled form, below.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)                                 # (B, T)
    return masked_mean(kl, mask, num_tokens)


def reverse_kl_sampled(student_logits, teacher_logits, tokens, mask, discount=0.0, num_tokens=None):
    """Policy-gradient form on the sampled tokens (B, T): its gradient estimates the reverse KL's, its value does not.

    discount 0: (log π(y_t) - log π*(y_t)) ∇ log π(y_t), what arXiv:2605.11739 trains with; its expectation is the
    gradient of `reverse_kl`. discount 1: the coefficient is the sum over t' >= t, the exact gradient of the KL
    between whole sequences. The coefficient is a constant: differentiating it too would change the objective.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]           # (B, T)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1).gather(-1, tokens[..., None])[..., 0]  # (B, T)
    coefficient = (log_p.detach() - log_q) * mask
    for t in reversed(range(coefficient.shape[1] - 1) if discount else ()):
        coefficient[:, t] += discount * coefficient[:, t + 1]                    # return-to-go
    return masked_mean(coefficient * log_p, mask, num_tokens)


def reverse_kl_top_k(student_logits, teacher_logits, mask, k, num_tokens=None):
    """Reverse KL over the student's k most probable tokens and one bucket for all others: 0 <= it <= `reverse_kl`.

    Without the bucket it would be no divergence: it could fall below 0 by moving mass out of the top k.
    """
    if k >= student_logits.shape[-1]:
        return reverse_kl(student_logits, teacher_logits, mask, num_tokens)
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1)
    top = log_p.detach().topk(k, dim=-1).indices                                 # (B, T, k)

    def coarsen(log_probs):
        tail = log_probs.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat((log_probs.gather(-1, top), tail), dim=-1)              # (B, T, k + 1)

    log_p, log_q = coarsen(log_p), coarsen(log_q)
    return masked_mean((log_p.exp() * (log_p - log_q)).sum(-1), mask, num_tokens)


def masked_mean(values, mask, num_tokens=None):
    """Σ of values where mask is set, over num_tokens."""
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    return (values * mask).sum() / max(num_tokens, 1)


# ----------------------------------------------------------------------------------------------------------------
# The search.

SCOPES = {  # which parameters a jump moves: matrices whose name has one of these
    "attention+mlp": ("attn", "attention", "mlp", "ffn", "feed_forward"),
    "mlp": ("mlp", "ffn", "feed_forward"),
}


class EffOPD:
    """Extrapolate, check, keep or undo: EffOPD in anybody's training loop.

        effopd = EffOPD(model, validate)                    # before training: it remembers W_0
        for t, batch in enumerate(batches, start=1):
            loss_of(model, batch).backward()
            optimizer.step(); optimizer.zero_grad()
            effopd.step(t)                                  # searches at t = 1, 2, 4, 8, ...; else does nothing

    validate: model -> float, higher is better; for example the accuracy on 50 problems. It is called in evaluation
        mode, without gradients, with Python's, NumPy's and torch's random state seeded alike for all candidates of
        one search; modes, buffers and random states are put back afterwards. With torch.distributed initialised,
        every rank must call `step`, and the mean of the ranks' scores decides for all of them.
    accept: "gt", a candidate must score higher than the last one kept; "ge", not lower.
    candidates: "linear", W_t + 2kΔ (the paper's); "doubling", W_t + 2^k Δ; for k = 1 .. num_candidates.
    scope: "attention+mlp" or "mlp" matrices, found by name (SCOPES: the names of Llama, Qwen, GPT-2 and their like), or
        "all" trainable parameters.
    first_trigger: searches at this step and its doublings. every: also at each multiple of this (0: off).
    optimizer: its state for the moved weights is dropped after a jump (None: kept).
    seed: of the random states that the candidates are scored under.

    Costs two copies of the weights in scope while searching, one (W_prev) in between. ValueError for a wrong option,
    and for a model that has nothing in scope.
    """

    def __init__(self, model, validate, *, accept="gt", candidates="linear", num_candidates=5, scope="attention+mlp",
                 first_trigger=1, every=0, optimizer=None, seed=0):
        for name, value, allowed in [("accept", accept, ("gt", "ge")), ("scope", scope, (*SCOPES, "all")),
                                     ("candidates", candidates, ("linear", "doubling"))]:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, value, least in [("num_candidates", num_candidates, 1), ("first_trigger", first_trigger, 1),
                                   ("every", every, 0)]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.model, self.validate, self.optimizer, self.seed = model, validate, optimizer, seed
        self.improves = (lambda new, old: new > old) if accept == "gt" else (lambda new, old: new >= old)
        self.multiples = [2 * k if candidates == "linear" else 2 ** k for k in range(1, num_candidates + 1)]
        self.first_trigger, self.every = first_trigger, every
        # named_parameters lists a tied matrix once, so it moves once.
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and (
            scope == "all" or p.ndim >= 2 and any(part in name.lower() for part in SCOPES[scope]))}
        if not self.parameters:
            raise ValueError(f"no trainable parameter of this model is in scope {scope!r}; use scope='all'")
        self.previous = self.copy_weights()                   # W_prev
        self.history = []                                     # the record of every search

    def copy_weights(self):
        return [p.detach().clone() for p in self.parameters.values()]

    def is_trigger(self, t: int) -> bool:
        """Whether a search follows optimiser step t (counted from 1)."""
        doublings, rest = divmod(t, self.first_trigger)
        return (rest == 0 and doublings.bit_count() == 1) or bool(self.every and t > 0 and t % self.every == 0)

    @torch.no_grad()
    def step(self, t: int) -> dict | None:
        """Call after optimiser step t. Searches if t is a trigger and returns the search's record, else None.

        The record: step; multiples and scores tried, W_t (multiple 0) first, None for a score that is not finite;
        accepted, the number of candidates accepted; multiple, the one kept (weights are now W_t + multiple * Δ);
        stopped, why the search ended; delta_norm = ||Δ||_F; seconds.
        """
        if not self.is_trigger(t):
            return None
        start = time.perf_counter()
        current = self.copy_weights()                         # W_t

        def place(multiple):
            for p, now, before in zip(self.parameters.values(), current, self.previous):
                p.copy_(now + float(multiple) * (now - before) if multiple else now)   # W_t + multiple * Δ

        device, scores, kept, stopped = current[0].device, [], 0, "all candidates accepted"
        try:
            for k, multiple in enumerate([0, *self.multiples]):
                place(multiple)
                if mean_over_ranks(all(p.isfinite().all() for p in self.parameters.values()), device) < 1:
                    scores.append(math.nan)
                    stopped = "weights not finite"
                    break
                with undisturbed(self.model, seed=(self.seed * 1_000_003 + t) % 2 ** 63):
                    scores.append(mean_over_ranks(self.validate(self.model), device))
                if not math.isfinite(scores[-1]):
                    stopped = "score not finite"
                    break
                if k > 0 and not self.improves(scores[-1], scores[-2]):
                    stopped = "score no better"
                    break
                kept = k
        except BaseException:                                 # whatever happened in validate, W_t survives it
            place(0)
            raise
        tried = [0, *self.multiples][:len(scores)]
        place(tried[kept])                                    # multiple 0 is a copy of W_t: bit for bit what it was
        if kept and self.optimizer is not None:
            for p in self.parameters.values():
                self.optimizer.state.pop(p, None)
        record = {
            "step": t, "multiples": tried, "scores": [s if math.isfinite(s) else None for s in scores],
            "accepted": kept, "multiple": tried[kept], "stopped": stopped,
            "delta_norm": float(sum((now - before).float().square().sum()
                                    for now, before in zip(current, self.previous)) ** 0.5),
            "seconds": time.perf_counter() - start,
        }
        for kept_weights, p in zip(current, self.parameters.values()):
            kept_weights.copy_(p)
        self.previous = current                               # W_prev: after the jump
        self.history.append(record)
        return record

    def state_dict(self) -> dict:
        """What a checkpoint needs: W_prev by name and the records of past searches."""
        return {"previous": dict(zip(self.parameters, self.previous)), "history": list(self.history)}

    def load_state_dict(self, state: dict):
        """Take back what state_dict gave. ValueError if it belongs to another model or scope."""
        shapes = {name: tuple(w.shape) for name, w in state["previous"].items()}
        if shapes != {name: tuple(p.shape) for name, p in self.parameters.items()}:
            raise ValueError("this EffOPD state was saved for other parameters: check the model and the scope")
        self.previous = [state["previous"][name].to(p.device, p.dtype, copy=True)
                         for name, p in self.parameters.items()]
        self.history = list(state["history"])


def mean_over_ranks(value, device) -> float:
    """The mean of a number over all processes, equal on each of them, so that they all decide alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@contextmanager
def undisturbed(model, seed: int):
    """Evaluation mode, no gradients, random states of its own (Python's, NumPy's, torch's on CPU and CUDA).

    Afterwards modes, buffers and random states are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        random.seed(seed), np.random.seed(seed % 2 ** 32), torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            random.setstate(python_state), np.random.set_state(numpy_state)
            for module, training in modes:
                module.training = training
            for buffer, saved in buffers:
                buffer.copy_(saved)
