"""EffOPD in one file: the on-policy distillation losses, the step-size search, and what one can see of an update.

On-policy distillation (OPD): the student π samples answers, the frozen teacher π* scores the same tokens,
and the student is moved along the gradient of the reverse KL(π || π*) at the states it visits itself.

EffOPD ("Learning to Foresee", arXiv:2605.11739): the direction of such an update settles early, so one can
look further along it. After optimiser steps 1, 2, 4, 8, ...

    Δ = W_t - W_prev                     the way travelled since the last trigger (W_0 at the first)
    W_t + 2Δ, W_t + 4Δ, ..., W_t + 10Δ   candidates, each from W_t
    keep the last one before the score on a small validation set stops improving, else W_t
    W_prev = what was kept               so that no Δ ever contains a jump

It works on any torch.nn.Module, in any training loop.

Where the paper is silent or says two things, this is what we chose:
  - a tie is a failure (accept="gt"): the paper's formula has >=, its next sentence says "improve".
  - Adam's moments are kept after a jump, unless `optimizer` is passed.
  - the attention and MLP matrices move; embeddings, norms and biases do not (scope="attention+mlp").
  - all candidates of one search are scored under one random seed; the next search has another.
  - module utility and the alignment of successive Δ are logged; they act only if asked to (the two gates).
Not the paper's: candidates="doubling" and "line", and every direction but "update".

The appendix has reinforcement learning's loss, losses in chunks, other directions, the distributed side of a search,
and the callback for transformers and TRL.
"""

import functools
import itertools
import json
import logging
import math
import random
import re
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError:                                           # only EffOPDCallback needs it
    TrainerCallback = object

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------------
# Losses. Logits (B, T, V) in any floating dtype, computed on in float32; mask (B, T) is 1 where a token counts.
# Position t of the logits is the one that predicts token t: shift before you call. The student's side carries the
# gradient, the teacher's never does. The sum over tokens is divided by num_tokens (default: the mask's), so
# micro-batches given the whole batch's count add up to its gradient. All but reverse_kl_sampled also take logits
# (N, V) of tokens that all count, with mask None.

def reverse_kl(student_logits, teacher_logits, mask=None, num_tokens=None):
    """Mean over tokens of KL(π || π*) = Σ_v π(v) [log π(v) - log π*(v)], in nats: a scalar.

    The paper trains with its sampled form, below.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)                                 # (B, T)
    return masked_mean(kl, mask, num_tokens)


def reverse_kl_sampled(student_logits, teacher_logits, tokens, mask, discount=0.0, num_tokens=None):
    """Policy-gradient form on the sampled tokens (B, T): its gradient estimates the reverse KL's, its value does not.

    discount 0: (log π(y_t) - log π*(y_t)) ∇ log π(y_t), what arXiv:2605.11739 trains with; its expectation is the
    gradient of `reverse_kl`. discount 1: the coefficient is the sum over t' >= t, whose expectation is the gradient of
    the KL between whole sequences. The coefficient is a constant: differentiating it too would change the objective.
    """
    log_p = token_log_probs(student_logits, tokens)                              # (B, T)
    log_q = token_log_probs(teacher_logits.detach(), tokens)
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


def token_log_probs(logits, tokens):
    """log π(y_t) of tokens (B, T) or (N,), in float32."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]


def masked_mean(values, mask=None, num_tokens=None):
    """Σ of values where mask is set, over num_tokens."""
    mask = torch.ones_like(values) if mask is None else mask
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    return (values * mask).sum() / max(num_tokens, 1)


# ----------------------------------------------------------------------------------------------------------------
# The search.

SCOPES = {  # which matrices a jump moves: by parts of their names in Llama, Qwen, GPT-2 and their like
    "attention+mlp": ("attn", "attention", "mlp", "ffn", "feed_forward"),
    "mlp": ("mlp", "ffn", "feed_forward"),
}


class EffOPD:
    """Extrapolate, check, keep or undo: EffOPD in anybody's training loop.

        effopd = EffOPD(model, validate)                    # before training: it remembers W_0
        for t, batch in enumerate(batches, start=1):
            loss_of(model, batch).backward()
            optimizer.step()
            effopd.step(t)                                  # searches at t = 1, 2, 4, 8, ...; else does nothing
            optimizer.zero_grad()                           # after the search, which logs the modules' utility

    validate: model -> float, higher is better; for example the accuracy on 50 problems. Called in evaluation mode,
        without gradients, under equal random states (Python's, NumPy's, torch's) for all candidates of one search;
        modes, buffers and random states are put back afterwards. With torch.distributed initialised, every rank must
        call `step`, and the mean of the ranks' scores decides for all of them.
    accept: "gt", a candidate must score higher than the last one kept; "ge", not lower; "always", it need not.
    candidates: "linear", W_t + 2kΔ (the paper's); "doubling", W_t + 2^k Δ; for k = 1 .. num_candidates. "line":
        doubling, from half of what the last search kept; where the first fails, the other way while each improves:
        smaller ones down to 2Δ, then back towards W_prev, W_t - Δ/2, W_t - 3Δ/4, ..., W_t - (1 - 2^-k)Δ.
    direction: what candidates go along: "update", Δ; "random", "top" or "tail", see `redirect`.
    scope: "attention+mlp" or "mlp" matrices, found by name (SCOPES), or "all" trainable parameters.
    first_trigger: searches at this step and its doublings. every: also at each multiple of this (0: off).
    optimizer: its state for the moved weights is dropped after a jump (None: kept).
    utility_gate: a jump leaves out the matrices whose utility (see `module_utility`) is not positive.
    alignment_gate: no search where cos(Δ, the last search's Δ) is below this (None: always search).
    seed: of the candidates' random states.
    offload: the copies are in the CPU's memory; the device holds at most three more tensors as large as the largest
        parameter (in float32). Same weights bit for bit.

    Costs two copies of the weights in scope (W_prev and the last Δ), four during a search (another direction: five).
    Under FSDP2 (fully_shard) each rank copies its own shards.
    If `validate` raises, W_t is back in the model, and calling `step(t)` again makes the same search.
    ValueError for a wrong option, for a model that has nothing in scope, for FSDP1, for offload with FSDP2, and from
    `step` if utility_gate finds no gradients.
    """

    def __init__(self, model, validate, *, accept="gt", candidates="linear", num_candidates=5, scope="attention+mlp",
                 direction="update", first_trigger=1, every=0, optimizer=None, utility_gate=False, alignment_gate=None,
                 seed=0, offload=False):
        check_options(model, accept, candidates, num_candidates, scope, direction, first_trigger, every)
        self.model, self.validate, self.optimizer = model, validate, optimizer
        self.seed, self.offload, self.direction = seed, offload, direction
        self.improves = {"gt": float.__gt__, "ge": float.__ge__, "always": lambda new, old: True}[accept]
        self.multiples = [2 * k if candidates == "linear" else 2 ** k for k in range(1, num_candidates + 1)]
        self.backwards = [2.0 ** -k - 1 for k in range(1, num_candidates + 1)] if candidates == "line" else []
        self.first_trigger, self.every = first_trigger, every
        self.utility_gate, self.alignment_gate = utility_gate, alignment_gate
        reshard(model)                                        # FSDP2's affair; else nothing
        # named_parameters lists a tied matrix once, so it moves once.
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and (
            scope == "all" or p.ndim >= 2 and any(part in name.lower() for part in SCOPES[scope]))}
        if not self.parameters:
            raise ValueError(f"no trainable parameter of this model is in scope {scope!r}; use scope='all'")
        if offload and any(map(is_sharded, self.parameters.values())):
            raise ValueError("offload=True is not for sharded parameters (FSDP2): their copies are sharded already")
        self.previous = self.copy_weights()                   # W_prev
        self.delta = None                                     # Δ of the last search
        self.history = []                                     # of records

    def copy_weights(self):
        return [p.detach().to("cpu" if self.offload else p.device, copy=True) for p in self.parameters.values()]

    def is_trigger(self, t: int) -> bool:
        """Whether a search follows optimiser step t (counted from 1)."""
        quotient, rest = divmod(t, self.first_trigger)        # a power of two has one bit
        return (rest == 0 and quotient.bit_count() == 1) or bool(self.every and t > 0 and t % self.every == 0)

    @torch.no_grad()
    def step(self, t: int) -> dict | None:
        """Call after optimiser step t. Searches if t is a trigger and returns the search's record, else None.

        Where the alignment gate is closed nothing is scored, and W_prev becomes W_t all the same.

        The record: step; multiples and scores tried, W_t (multiple 0) first, None for a score that is not finite;
        accepted, the number of candidates accepted; multiple, the one kept (weights are now W_t + multiple * Δ);
        stopped, why the search ended; delta_norm = ||Δ||_F; seconds; alignment = cos(Δ, the last search's Δ), None at
        the first; utility of each parameter in scope, {} without gradients.
        """
        if not self.is_trigger(t):
            return None
        start, seed = time.perf_counter(), (self.seed * 1_000_003 + t) % 2 ** 63
        reshard(self.model)
        current = self.copy_weights()                         # W_t, until the search is over
        delta = [now - before for now, before in zip(current, self.previous)]              # Δ
        if self.direction != "update":
            with undisturbed(self.model, seed):
                delta = [redirect(d, self.direction) for d in delta]
        utility, moved = self.useful(delta)
        alignment = None if self.delta is None else cosine(delta, self.delta)
        move_to = functools.partial(self.place, current, delta, moved)
        try:
            found = self.search(move_to, seed, alignment)
        except BaseException:                                 # of validate
            move_to(0)
            raise
        move_to(found["multiple"])
        if found["multiple"] and self.optimizer is not None:
            for p in itertools.compress(self.parameters.values(), moved):
                self.optimizer.state.pop(p, None)
        record = {"step": t, **found, "delta_norm": sum(dot(d, d) for d in delta) ** 0.5,
                  "seconds": time.perf_counter() - start, "alignment": alignment, "utility": utility}
        for w, p in zip(current, self.parameters.values()):
            w.copy_(p)                                        # from here on current holds what was kept
        self.previous, self.delta = current, delta
        self.history.append(record)
        return record

    def useful(self, delta) -> tuple[dict, list]:
        """Utility of each parameter in scope by name, from the gradients of the step just taken, and who moves."""
        utility = module_utility({name: p.grad for name, p in self.parameters.items()},
                                 dict(zip(self.parameters, delta)))
        if self.utility_gate and not utility:
            raise ValueError("utility_gate needs gradients: call step() before optimizer.zero_grad()")
        return utility, [not self.utility_gate or utility.get(name, 0) > 0 for name in self.parameters]

    def place(self, current, delta, moved, multiple):
        """Put W_t + multiple * Δ into the model; for multiple 0 W_t itself, bit for bit."""
        reshard(self.model)
        for p, now, d, moves in zip(self.parameters.values(), current, delta, moved):
            p.copy_(now.to(p.device) + float(multiple) * d.to(p.device) if multiple and moves else now)

    def plan(self) -> tuple[list, list]:
        """Multiples of Δ to try next, in order, and ("line") those that take their place if the first of them fails."""
        if not self.backwards:
            return self.multiples, []
        start = max(2, self.history[-1]["multiple"] / 2 if self.history else 0)
        smaller = [m for m in self.multiples[::-1] if m < start]
        return [m for m in self.multiples if m >= start], smaller + self.backwards

    def search(self, move_to, seed, alignment) -> dict:
        """Score W_t, then candidates in order, until one is no better than the last kept: that part of the record."""
        forwards, otherwise = self.plan()
        queue, stopped = [0, *forwards], "no candidate left"
        if None not in (self.alignment_gate, alignment) and alignment < self.alignment_gate:
            queue, stopped = [], "alignment below the gate"
        scores, accepted, kept, best = [], 0, 0, None
        for k, multiple in enumerate(queue):
            move_to(multiple)
            score, wrong = self.score(seed)
            scores.append(None if wrong else score)
            if wrong:
                stopped = wrong
                break
            if k == 0 or self.improves(score, best):
                kept, best, accepted = multiple, score, accepted + (k > 0)
            elif k == 1 and otherwise:                        # the first failed: the other way, until one fails
                queue[2:] = otherwise
            else:
                stopped = "score no better"
                break
        return {"multiples": queue[:len(scores)], "scores": scores, "accepted": accepted, "multiple": kept,
                "stopped": stopped}

    def score(self, seed):
        """(The score of the weights now in the model, what about it or them is not finite or None.)"""
        device = next(iter(self.parameters.values())).device
        if mean_over_ranks(all(p.isfinite().all() for p in self.parameters.values()), device) < 1:
            return math.nan, "weights not finite"
        with undisturbed(self.model, seed):
            score = mean_over_ranks(self.validate(self.model), device)
        return score, None if math.isfinite(score) else "score not finite"

    def state_dict(self) -> dict:
        """What a checkpoint needs: W_prev and the last Δ by name, and the records of past searches."""
        return {"previous": dict(zip(self.parameters, self.previous)), "history": list(self.history),
                "delta": None if self.delta is None else dict(zip(self.parameters, self.delta))}

    def load_state_dict(self, state: dict):
        """Take back what state_dict gave. ValueError if it belongs to another model or scope."""
        shapes = {name: tuple(w.shape) for name, w in state["previous"].items()}
        if shapes != {name: tuple(p.shape) for name, p in self.parameters.items()}:
            raise ValueError("this EffOPD state was saved for other parameters: check the model and the scope")

        def mine(tensors):
            return [tensors[name].to("cpu" if self.offload else p.device, p.dtype, copy=True)
                    for name, p in self.parameters.items()]

        self.previous, self.history = mine(state["previous"]), list(state["history"])
        self.delta = None if state["delta"] is None else mine(state["delta"])


# ----------------------------------------------------------------------------------------------------------------
# What one can see of an update: where it is useful, how concentrated it is, where it points. PAPER: sections 3 and 4.

def module_utility(gradients: dict, deltas: dict) -> dict:
    """First-order utility of each parameter's update, -<∇L, Δ_m> / ||Δ_m||_F: the loss it takes off per unit of norm.

    gradients and deltas: tensors by name; a name whose gradient is None is left out, an update of norm 0 is worth 0.
    A float by name, in units of the loss over those of the weights (of the clipped loss, after gradient clipping).
    """
    return {name: -dot(g, deltas[name]) / max(dot(deltas[name], deltas[name]) ** 0.5, 1e-30)
            for name, g in gradients.items() if g is not None}


def cosine(a: list, b: list) -> float:
    """Cosine between two updates, lists of tensors taken as one long vector each; 0 where one of them is 0."""
    norms = math.prod(sum(dot(x, x) for x in update) ** 0.5 for update in (a, b))
    return sum(map(dot, a, b)) / norms if norms else 0.0


def spectral_metrics(delta) -> dict:
    """How concentrated an update ΔW = U Σ Vᵀ is. delta: the matrix (m, n), or its r = min(m, n) singular values (r,).

    spectral_norm   σ1
    spectral_ratio  σ1 / ||ΔW||_F, from 1/sqrt(r) to 1
    effective_rank  exp(-Σ p log p) with p = σ / Σσ (of σ, not of σ²), from 1 to r
    stable_rank     ||ΔW||_F² / σ1², from 1 to r
    top1_ratio      ||the top ceil(r / 100) of σ|| / ||σ||, a ratio of norms (not of their squares)
    Floats, all 0 for a zero matrix. ValueError for anything but finite numbers in one or two dimensions.
    """
    if delta.ndim not in (1, 2) or delta.numel() == 0 or not delta.isfinite().all():
        raise ValueError(f"need a matrix or its singular values, all finite, got shape {tuple(delta.shape)}")
    sigma = singular_values(delta) if delta.ndim == 2 else delta.double().sort(descending=True).values         # (r,)
    if sigma[0] == 0:
        return dict.fromkeys(("spectral_norm", "spectral_ratio", "effective_rank", "stable_rank", "top1_ratio"), 0.0)
    norm, top = sigma.norm(), sigma[:math.ceil(len(sigma) / 100)]
    return {"spectral_norm": sigma[0].item(), "spectral_ratio": (sigma[0] / norm).item(),
            "effective_rank": torch.special.entr(sigma / sigma.sum()).sum().exp().item(),
            "stable_rank": (norm / sigma[0]).square().item(), "top1_ratio": (top.norm() / norm).item()}


def subspace_alignment(delta_a, delta_b, k, side="left") -> float:
    """Mean squared cosine of the principal angles between two matrices' top-k singular subspaces: 0 to 1.

    k: a number of directions, or several, whose results are averaged (the paper: range(1, 21)); more than min(m, n)
    counts as min(m, n). side: "left" compares U (output directions), "right" V (input directions). Random subspaces of
    R^m have k / m (right: k / n), not 0. ValueError for a zero matrix, other shapes or another side.
    """
    if side not in ("left", "right") or delta_a.ndim != 2 or delta_a.shape != delta_b.shape:
        raise ValueError(f"side must be left or right, shapes equal: got {side!r}, {tuple(delta_a.shape)} and "
                         f"{tuple(delta_b.shape)}")
    if not (delta_a.any() and delta_b.any()):
        raise ValueError("a zero matrix has no leading directions")
    bases = []
    for delta in (delta_a, delta_b):
        U, _, Vh = torch.linalg.svd(delta.to(torch.promote_types(delta.dtype, torch.float32)), full_matrices=False)
        bases.append(U if side == "left" else Vh.T)                              # (m or n, r)
    return basis_alignment(*bases, k)


def basis_alignment(basis_a, basis_b, k) -> float:
    """`subspace_alignment` of singular vectors that are at hand: orthonormal columns (m, r), leading ones first."""
    ks = [min(i, basis_a.shape[1]) for i in ([k] if isinstance(k, int) else k)]
    squared = (basis_a[:, :max(ks)].T @ basis_b[:, :max(ks)]).double().square()  # (k, k)
    return sum(squared[:i, :i].sum().item() / i for i in ks) / len(ks)           # ||U_k(a)ᵀ U_k(b)||_F² / k


# ================================================================================================================
# Appendix. The story ends here; what follows is to look things up in.
# ================================================================================================================

def policy_gradient(logits, tokens, advantages, mask=None, num_tokens=None):
    """Reinforcement learning's loss, mean over tokens of -A log π(y_t): tokens (B, T), A (B,); or (N,) and (N,).

    With one update a rollout the ratio π/π_old is 1, so there is nothing to clip; no KL term either.
    """
    advantages = advantages[:, None] if tokens.ndim == 2 else advantages
    return masked_mean(-advantages * token_log_probs(logits, tokens), mask, num_tokens)


def group_advantages(rewards, group_size, eps=1e-6):
    """GRPO (arXiv:2402.03300): A = (r - mean) / (std + eps) among the answers to one prompt. rewards (B,) -> (B,).

    Neighbours are a group: answers 0 .. group_size - 1 are to the first prompt. All right or all wrong: 0.
    """
    groups = rewards.float().view(-1, group_size)                                # (B / group_size, group_size)
    spread = groups.std(dim=1, correction=0, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + eps)).view(-1)


def rows_at_once(head) -> int:
    """As many as make 2^25 logits with a head (V, C): 128 MB in float32, of which a KL's gradient needs some five."""
    return max(1, 2 ** 25 // len(head))


def chunked(loss, hidden, head, *per_token, chunk_size=None):
    """Σ over chunks of loss(logits (n, V), *per_token's rows): the logits of all N tokens never exist at once.

    hidden (N, C) and head (V, C) make the logits; per_token: tensors of N rows that go with them. `loss` gives a sum
    over its rows, or a mean over a fixed num_tokens. Value and gradients (with respect to hidden and head) are those of
    the whole form; a chunk's gradients are taken while its logits are there, so nothing is computed twice.
    chunk_size: n. None: `rows_at_once`.
    """
    chunk_size = chunk_size or rows_at_once(head)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return Chunks.apply(loss, chunk_size, hidden, head, *per_token)
    pieces = zip(*(x.split(chunk_size) for x in (hidden, *per_token)))
    return sum((loss(F.linear(h, head), *rest) for h, *rest in pieces), hidden.new_zeros((), dtype=torch.float32))


class Chunks(torch.autograd.Function):
    """`chunked` with gradients."""

    @staticmethod
    def forward(ctx, loss, chunk_size, hidden, head, *per_token):
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden)                                      # (N, C)
        d_head = torch.zeros_like(head, dtype=torch.float32)                     # (V, C); summed up, so in float32
        for i in range(0, len(hidden), chunk_size):
            rows = slice(i, i + chunk_size)
            with torch.enable_grad():
                logits = F.linear(hidden[rows], head).detach().requires_grad_()  # (n, V)
                value = loss(logits, *(x[rows] for x in per_token))
            d_logits, = torch.autograd.grad(value, logits)
            d_hidden[rows] = d_logits @ head
            if d_logits.dtype == torch.float32:
                d_head.addmm_(d_logits.T, hidden[rows])                          # without a second matrix of that size
            else:
                d_head += d_logits.T @ hidden[rows]
            total += value.detach()
        ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        ctx.per_token = len(per_token)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_head = ctx.saved_tensors
        if d_total != 1:
            d_hidden, d_head = d_hidden * d_total, d_head * d_total
        return None, None, d_hidden, d_head, *[None] * ctx.per_token


def check_options(model, accept, candidates, num_candidates, scope, direction, first_trigger, every):
    """ValueError for a wrong option of EffOPD."""
    for name, value, allowed in [("accept", accept, ("gt", "ge", "always")), ("scope", scope, (*SCOPES, "all")),
                                 ("candidates", candidates, ("linear", "doubling", "line")),
                                 ("direction", direction, ("update", "random", "top", "tail"))]:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    for name, value, least in [("num_candidates", num_candidates, 1), ("first_trigger", first_trigger, 1),
                               ("every", every, 0)]:
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 flattens the parameters: use FSDP2 (fully_shard; in accelerate, fsdp_version: 2)")


def redirect(delta, direction: str):
    """Another direction of the same Frobenius norm, for a matrix Δ = U Σ Vᵀ: what a search along Δ is compared with.

    "random": Gaussian, of torch's random state; "top": the leading tenth of the singular directions alone, "tail": the
    others alone, both scaled up. Needs whole matrices; a vector or a zero matrix stays as it is ("random": a vector
    too turns). In delta's shape and dtype.
    """
    if direction == "random":
        other = torch.randn_like(delta)
    elif delta.ndim == 2:
        U, sigma, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
        k = max(1, round(len(sigma) / 10))
        part = slice(0, k) if direction == "top" else slice(k, None)
        other = (U[:, part] * sigma[part] @ Vh[part]).to(delta.dtype)
    else:
        return delta
    return other * (delta.norm() / other.norm()) if other.any() else delta


def module_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a Hugging Face parameter name: "model.layers.3.mlp.up_proj.weight" -> (3, "up").

    Kinds: q, k, v, o, gate, up, down, embedding, head, norm, bias; for any other, the name's last part. The layer is
    None outside the blocks.
    """
    layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    owner, _, kind = name.rpartition(".")
    last = owner.rpartition(".")[2] if kind in ("weight", "bias") else kind
    if kind == "bias":
        module = "bias"
    elif "norm" in last:
        module = "norm"
    else:
        module = {"embed_tokens": "embedding", "lm_head": "head"}.get(last, last.removesuffix("_proj"))
    return (int(layer[1]) if layer else None), module


def singular_values(delta):
    """Singular values (r,) of a matrix (m, n), the largest first, in float64: from the smaller of its Gram matrices.

    Takes less than half of an SVD's time. Squaring costs half of the digits, so what is below 4e-8 of σ1 is
    rounding and comes out as 0; a float32 SVD has nothing right below 1e-7.
    """
    delta = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    squares = torch.linalg.eigvalsh(delta @ delta.T).flip(0)                     # (r,): σ²
    rounding = 8 * torch.finfo(squares.dtype).eps * squares[0]
    return squares.where(squares > rounding, 0.0).sqrt()


def dot(a, b) -> float:
    """<a, b> in float32, where a is; element by element and then a sum, so sharded tensors need not be gathered."""
    total = (a.float() * b.to(a.device).float()).sum()
    return float(total.full_tensor() if is_sharded(total) else total)


def is_sharded(tensor) -> bool:
    return hasattr(tensor, "full_tensor")                     # a DTensor: each rank has its own part of it


def reshard(model):
    """FSDP2 leaves the root's parameters gathered after a forward pass: a second one would not see what moved since."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def mean_over_ranks(value, device) -> float:
    """The mean of a number over all processes, equal on each of them, so that they all decide alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@contextmanager
def undisturbed(model, seed: int):
    """Evaluation mode, no gradients, random states of its own from `seed` (Python's, NumPy's, torch's on CPU and CUDA).

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


def shard_like(local, p):
    """A rank's part `local` as the sharded tensor that p is; itself where p is whole."""
    if p is None or not is_sharded(p):
        return local
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(local.to(p.device), p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride())


class EffOPDCallback(TrainerCallback):
    """EffOPD in a transformers.Trainer, TRL's DistillationTrainer for one, on one process or many (DDP, FSDP2).

        trainer = DistillationTrainer(..., callbacks=[EffOPDCallback(validate)])

    validate and the settings are EffOPD's; optimizer=True stands for the trainer's own. A search follows optimiser
    steps 1, 2, 4, ..., before the gradients are cleared. Its outcome goes into the trainer's log_history
    (effopd_accepted, effopd_multiple, effopd_score), its whole record into `callback.effopd.history`.

    validate gets the model without its DDP wrapper. Many processes: each may score problems of its own, the mean
    decides; under FSDP2 all must run as many forward passes (model.generate(..., synced_gpus=True)).
    vLLM: it is sent new weights only between steps, so it would score every candidate with old ones. Validate without
    it (the model's own generate, or a loss), or send it the weights in validate. Rollouts after a jump are right.
    LoRA: A and B move, each along its own Δ; their product moves by the square of the stretch too.
    Checkpoints get effopd-*.safetensors (W_prev, Δ and the records; under FSDP2 a file for each rank's shards). They
    are looked for in args.resume_from_checkpoint, else in args.output_dir/checkpoint-<step>.
    ValueError: DeepSpeed, whose master weights would overwrite a jump; a checkpoint of another run, model or scope.
    """

    def __init__(self, validate, **settings):
        self.validate, self.settings, self.effopd = validate, settings, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.deepspeed_plugin is not None:
            raise ValueError("EffOPD does not work with DeepSpeed, which keeps weights of its own: use DDP or FSDP2")
        if getattr(args, "use_vllm", False) and state.is_world_process_zero:
            log.warning("EffOPD: validate must not ask vLLM, which has no candidate's weights, unless it sends them")
        settings = {**self.settings, "optimizer": optimizer if self.settings.get("optimizer") else None}
        self.effopd = EffOPD(model, self.validate, **settings)          # remembers W_0
        self.sharded = any(map(is_sharded, self.effopd.previous))
        if state.global_step > 0:
            self.resume(args, state)

    def on_optimizer_step(self, args, state, control, **kwargs):
        record = self.effopd.step(state.global_step + 1)                # which is counted up after this event
        if record:
            state.log_history.append(self.entry(record))

    def on_save(self, args, state, control, **kwargs):
        if args.save_only_model or not (self.sharded or args.should_save):
            return
        from safetensors.torch import save_file
        effopd = self.effopd.state_dict()
        tensors = {f"{kind}.{name}": (w.to_local() if is_sharded(w) else w).contiguous()
                   for kind in ("previous", "delta") for name, w in (effopd[kind] or {}).items()}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.file(folder, args), {"history": json.dumps(effopd["history"])})

    def entry(self, record):
        scores = dict(zip(record["multiples"], record["scores"]))
        return {"step": record["step"], "effopd_accepted": record["accepted"], "effopd_multiple": record["multiple"],
                "effopd_score": scores.get(record["multiple"])}

    def file(self, folder, args):
        rank, ranks = (args.process_index, args.world_size) if self.sharded else (0, 1)
        return Path(folder) / f"effopd-{rank:05d}-of-{ranks:05d}.safetensors"

    def resume(self, args, state):
        from safetensors import safe_open
        folder = args.resume_from_checkpoint
        if not (folder and Path(folder).is_dir()):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        file, parameters = self.file(folder, args), self.effopd.parameters
        if mean_over_ranks(file.exists(), args.device) < 1:
            log.warning(f"EffOPD starts anew from these weights: no {file}. If the checkpoint is elsewhere, set "
                        "args.resume_from_checkpoint to its folder")
            return
        saved = {"previous": {}, "delta": {}}
        with safe_open(file, "pt") as f:
            saved["history"] = json.loads(f.metadata()["history"])
            for key in f.keys():
                kind, name = key.split(".", 1)
                saved[kind][name] = shard_like(f.get_tensor(key), parameters.get(name))
        if list(map(self.entry, saved["history"])) != [e for e in state.log_history if "effopd_multiple" in e]:
            raise ValueError(f"{file} is of another run: set args.resume_from_checkpoint to the checkpoint's folder")
        self.effopd.load_state_dict({**saved, "delta": saved["delta"] or None})
