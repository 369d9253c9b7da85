"""A compact GPT: forward, KV-cached sampling, load and save in Hugging Face format.

One decoder-only transformer covers three families:

    Llama (SmolLM2, Llama 3 with its rope scaling)    no attention bias, no q/k norm
    Qwen2, Qwen2.5                                    bias on the q, k and v projections
    Qwen3                                             RMSNorm on every head's q and k

Modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so a checkpoint
loads without a mapping, and what is saved here loads in transformers and in what builds on it.

    model = GPT.from_pretrained("path/to/checkpoint")         # or a repository id
    logits = model(input_ids)                                 # (B, T) -> (B, T, V)
    rollout = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=32, eos_token_id=2)

In the shapes below: B rows, T positions, C hidden size, H query heads, G key/value heads,
D head size, N positions attended to, V vocabulary, P longest prompt, R longest response.

The appendix has Hugging Face's files and configs, and faster decoding: packed matrices on a CPU, torch.compile.
"""

import copy
import functools
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model, in Hugging Face's field names."""
    vocab_size: int
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None      # None: one for each query head
    head_dim: int | None = None                 # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None            # Llama 3's: factor, low_freq_factor, ...; None: plain RoPE
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False                # q, k and v have a bias (Qwen2)
    qk_norm: bool = False                       # RMSNorm on each head's q and k (Qwen3)
    eos_token_id: int | list[int] | None = None  # for those who load the model; not used here

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                             f"num_key_value_heads ({self.num_key_value_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config: GPTConfig) -> torch.Tensor:
    """Radians a position, θ^(-2i/D) for pair i: (D/2,) float32."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    return freq if config.rope_scaling is None else llama3_frequencies(freq, config.rope_scaling)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, heads, T, D): its halves (a, b) -> (a cos - b sin, b cos + a sin).

    cos and sin (B or 1, 1, T, D) are `rotations`, whose sin has the first half negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        H, G, D, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache, columns):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)      # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)      # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                   # (B, G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:                                 # keys and values so far, (B, G, N, D) each
            cache[0][:, :, columns], cache[1][:, :, columns] = k, v
            k, v = cache
        if T == 1:                                            # heads that share a key become its several queries
            q = q.view(B, k.shape[1], -1, self.head_dim)      # (B, G, H/G, D)
        # softmax(q kᵀ / sqrt(D)) v, where a token attends to itself and to what is before it
        if T == 1 and not x.is_cuda:                          # faster than the fused kernel for so few queries
            scores = (q * self.head_dim ** -0.5) @ k.transpose(-1, -2)                     # (B, G, H/G, N)
            y = F.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf), dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                               enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + f(norm(x)), with attention and then the MLP as f."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask=None, cache=None, columns=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, columns)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Everything but the output head: token ids to hidden states."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A plain attribute, not a buffer: model.to(torch.bfloat16) must not round the angles.
        self.frequencies = rope_frequencies(config)

    def rotations(self, positions, dtype):
        """cos and sin, (..., D) each, for positions (...), as `rotate` wants them."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None] * self.frequencies                    # (..., D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def forward(self, input_ids, cos, sin, mask=None, caches=None, columns=None, checkpointing=False):
        """input_ids (B, T), cos and sin (B or 1, T, D) -> hidden states (B, T, C).

        caches: a pair of tensors (B, G, N, D) for each layer, whose columns (T,) get this call's keys and values.
        """
        x, cos, sin = self.embed_tokens(input_ids), cos[:, None], sin[:, None]           # (B, T, C), (B or 1, 1, T, D)
        for i, layer in enumerate(self.layers):
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, caches and caches[i], columns)
        return self.norm(x)


class Rollout(NamedTuple):
    """What `generate` returns: answers of one batch, side by side, R = the longest of them."""
    tokens: torch.Tensor       # (B, R) int64: the sampled tokens; 0 after a row's end
    mask: torch.Tensor         # (B, R) bool: real response tokens, the first EOS included
    log_probs: torch.Tensor    # (B, R) float32: log-probability of each sampled token; 0 after a row's end


def sample(log_p, rows, B: int, generator=None):
    """A token for each of b rows from log-probabilities (b, V), as argmax(p / noise) with Exponential(1) noise.

    That is the Gumbel-max trick. The noise is drawn for all B rows of the batch, whichever of them (rows, (b,) int64)
    still need it: nearly equal models then give nearly equal samples, the common random numbers that make a search's
    candidates comparable.
    """
    noise = log_p.new_empty(B, log_p.shape[-1]).exponential_(generator=generator).log_()
    return (log_p - (noise if len(rows) == B else noise[rows])).argmax(-1)                 # (b,)


def visible(real, queries):
    """Who may attend to whom, (B, 1, T, N) bool: columns queries (T,) to what is real (B, N) up to themselves.

    And always to themselves: a softmax over nothing would be NaN in padding.
    """
    columns, queries = torch.arange(real.shape[1], device=real.device), queries[:, None]
    return ((columns <= queries) & real[:, None] | (columns == queries))[:, None]


class KVCache:
    """Keys and values so far of b rows, padded on the left: every row's next token is in the same column.

    padding (b, 1): columns before each row's prompt.
    """

    def __init__(self, model, padding, width: int, compile):
        self.model, self.padding, self.length = model.model, padding, 0
        width = -(-width // 64) * 64 if compile else width    # multiples of 64: few widths, few compilations
        self.columns = torch.arange(width, device=model.device)
        self.cos, self.sin = self.model.rotations(self.columns, model.dtype)               # (width, D)
        shape = (len(padding), model.config.num_key_value_heads, width, model.config.head_dim)
        if compile:
            self.compiled, self.layers = compiled(model, compile, shape)
        else:
            zeros = self.cos.new_zeros
            self.compiled, self.layers = None, [(zeros(shape), zeros(shape)) for _ in self.model.layers]
        self.masked = compile or bool(padding.any())

    def extend(self, ids):
        """Hidden states (b, T, C) of the next T columns, of tokens ids (b, T)."""
        start, n = self.length, self.length + ids.shape[1]
        static = self.compiled is not None and start > 0      # sees all columns, so that no shape ever changes
        own, seen, self.length = self.columns[start:n], self.columns if static else self.columns[:n], n
        masked = self.masked or 0 < start < n - 1             # else causal, or the last column, which sees all
        mask = visible(seen >= self.padding, own) if masked else None                      # (b, 1, T, n or width)
        positions = (own - self.padding).clamp(min=0)                                      # (b, T)
        cos, sin = self.cos[positions], self.sin[positions]                                # (b, T, D)
        if static:
            return self.compiled(ids, cos, sin, mask, self.layers, own)
        known = [(k[:, :, :n], v[:, :, :n]) for k, v in self.layers]
        return self.model(ids, cos, sin, mask, known, slice(start, n))

    def keep(self, rows):
        self.padding = self.padding[rows]
        for i, (k, v) in enumerate(self.layers):              # one at a time: no second copy of all
            self.layers[i] = k[rows], v[rows]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)    # learns the task in half the steps that 0.02 takes
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.tie_weights()
        self.gradient_checkpointing = False         # True: layers run again in the backward pass, for memory
        self.precision = None                       # torch.bfloat16: computes in it, from weights kept as they are
        self.tokens_in_use = config.vocab_size      # fewer where the last rows of embedding and head are padding
        self.source, self.hf_config = None, None    # from_pretrained's directory, and what its config said
        self.static_caches = None                   # of generate(compile=True)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head(self):
        """The output matrix (V in use, C), in the dtype that `hidden_states` has."""
        used = self.lm_head.weight
        if self.tokens_in_use < len(used):
            used = used[:self.tokens_in_use]
        return used.to(self.dtype)

    def forward(self, input_ids, attention_mask=None):
        """Logits (B, T, V) for input_ids (B, T). attention_mask (B, T): 1 for tokens, 0 for padding, left or right.

        Rows padded on the right need no mask: attention is causal, so no token sees what follows it.
        """
        return F.linear(self.hidden_states(input_ids, attention_mask), self.head)

    def hidden_states(self, input_ids, attention_mask=None):
        """What the head reads, (B, T, C): for a loss that never holds all logits (effopd.py: `chunked`)."""
        columns, mask = torch.arange(input_ids.shape[1], device=input_ids.device), None
        positions = columns[None]                                                          # (1 or B, T)
        if attention_mask is not None:
            positions = (attention_mask.bool().cumsum(-1) - 1).clamp(min=0)
            mask = visible(attention_mask.bool(), columns)
        with self.autocast():
            cos, sin = self.model.rotations(positions, self.dtype)
            hidden = self.model(input_ids, cos, sin, mask, checkpointing=self.gradient_checkpointing)
        return hidden.to(self.dtype)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens: int, temperature: float = 1.0, generator=None,
                 eos_token_id=None, compile: str | bool = False) -> Rollout:
        """Sample one answer to each prompt, from the full softmax(logits / temperature).

        prompts: a list of B non-empty lists of token ids, of any lengths.
        temperature: 0 takes the most probable token (and then reports log-probabilities at temperature 1).
        generator: a torch.Generator on the model's device; None draws from the global random state.
        eos_token_id: an id, several, or None for "never ends".
        compile: True, or a backend's name, decodes through torch.compile (see `compiled`). Same samples.
        Stops when every row has ended. ValueError for an empty prompt, for one that does not fit the context, and for
        a negative temperature.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        ids, padding = self.left_padded(prompts, max_new_tokens)                           # (B, P), (B, 1)
        B, device = len(ids), self.device
        cache = KVCache(self, padding, ids.shape[1] + max_new_tokens, compile)
        tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
        log_probs = torch.zeros(B, max_new_tokens, device=device)
        eos = torch.tensor([-1] if eos_token_id is None else eos_token_id, device=device).view(-1)
        rows, alive = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
        with self.autocast(), packed(self, 0 if compile else B):                # lm_head is packed too, `head` is not
            for r in range(max_new_tokens):                   # b of the B rows are still in the batch
                hidden = cache.extend(ids)[:, -1].to(self.dtype)                           # (b, C)
                logits = self.lm_head(hidden)[:, :self.tokens_in_use].float()
                log_p = F.log_softmax(logits / (temperature or 1.0), dim=-1)               # (b, V)
                token = sample(log_p, rows, B, generator) if temperature > 0 else log_p.argmax(-1)              # (b,)
                tokens[rows, r], log_probs[rows, r] = token, log_p.gather(-1, token[:, None])[:, 0]
                ids = token[:, None]                                                       # (b, 1)
                if eos_token_id is not None:
                    alive &= ~torch.isin(token, eos)
                    left = int(alive.sum())
                    if left == 0:
                        break
                    if left <= len(rows) // 2 and not compile:                  # the ended rows leave the batch
                        cache.keep(alive)
                        rows, ids, alive = rows[alive], ids[alive], alive[alive]
        ends = torch.isin(tokens, eos).long()
        real = ends.cumsum(1) == ends                         # nothing has ended before
        R = int(real.any(0).sum())
        return Rollout(tokens[:, :R] * real[:, :R], real[:, :R], log_probs[:, :R] * real[:, :R])


# ================================================================================================================
# Appendix. The story ends here; what follows is to look things up in.
# ================================================================================================================

    def left_padded(self, prompts, max_new_tokens):
        """ids (B, P) and the padding before each row (B, 1): every row's next token is then in the same column."""
        lengths = [len(p) for p in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("generate needs at least one prompt, and at least one token in each")
        P = max(lengths)
        if P + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(f"a prompt of {P} tokens and {max_new_tokens} new ones exceed the model's context of "
                             f"{self.config.max_position_embeddings}")
        ids = torch.tensor([[0] * (P - n) + list(p) for p, n in zip(prompts, lengths)], device=self.device)
        return ids, torch.tensor([[P - n] for n in lengths], device=self.device)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.precision or self.lm_head.weight.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str, dtype=torch.float32) -> "GPT":
        """A Llama, Qwen2 or Qwen3 checkpoint: a directory, or a repository id, which is downloaded.

        FileNotFoundError and ValueError say in one line what is missing or not supported.
        """
        from transformers import AutoConfig
        directory = Path(path_or_repo_id)
        if not directory.is_dir():
            directory = download(str(path_or_repo_id))
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory} has no config.json: not a Hugging Face checkpoint")
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory} has no model.safetensors (other weight formats are not read)")
        try:
            hf_config = AutoConfig.from_pretrained(directory)
            config = config_from_hf(hf_config)
            state = {name: t.to(dtype) for f in files for name, t in load_file(f).items() if "rotary_emb" not in name}
            with torch.device("meta"):                        # no time spent on random weights
                model = cls(config)
            if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
                state["lm_head.weight"] = state["model.embed_tokens.weight"]
            model.load_state_dict(state, assign=True)
        except Exception as error:                            # a broken file can raise anything
            raise ValueError(f"{directory} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        model.tie_weights()                                   # assign=True made two parameters of one
        model.source, model.hf_config = directory, hf_config
        return model

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors, in the dtype that the weights have.

        A model that from_pretrained loaded keeps what its config said (token ids, for one), and takes the tokenizer and
        generation files of the directory it came from along: transformers and vLLM load the result as it is.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for pattern in COMPANIONS if self.source else ():
            for file in self.source.glob(pattern):
                if file.is_file() and not (directory / file.name).exists():
                    shutil.copyfile(file, directory / file.name)
        config = copy.copy(self.hf_config) or config_to_hf(self.config)
        config.eos_token_id = self.config.eos_token_id
        config.dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config.save_pretrained(directory)
        state = {name: t.contiguous() for name, t in self.state_dict().items()
                 if not (self.config.tie_word_embeddings and name == "lm_head.weight")}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


SAME_IN_HF = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
              "eos_token_id")
# What a checkpoint directory has beside config and weights; saved models get a copy.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
              "chat_template*", "generation_config.json")


def llama3_frequencies(freq, scaling: dict):
    """Llama 3's RoPE, which stretches the long wavelengths of freq (D/2,) to a longer context."""
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns within the old context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)         # 1: short wavelength, left alone; 0: stretched
    return freq * (keep + (1 - keep) / scaling["factor"])


def config_from_hf(hf) -> GPTConfig:
    """From a transformers LlamaConfig, Qwen2Config or Qwen3Config; ValueError for what is not supported."""
    if hf.model_type not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model type {hf.model_type!r} is not supported; llama, qwen2 and qwen3 are")
    rope = dict(hf.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    unsupported = [name for name, found in [
        (f"rope type {kind!r}", kind not in ("default", "llama3")),
        (f"activation {hf.hidden_act!r}", hf.hidden_act != "silu"),
        ("a bias in the MLP", getattr(hf, "mlp_bias", False)),
        ("a bias in o_proj", getattr(hf, "attention_bias", False)),
        ("sliding-window attention", getattr(hf, "use_sliding_window", False)),
    ] if found]
    if unsupported:
        raise ValueError(f"this {hf.model_type} checkpoint uses {' and '.join(unsupported)}, not supported here")
    return GPTConfig(
        **{name: getattr(hf, name, None) for name in SAME_IN_HF},              # Qwen2's has no head_dim
        rope_theta=theta, rope_scaling=rope if kind == "llama3" else None,
        attention_bias=hf.model_type == "qwen2", qk_norm=hf.model_type == "qwen3")


def config_to_hf(config: GPTConfig):
    """The transformers config of the family that a shape belongs to; ValueError if it belongs to none."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config
    if config.qk_norm and config.attention_bias:
        raise ValueError("no supported Hugging Face family has both attention_bias and qk_norm")
    family, name = ((Qwen3Config, "Qwen3") if config.qk_norm else
                    (Qwen2Config, "Qwen2") if config.attention_bias else (LlamaConfig, "Llama"))
    return family(
        **{name: getattr(config, name) for name in SAME_IN_HF}, architectures=[f"{name}ForCausalLM"], bos_token_id=None,
        rope_parameters={"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": config.rope_theta})


def download(repo_id: str) -> Path:
    """Fetch a repository's config, safetensors and tokenizer; one clear line where that cannot be done."""
    from huggingface_hub import snapshot_download
    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise FileNotFoundError(f"no directory {repo_id} (a repository id looks like owner/name)")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "model*.safetensors", *COMPANIONS]))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{repo_id} is neither a directory nor could it be downloaded: {reason}") from None


# ----------------------------------------------------------------------------------------------------------------
# Faster decoding: packed matrices on a CPU, torch.compile.

PACK = 2 ** 24                 # parameters from which `generate` packs the matrices, on a CPU


@contextmanager
def packed(model: GPT, rows: int):
    """On a CPU, matrices in oneDNN's own layout as long as it lasts: products with few rows are up to twice as fast.

    rows: for how many at a time it is meant; 0: not at all. Takes a second copy of the matrices, and half a second
    for 135 M parameters. Models smaller than PACK stay as they are.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    possible = torch.backends.mkldnn.is_available() and (model.device.type, model.dtype) == ("cpu", torch.float32)
    if not (rows and possible and sum(linear.weight.numel() for linear in linears) >= PACK):
        linears = []
    for linear in linears:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        linear.forward = functools.partial(times_packed, weight, linear.bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward                                # the class's own is back


def times_packed(weight, bias, x):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def compiled(model: GPT, backend, shape):
    """The transformer under torch.compile, and caches that stay where they are, as CUDA graphs (on a GPU) need it.

    Costs a compilation at the first call, and again where B or the length grows, and the model keeps the caches. Tested
    on a CPU, where it does not pay; no GPU has run it yet.
    """
    options = dict(mode="reduce-overhead") if backend is True else dict(backend=backend)
    old = model.static_caches and model.static_caches[0][0]
    if old is None or (old.shape, old.dtype, old.device) != (shape, model.dtype, model.device):
        zeros = model.head.new_zeros
        model.static_caches = [(zeros(shape), zeros(shape)) for _ in model.model.layers]
    for cache in sum(model.static_caches, ()):
        torch._dynamo.mark_static_address(cache.zero_())
    return torch.compile(model.model, fullgraph=True, **options), model.static_caches
