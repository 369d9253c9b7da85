"""EffOPD in one file: distillation losses, the search, and what one can see of an update.

On-policy distillation (OPD): the student π samples answers, the frozen teacher π* scores the same
tokens, and the student takes a step on the reverse KL(π || π*) at the states that it visits itself.

EffOPD ("Learning to Foresee", arXiv:2605.11739): the direction of such updates settles early, so
look further along it. After optimiser steps 1, 2, 4, 8, ...

    Δ = W_t - W_prev                     the update since what the last search kept (W_0 at first)
    W_t + 2Δ, W_t + 4Δ, ..., W_t + 10Δ   candidates, each from W_t
    keep the last one before the score on a small validation set stops improving, else W_t
    W_prev = the weights that were kept  so that no Δ ever contains a jump

It works on any torch.nn.Module, in any training loop, and needs torch alone.

Where the paper is silent or says two things, this is what we chose:
  - a tie is a failure (accept="gt"): the paper's formula has >=, its next sentence says "improve";
    its official code has >.
  - a jump leaves the optimiser's state as it is, and the learning rate too, unless move_lr.
  - the attention and MLP matrices move; embeddings, norms and biases do not. The official code goes
    by names without looking at shapes, so that some of its norms and biases move too.
  - all candidates of one search are scored under the same random numbers, a new search has others.
  - module utility and the alignment of successive Δ are recorded; they act only if asked to.
Not the paper's: candidates="doubling" and "line", and move_lr.
"""

import functools
import math
import operator
import random
import re
import sys
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------
# Losses. Logits (B, T, V) of any floating dtype, computed on in float32; mask (B, T) is 1 where a
# token counts. Position t of the logits predicts token t: shift before you call. The student's side
# carries the gradient, the teacher's never does. The sum over tokens is divided by num_tokens (an
# int; default: the mask's sum), so micro-batches that are given the whole batch's number add up to
# its gradient. mask None: all tokens count, and the logits may be (N, V), but in the sampled form.

def reverse_kl(student_logits, teacher_logits, mask=None, num_tokens=None):
    """Mean over tokens of KL(π || π*) = Σ_v π(v) [log π(v) - log π*(v)], in nats: a scalar.

    The paper trains with its sampled form, `reverse_kl_sampled`.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1)               # (B, T, V)
    return masked_mean(kl_divergence(log_p, log_q), mask, num_tokens)


def kl_divergence(log_p, log_q):
    """Σ_v p(v) [log p(v) - log q(v)] over the last dimension: (..., V) -> (...)."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)             # 0 log 0 = 0
    return (log_p.exp() * log_ratio).sum(-1)


def reverse_kl_sampled(student_logits, teacher_logits, tokens, mask, discount=0.0, num_tokens=None):
    """Policy-gradient form on sampled tokens (B, T): its gradient estimates the reverse KL's.

    Its value means nothing. discount 0: (log π(y_t) - log π*(y_t)) ∇ log π(y_t), which
    arXiv:2605.11739 trains with; its expectation is the gradient of `reverse_kl`. discount 1: the
    coefficient is the sum over t' >= t, whose expectation is the gradient of the KL between whole
    sequences. The coefficient is a constant: differentiating it too would change the objective.
    """
    log_p = token_log_probs(student_logits, tokens)                              # (B, T)
    log_q = token_log_probs(teacher_logits.detach(), tokens)                     # (B, T)
    coefficient = (log_p.detach() - log_q) * mask
    if discount:
        for t in reversed(range(coefficient.shape[1] - 1)):                      # return-to-go
            coefficient[:, t] += discount * coefficient[:, t + 1]
    return masked_mean(coefficient * log_p, mask, num_tokens)


def reverse_kl_top_k(student_logits, teacher_logits, mask, k, num_tokens=None):
    """Reverse KL over the student's k most probable tokens and one bucket for all the others.

    0 <= it <= `reverse_kl`, equal at k = V. Without the bucket it would be no divergence: it could
    fall below 0 by moving mass out of the top k.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.detach().float(), dim=-1)               # (B, T, V)
    top = log_p.detach().topk(min(k, log_p.shape[-1]), dim=-1).indices           # (B, T, k)

    def coarsen(log_probs):
        tail = log_probs.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat((log_probs.gather(-1, top), tail), dim=-1)              # (B, T, k + 1)

    return masked_mean(kl_divergence(coarsen(log_p), coarsen(log_q)), mask, num_tokens)


def policy_gradient(logits, tokens, advantages, mask=None, num_tokens=None):
    """Reinforcement learning's loss, mean over tokens of -A log π(y_t). tokens (B, T), A (B, 1).

    With one update a rollout the ratio π/π_old is 1: nothing to clip. There is no KL term.
    """
    return masked_mean(-advantages * token_log_probs(logits, tokens), mask, num_tokens)


def group_advantages(rewards, group_size, eps=1e-6):
    """GRPO (arXiv:2402.03300): A = (r - mean) / (std + eps) among the answers to one prompt.

    rewards (B,) -> (B,). Neighbours are a group: answers 0 .. group_size - 1 are to the first
    prompt. Where all are right or all wrong, A is 0.
    """
    groups = rewards.float().view(-1, group_size)                                # (G, group_size)
    std = groups.std(dim=1, correction=0, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (std + eps)).view(-1)


def token_log_probs(logits, tokens):
    """log π(y_t) in float32 of tokens (B, T) or (N,), with logits (B, T, V) or (N, V)."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]


def masked_mean(values, mask=None, num_tokens=None):
    """Σ of values where the mask is set, over num_tokens."""
    mask = torch.ones_like(values) if mask is None else mask
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)
    return (values * mask).sum() / num_tokens


def chunked(loss, hidden, head, *per_token, chunk_size=None):
    """Σ over chunks of loss(logits (n, V), *per_token's rows): N x V logits never exist at once.

    hidden (N, C) and head (V, C) make the logits; per_token: tensors of N rows that go with them.
    `loss` gives a sum over its rows, or a mean over a fixed num_tokens. Value and gradients are
    those of the whole; a chunk's logits are made a second time in the backward pass.
    chunk_size: n (None: as many rows as make 2^25 logits, 128 MB in float32).
    """
    def piece(hidden, *per_token):
        return loss(F.linear(hidden, head.to(hidden.dtype)), *per_token)

    chunk_size = chunk_size or max(1, 2 ** 25 // len(head))
    pieces = zip(*(rows.split(chunk_size) for rows in (hidden, *per_token)))
    return sum(checkpoint(piece, *rows, use_reentrant=False) for rows in pieces)


# ------------------------------------------------------------------------------------------------
# Searches. A search decides how far to go along Δ: a function (score_at, improves, last) -> the
# multiple of Δ to keep, 0 for W_t. score_at(multiple) is the score of W_t + multiple * Δ, NaN where
# it is not finite; improves(new, old) is the rule of acceptance; last is what the last search kept
# (0 where the learning rate was moved along: then Δ is that long already).

def climb(score_at, improves, best, multiples) -> float:
    """The last of these multiples before the score stops improving on `best`; 0 if none does."""
    kept = 0
    for multiple in multiples:
        score = score_at(multiple)
        if not (math.isfinite(score) and improves(score, best)):
            break
        kept, best = multiple, score
    return kept


def linear_search(score_at, improves, last, num_candidates=5):
    """The paper's: W_t + 2kΔ for k = 1, 2, ..., num_candidates."""
    return climb(score_at, improves, score_at(0), [2 * k for k in range(1, num_candidates + 1)])


def doubling_search(score_at, improves, last, num_candidates=8):
    """W_t + 2^k Δ for k = 1, 2, ..., num_candidates."""
    return climb(score_at, improves, score_at(0), [2 ** k for k in range(1, num_candidates + 1)])


def line_search(score_at, improves, last, num_candidates=8):
    """Doubling from half of what the last search kept; where that fails at once, the other way.

    The other way: shorter multiples down to 2, then back towards W_prev, -1/2, -3/4, -7/8, ...; it
    too ends at its first failure. After a search that kept 16: 8, 16, 32, ...; where 8 fails 4, 2,
    -1/2 (W_t - Δ/2), -3/4, ...
    """
    start = max(2, last / 2)
    doublings = [2 ** k for k in range(1, num_candidates + 1)]
    longer = [multiple for multiple in doublings if multiple >= start]
    shorter = [multiple for multiple in reversed(doublings) if multiple < start]
    back = [2.0 ** -k - 1 for k in range(1, num_candidates + 1)]
    best = score_at(0)
    kept = climb(score_at, improves, best, longer)
    return kept or climb(score_at, improves, best, shorter + back)


SEARCHES = {"linear": linear_search, "doubling": doubling_search, "line": line_search}
ACCEPT = {"gt": operator.gt, "ge": operator.ge}               # False where W_t's own score is NaN
SCOPES = {  # which matrices a jump moves: parts of their names in Llama, Qwen, GPT-2 and their like
    "attention+mlp": ("attn", "attention", "mlp", "ffn", "feed_forward"),
    "mlp": ("mlp", "ffn", "feed_forward"),
}
ALIGNMENT_K = 4                # leading directions whose alignment a search records


class EffOPD:
    """Extrapolate, check, keep or undo: EffOPD in anybody's training loop.

        effopd = EffOPD(model, validate)                  # before training: it remembers W_0
        for t, batch in enumerate(batches, start=1):
            loss_of(model, batch).backward()
            optimizer.step()
            effopd.step(t)                                # searches at t = 1, 2, 4, 8, ...
            optimizer.zero_grad()                         # after it: it looks at the gradients

    validate: model -> float, higher is better; for example the accuracy on 50 problems. Called in
        evaluation mode, without gradients, under equal random states (Python's, NumPy's, torch's)
        for all candidates of one search; torch.initial_seed() is the search's seed there, for
        generators of its own. Modes, buffers and random states are put back afterwards.
    accept: "gt", a candidate must score higher than the last one kept; "ge", not lower; or a
        function (new, old) -> bool.
    candidates: "linear" (the paper's), "doubling" or "line", with num_candidates; or a function
        (score_at, improves, last) -> multiple, see the searches above.
    scope: "attention+mlp" or "mlp" matrices, found by name (SCOPES), or "all" trainable parameters.
    first_trigger: searches at this step and its doublings.
    every: searches also after every so many steps (0: off).
    searches: at most so many, those included that a gate keeps closed (0: no limit).
    move_lr: a search that keeps multiple m, and so finds updates 1 + m times as long to be better,
        multiplies the learning rate by 1 + m. Needs `optimizer`, one or a list. A scheduler that
        computes the rate from its base_lrs undoes it (extras/trl_callback.py moves those too).
    direction: None, or a function from a tensor's Δ to another tensor to go along instead.
    utility_gate: a jump leaves out the parameters whose utility is not positive.
    alignment_gate: no search where Δ's subspace alignment with the last Δ is below this (0: off).
    seed: of the candidates' random states.

    Keeps two copies of the weights in scope (W_prev and the last Δ), four during a search. If
    `validate` raises, W_t is back in the model, and calling `step(t)` again makes the same search.
    ValueError for a wrong option, for a model that has nothing in scope, and from `step` if
    utility_gate finds no gradients.
    """

    def __init__(self, model, validate, *, accept="gt", candidates="linear", num_candidates=5,
                 scope="attention+mlp", first_trigger=1, every=0, searches=0, optimizer=None,
                 move_lr=False, direction=None, utility_gate=False, alignment_gate=0.0, seed=0):
        choose("scope", scope, [*SCOPES, "all"])
        if min(num_candidates, first_trigger) < 1 or min(every, searches) < 0:
            raise ValueError("num_candidates and first_trigger must be 1 or more, every and "
                             "searches 0 or more")
        if move_lr and optimizer is None:
            raise ValueError("move_lr needs the optimizer whose learning rate it moves")
        self.model, self.validate, self.seed = model, validate, seed
        self.improves = accept if callable(accept) else ACCEPT[choose("accept", accept, ACCEPT)]
        self.search = candidates if callable(candidates) else functools.partial(
            SEARCHES[choose("candidates", candidates, SEARCHES)], num_candidates=num_candidates)
        self.first_trigger, self.every, self.searches = first_trigger, every, searches
        optimizer = [] if optimizer is None else optimizer
        self.optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        self.move_lr, self.direction = move_lr, direction
        self.utility_gate, self.alignment_gate = utility_gate, alignment_gate
        self.parameters = {name: p for name, p in model.named_parameters()       # a tied one once
                           if p.requires_grad and in_scope(name, p, scope)}
        if not self.parameters:
            raise ValueError(f"no trainable parameter is in scope {scope!r}; use scope='all'")
        self.previous = self.copy_weights()                   # W_prev
        self.delta = None                                     # Δ of the last search
        self.history = []                                     # the record of every search

    def copy_weights(self) -> dict:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def is_trigger(self, t: int) -> bool:
        """Whether a search follows optimiser step t (counted from 1)."""
        if self.searches and len(self.history) >= self.searches:
            return False
        quotient, rest = divmod(t, self.first_trigger)
        power_of_two = rest == 0 and quotient.bit_count() == 1
        return power_of_two or bool(self.every and t > 0 and t % self.every == 0)

    @torch.no_grad()
    def step(self, t: int) -> dict | None:
        """Call after optimiser step t. Searches if t is a trigger and returns a record, else None.

        The record: step; multiples and scores in the order tried, W_t (multiple 0) first, None for
        a score that is not finite, none at all where a gate leaves nothing to search; multiple, the
        one kept (the weights are now W_t + multiple * Δ, what utility_gate leaves out aside); lr,
        the learning rate from now on (None without `optimizer`); delta_norm = ||Δ||_F; cosine and
        alignment of Δ with the last search's Δ, None at the first; utility of each parameter in
        scope, {} without gradients; seconds.
        """
        if not self.is_trigger(t):
            return None
        start = time.perf_counter()
        seed = (self.seed * 1_000_003 + t) % 2 ** 63
        current = self.copy_weights()                                            # W_t
        delta = {name: w - self.previous[name] for name, w in current.items()}   # Δ = W_t - W_prev
        with undisturbed(self.model, seed):                   # a direction, an SVD may draw numbers
            if self.direction is not None:
                delta = {name: self.direction(d) for name, d in delta.items()}
            record = self.look_at(delta)

        moved = delta
        if self.utility_gate:
            moved = {name: d for name, d in delta.items() if record["utility"].get(name, 0.0) > 0}
        closed = self.delta is not None and (record["alignment"] or 0.0) < self.alignment_gate

        tried, kept = {}, 0

        def score_at(multiple):
            self.place(current, moved, multiple)                                 # W_t + mΔ
            tried[multiple] = self.score(seed)
            return tried[multiple]

        try:
            if moved and not closed:
                last = 0
                if self.history and not self.move_lr:         # with it, Δ itself is longer now
                    last = self.history[-1]["multiple"]
                kept = self.search(score_at, self.improves, last)
        finally:                                              # W_t again if validate raised
            self.place(current, moved, kept)
        for name, p in self.parameters.items():
            self.previous[name].copy_(p)                                         # W_prev = kept
        self.delta = delta

        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if self.move_lr:
            for group in groups:
                group["lr"] *= 1 + kept                                          # lr <- lr (1 + m)
        scores = [score if math.isfinite(score) else None for score in tried.values()]
        lr = groups[0]["lr"] if groups else None
        record |= {"step": t, "multiples": list(tried), "scores": scores, "multiple": kept,
                   "lr": lr, "seconds": time.perf_counter() - start}
        self.history.append(record)
        return record

    def place(self, current, delta, multiple):
        """Put W_t + multiple * Δ into the model; W_t bit for bit at 0 and where Δ names nothing."""
        for name, p in self.parameters.items():
            if multiple and name in delta:
                p.copy_(current[name] + multiple * delta[name])
            else:
                p.copy_(current[name])

    def score(self, seed) -> float:
        """Of the weights now in the model; NaN where the score, or a weight, is not finite."""
        if not torch.stack([p.isfinite().all() for p in self.parameters.values()]).all():
            return math.nan
        with undisturbed(self.model, seed):
            score = float(self.validate(self.model))
        return score if math.isfinite(score) else math.nan

    def look_at(self, delta) -> dict:
        """How long Δ is, how it lies to the last Δ, what each parameter's part of it is worth."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.utility_gate and not gradients:
            raise ValueError("utility_gate needs gradients: call step() before zero_grad()")
        record = {"delta_norm": math.sqrt(inner(delta, delta)), "cosine": None, "alignment": None,
                  "utility": module_utility(gradients, delta)}
        if self.delta is not None:
            record["cosine"] = cosine(delta, self.delta)
            record["alignment"] = mean_alignment(delta, self.delta)
        return record

    def state_dict(self) -> dict:
        """What a checkpoint needs: W_prev, the last Δ by name, and the records of all searches."""
        return {"previous": self.previous, "delta": self.delta, "history": self.history}

    def load_state_dict(self, state: dict):
        """Take back what state_dict gave. ValueError if it belongs to another model or scope."""
        shapes = {name: w.shape for name, w in state["previous"].items()}
        if shapes != {name: w.shape for name, w in self.previous.items()}:
            raise ValueError("this EffOPD state is of other parameters: check model and scope")

        def own(tensors):
            return {name: tensors[name].to(w.device, w.dtype, copy=True)
                    for name, w in self.previous.items()}

        self.delta = None if state["delta"] is None else own(state["delta"])
        self.previous, self.history = own(state["previous"]), list(state["history"])


def choose(option, value, allowed):
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def in_scope(name, parameter, scope) -> bool:
    matrix = parameter.ndim >= 2
    return scope == "all" or matrix and any(part in name.lower() for part in SCOPES[scope])


@contextmanager
def undisturbed(model, seed: int):
    """Evaluation mode, no gradients, random states made from `seed` (Python's, NumPy's, torch's).

    Afterwards modes, buffers and random states are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numpy = sys.modules.get("numpy")                          # not imported: nobody uses it
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        random.seed(seed)
        torch.manual_seed(seed)
        if numpy:
            numpy.random.seed(seed % 2 ** 32)
        model.eval()
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            for module, training in modes:
                module.training = training
            for buffer, saved in buffers:
                buffer.copy_(saved)


# ------------------------------------------------------------------------------------------------
# What one can see of an update: which part of it is useful, where it points, how concentrated it
# is. arXiv:2605.11739, sections 3 and 4. An update is a dict of tensors by parameter name.

def module_utility(gradients: dict, delta: dict) -> dict:
    """First-order utility of each parameter's update, -<∇L, Δ_m> / ||Δ_m||_F, in float.

    What it takes off the loss per unit of norm (of the clipped loss, after gradient clipping). An
    update of norm 0 is worth 0; a name without a gradient is left out.
    """
    names = [name for name in delta if gradients.get(name) is not None]
    if not names:
        return {}
    products = torch.stack([dot(gradients[name], delta[name]) for name in names])
    norms = torch.stack([dot(delta[name], delta[name]) for name in names]).sqrt()
    return dict(zip(names, (-products / norms.clamp(min=1e-30)).tolist()))       # one GPU wait


def dot(a, b):
    """<a, b> of two tensors, in float32: a scalar tensor."""
    return (a.float() * b.float()).sum()


def inner(a: dict, b: dict) -> float:
    """<a, b> of two updates, all their tensors taken as one long vector."""
    return torch.stack([dot(a[name], b[name]) for name in a]).sum().item()


def cosine(a: dict, b: dict) -> float:
    """Cosine between two updates; 0 where one of them is 0."""
    norms = math.sqrt(inner(a, a)) * math.sqrt(inner(b, b))
    return inner(a, b) / norms if norms else 0.0


def mean_alignment(a: dict, b: dict, k=ALIGNMENT_K) -> float | None:
    """Low-rank subspace alignment of two updates: mean over matrices, left and right vectors.

    `subspace_alignment` at k, by a randomised SVD (torch's random state) of the s matrices of one
    shape at once, which costs little. None where no matrix moved in both.
    """
    values = []
    for names in same_shapes(a):
        stack = torch.stack([update[name].float() for update in (a, b) for name in names])
        rank = min(k, *stack.shape[1:])
        U, _, V = torch.svd_lowrank(stack, min(2 * k, *stack.shape[1:]))         # (2s, m or n, 2k)
        squared = 0.0
        for basis_a, basis_b in (U[..., :rank].chunk(2), V[..., :rank].chunk(2)):
            squared += (basis_a.mT @ basis_b).square().sum((1, 2)) / rank        # (s,)
        moved_a, moved_b = stack.flatten(1).any(1).chunk(2)                      # (s,)
        values.append(squared[moved_a & moved_b] / 2)
    values = torch.cat(values) if values else torch.zeros(0)
    return values.mean().item() if len(values) else None


def same_shapes(update: dict, numbers=2 ** 25) -> list[list[str]]:
    """The names of an update's matrices, those of one shape together, up to so many numbers."""
    groups = {}
    for name, delta in update.items():
        if delta.ndim == 2:
            groups.setdefault(delta.shape, []).append(name)
    pieces = []
    for shape, names in groups.items():
        size = max(1, numbers // shape.numel())
        pieces += [names[i:i + size] for i in range(0, len(names), size)]
    return pieces


def subspace_alignment(delta_a, delta_b, k, side="left") -> float:
    """Mean squared cosine of the angles between two matrices' top-k singular subspaces: 0 to 1.

    k: a number of directions, or several, whose results are averaged (the paper: range(1, 21));
    more than min(m, n) counts as min(m, n). side: "left" compares U (output directions), "right" V
    (input directions). Random subspaces of R^m have k / m (right: k / n), not 0. ValueError for a
    zero matrix, other shapes or another side.
    """
    choose("side", side, ("left", "right"))
    if delta_a.ndim != 2 or delta_a.shape != delta_b.shape:
        raise ValueError(f"need equal shapes, got {delta_a.shape} and {delta_b.shape}")
    if not (delta_a.any() and delta_b.any()):
        raise ValueError("a zero matrix has no leading directions")
    bases = []
    for delta in (delta_a, delta_b):
        U, _, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        bases.append(U if side == "left" else Vh.T)                              # (m or n, r)
    return basis_alignment(*bases, k)


def basis_alignment(basis_a, basis_b, k) -> float:
    """`subspace_alignment` of singular vectors: orthonormal columns (m, r), leading ones first."""
    ks = [min(i, basis_a.shape[1]) for i in ([k] if isinstance(k, int) else k)]
    squared = (basis_a[:, :max(ks)].T @ basis_b[:, :max(ks)]).double().square()  # (k, k)
    return sum(squared[:i, :i].sum().item() / i for i in ks) / len(ks)           # ||UᵀU'||_F² / k


def spectral_metrics(delta) -> dict:
    """How concentrated an update ΔW = U Σ Vᵀ is: a matrix (m, n), or its r singular values (r,).

    spectral_norm   σ1
    spectral_ratio  σ1 / ||ΔW||_F, from 1/sqrt(r) to 1
    effective_rank  exp(-Σ p log p) with p = σ / Σσ (of σ, not of σ²), from 1 to r
    stable_rank     ||ΔW||_F² / σ1², from 1 to r
    top1_ratio      ||the top ceil(r / 100) of σ|| / ||σ||, a ratio of norms (not of their squares)
    Floats, all 0 for a zero matrix. ValueError for anything but finite numbers.
    """
    if delta.ndim not in (1, 2) or delta.numel() == 0 or not delta.isfinite().all():
        raise ValueError(f"need a matrix or its singular values, finite, got {delta.shape}")
    sigma = singular_values(delta) if delta.ndim == 2 else delta.double().sort(descending=True)[0]
    if sigma[0] == 0:
        return dict.fromkeys(METRICS, 0.0)
    norm, top = sigma.norm(), sigma[:math.ceil(len(sigma) / 100)]
    entropy = torch.special.entr(sigma / sigma.sum()).sum()
    values = [sigma[0], sigma[0] / norm, entropy.exp(), (norm / sigma[0]) ** 2, top.norm() / norm]
    return dict(zip(METRICS, torch.stack(values).tolist()))


METRICS = ("spectral_norm", "spectral_ratio", "effective_rank", "stable_rank", "top1_ratio")


def singular_values(delta):
    """Singular values (r,) of a matrix (m, n), the largest first, in float64: from its Gram matrix.

    Takes less than half of an SVD's time. Squaring costs half of the digits, so what is below 4e-8
    of σ1 is rounding and comes out as 0; a float32 SVD has nothing right below 1e-7.
    """
    delta = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    squares = torch.linalg.eigvalsh(delta @ delta.T).flip(0)                     # (r,): σ²
    rounding = 8 * torch.finfo(squares.dtype).eps * squares[0]
    return squares.where(squares > rounding, 0.0).sqrt()


KINDS = {"embed_tokens": "embedding", "wte": "embedding", "wpe": "embedding", "lm_head": "head",
         "qkv_proj": "qkv", "c_attn": "qkv", "gate_up_proj": "gate_up", "c_fc": "up"}


def module_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a parameter by its name: "model.layers.3.mlp.up_proj.weight" -> (3, "up").

    Kinds: q, k, v, o, qkv, gate, up, gate_up, down, embedding, head, norm, bias; for any other, the
    name's last part. The layer is None outside the blocks.
    """
    layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    owner, _, last = name.rpartition(".")
    module = owner.rpartition(".")[2] if last in ("weight", "bias") else last
    if last == "bias":
        kind = "bias"
    elif "norm" in module or module.startswith("ln_"):
        kind = "norm"
    elif module == "c_proj":                                  # GPT-2 has two of them
        kind = "o" if "attn" in name else "down"
    else:
        kind = KINDS.get(module, module.removesuffix("_proj"))
    return (int(layer[1]) if layer else None), kind
