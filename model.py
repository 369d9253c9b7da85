"""A compact GPT: forward, sampling with a KV cache, load and save in Hugging Face format.

One decoder-only transformer covers three families:

    Llama (SmolLM2, Llama 3 with its rope scaling)    no attention bias, no q/k norm
    Qwen2, Qwen2.5                                    bias on the q, k and v projections
    Qwen3                                             RMSNorm on every head's q and k

Modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so a checkpoint
loads without a mapping, and what is saved here loads in transformers and in what builds on it.

    model = GPT.from_pretrained("path/to/checkpoint")         # or a repository id
    logits = model(input_ids)                                 # (B, T) -> (B, T, V)
    rollout = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=32, eos_token_id=2)

In the shapes: B rows, T positions, C hidden size, H query heads, G key/value heads, D head size,
N positions attended to, V vocabulary, P longest prompt, R longest response.
"""

import copy
import json
import math
import shutil
import warnings
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
    """The shape of a model, in Hugging Face's field names but for the last three."""
    vocab_size: int
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None      # None: one for each query head
    head_dim: int | None = None                 # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None            # Llama 3's: factor, low_freq_factor, ...
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False                # q, k and v have a bias (Qwen2)
    qk_norm: bool = False                       # RMSNorm on each head's q and k (Qwen3)
    eos_token_id: int | list[int] | None = None  # saved with the model; `generate` is told its own

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")


# ------------------------------------------------------------------------------------------------
# The transformer.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config: GPTConfig):
    """Radians a position, θ^(-2i/D) for pair i: (D/2,) float32."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = config.rope_theta ** -exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Llama 3: long wavelengths are stretched to a longer context.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)         # 1: left alone; 0: stretched
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x, cos, sin):
    """RoPE: the halves (a, b) of x (B, heads, T, D) become (a cos - b sin, b cos + a sin).

    cos and sin (B or 1, 1, T, D) are `rotations`, whose sin has the first half negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(config.hidden_size, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))            # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))            # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)         # (B, G, T, D)
        q = rotate(q.transpose(1, 2), cos, sin)                                  # (B, H, T, D)
        k = rotate(k.transpose(1, 2), cos, sin)                                  # (B, G, T, D)
        decoding = T == 1
        if cache is not None:                                 # holds the columns before these
            keys, values, columns, seen = cache
            k = keys.index_copy_(2, columns, k)[:, :, :seen]                     # (B, G, N, D)
            v = values.index_copy_(2, columns, v)[:, :, :seen]                   # (B, G, N, D)
        if decoding:                                          # a key's H/G heads are its queries
            q = q.view(B, k.shape[1], -1, self.head_dim)                         # (B, G, H/G, D)
        # softmax(q kᵀ / sqrt(D)) v, where a token attends to itself and to what is before it
        if decoding and not x.is_cuda:                        # faster there than the fused kernel
            scores = q * self.head_dim ** -0.5 @ k.transpose(-1, -2)             # (B, G, H/G, N)
            scores = scores if mask is None else scores + mask
            y = F.softmax(scores, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                               is_causal=mask is None and not decoding,
                                               enable_gqa=q.shape[1] != k.shape[1])
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2)                   # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


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

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
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
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None] * self.frequencies                         # (..., D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def forward(self, input_ids, cos, sin, mask=None, caches=None, checkpointing=False):
        """input_ids (B, T), cos and sin (B or 1, T, D), a cache for each layer -> (B, T, C)."""
        x, cos, sin = self.embed_tokens(input_ids), cos[:, None], sin[:, None]   # (B, T, C)
        for i, layer in enumerate(self.layers):
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, caches and caches[i])
        return self.norm(x)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:                                   # learns twice as fast as with .02
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.tie_weights()
        self.gradient_checkpointing = False         # True: layers run again in the backward pass
        self.precision = None                       # torch.bfloat16: computes in it
        self.tokens_in_use = config.vocab_size      # fewer where the head's last rows are padding
        self.source, self.hf_config = None, None    # from_pretrained's directory, and its config
        self.decoders, self.low_precision = {}, []  # of `generate`; a list hides the submodule

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.precision or self.lm_head.weight.dtype

    @property
    def head(self):
        """The output matrix (V in use, C), in the weights' own dtype."""
        return self.lm_head.weight[:self.tokens_in_use]

    def forward(self, input_ids, attention_mask=None):
        """Logits (B, T, V) for input_ids (B, T). attention_mask (B, T): 1 for tokens, 0: padding.

        Rows padded on the right need no mask: attention is causal, and no token sees them.
        """
        return F.linear(self.hidden_states(input_ids, attention_mask), self.head.to(self.dtype))

    def hidden_states(self, input_ids, attention_mask=None):
        """What the head reads, (B, T, C): for a loss that never holds all logits (`chunked`)."""
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)      # (T,)
        positions, mask = columns[None], None                                    # (1 or B, T)
        if attention_mask is not None:
            positions = (attention_mask.bool().cumsum(-1) - 1).clamp(min=0)
            mask = visible(attention_mask.bool(), columns, self.dtype)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            cos, sin = self.model.rotations(positions, self.dtype)
            hidden = self.model(input_ids, cos, sin, mask, None, self.gradient_checkpointing)
        return hidden.to(self.dtype)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens: int, temperature: float = 1.0, generator=None,
                 eos_token_id=None) -> "Rollout":
        """Sample one answer to each prompt, from the full softmax(logits / temperature).

        prompts: a list of B non-empty lists of token ids, of any lengths.
        temperature: 0 takes the most probable token (log-probabilities are those at 1).
        generator: a torch.Generator on the model's device; None draws from the global random state.
        eos_token_id: an id, several, or None for "never ends".
        ValueError for an empty prompt, one that exceeds the context, and a negative temperature.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        ids, padding = self.left_padded(prompts, max_new_tokens)                 # (B, P), (B, 1)
        eos = [-1] if eos_token_id is None else torch.tensor(eos_token_id).view(-1).tolist()
        decoder = self.decoder_for(len(ids), ids.shape[1] + max_new_tokens, eos)
        noise = decoder.noise                                                    # (B, V)
        ask_every = 16 if noise.is_cuda else 1                # asking waits for the GPU
        for r in range(max_new_tokens):
            if temperature:
                noise.exponential_(generator=generator).log_()
            else:
                noise.zero_()
            if r == 0:
                decoder.start(ids, padding, temperature or 1.0)
            else:
                decoder.next()
            if eos_token_id is not None and r % ask_every == ask_every - 1 and decoder.all_ended():
                break
        own = slice(ids.shape[1], ids.shape[1] + max_new_tokens)                 # the answers'
        tokens, log_probs = decoder.tokens[:, own], decoder.log_probs[:, own]
        ends = torch.isin(tokens, decoder.eos).long()
        mask = ends.cumsum(1) - ends == 0                     # no end before this token
        R = int(mask.any(0).sum())                            # the longest answer
        tokens, mask, log_probs = tokens[:, :R], mask[:, :R], log_probs[:, :R]
        return Rollout(tokens * mask, mask, log_probs * mask)

    def left_padded(self, prompts, max_new_tokens):
        """ids (B, P) and how many columns of padding are before each row (B, 1)."""
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("generate needs at least one prompt, and at least one token in each")
        P = max(lengths)
        if P + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(f"a prompt of {P} tokens and {max_new_tokens} new ones exceed the "
                             f"model's context of {self.config.max_position_embeddings}")
        ids = [[0] * (P - n) + list(prompt) for prompt, n in zip(prompts, lengths)]
        padding = [[P - n] for n in lengths]
        return torch.tensor(ids, device=self.device), torch.tensor(padding, device=self.device)

    def decoder_for(self, B, width, eos) -> "Decoder":
        """On CUDA, the decoder that an earlier call of this shape left, with its graph."""
        model = self.copy_in_precision() if self.precision else self
        if self.device.type != "cuda":
            return Decoder(model, B, width, eos)
        width = -(-width // 64) * 64                          # few widths, few graphs
        key = (B, width, model.dtype, *eos)
        if key not in self.decoders:
            if len(self.decoders) == 4:                       # each has its keys and values
                del self.decoders[next(iter(self.decoders))]  # the oldest
            self.decoders[key] = Decoder(model, B, width, eos)
        return self.decoders[key]

    def _apply(self, *args, **kwargs):
        """to(), float(), cuda(): weights may get another place, where no graph reads them."""
        self.decoders.clear()
        self.low_precision.clear()
        return super()._apply(*args, **kwargs)

    def copy_in_precision(self) -> "GPT":
        """This model with weights in `precision`, as they are now: it decodes twice as fast."""
        if not self.low_precision:
            model = copy.deepcopy(self).to(self.precision).requires_grad_(False)
            model.precision = None
            self.low_precision.append(model)
        for low, p in zip(self.low_precision[0].parameters(), self.parameters()):
            low.copy_(p)
        return self.low_precision[0]

    def __getstate__(self):                                   # a copy makes its own
        return self.__dict__ | {"decoders": {}, "low_precision": []}

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
            raise FileNotFoundError(f"{directory} has no config.json: it holds no checkpoint")
        files = weight_files(directory)
        try:
            hf_config = AutoConfig.from_pretrained(directory)
            config = config_from_hf(hf_config)
            state = {}
            for file in files:
                state |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()
                          if "rotary_emb" not in name}
            if config.tie_word_embeddings:
                config.tie_word_embeddings = tie(state, directory)
            with torch.device("meta"):                        # no time spent on random weights
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except Exception as error:                            # a broken file can raise anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{directory} cannot be loaded: {reason}") from None
        model.tie_weights()                                   # assign=True made two of one
        model.source, model.hf_config = directory, hf_config
        return model

    def save_pretrained(self, directory):
        """Write config and weights, for transformers (4.57 too).

        A model that from_pretrained loaded keeps what its config said, and takes the tokenizer and
        generation files of its directory along.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for pattern in COMPANIONS if self.source else ():
            for file in self.source.glob(pattern):
                if file.is_file() and not (directory / file.name).exists():
                    shutil.copyfile(file, directory / file.name)
        config = copy.copy(self.hf_config) or config_to_hf(self.config)
        config.eos_token_id = self.config.eos_token_id
        config.tie_word_embeddings = self.config.tie_word_embeddings
        config.dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config.save_pretrained(directory)
        # What transformers 4 and its like look for, and all end tokens for those who generate.
        change_json(directory / "config.json", {"rope_theta": self.config.rope_theta,
                                                "rope_scaling": self.config.rope_scaling})
        tokenizer = directory / "tokenizer_config.json"
        if read_json(tokenizer).get("tokenizer_class") == "TokenizersBackend":   # transformers 5's
            change_json(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast",
                                    "model_input_names": ["input_ids", "attention_mask"]})
        generation = directory / "generation_config.json"
        ends = end_tokens(self.config.eos_token_id, read_json(generation).get("eos_token_id"))
        change_json(generation, {"eos_token_id": ends or None})
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()
                 if not (self.config.tie_word_embeddings and name == "lm_head.weight")}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------
# Decoding: one token a step, with the keys and values of what is before it kept in a cache.

class Rollout(NamedTuple):
    """What `generate` returns: answers of one batch, side by side, R = the longest of them."""
    tokens: torch.Tensor       # (B, R) int64: the sampled tokens; 0 after a row's end
    mask: torch.Tensor         # (B, R) bool: real response tokens, the first EOS included
    log_probs: torch.Tensor    # (B, R) float32: of each sampled token; 0 after a row's end


class Decoder:
    """B rows in the middle of their answers, padded on the left: all have the same next column.

    `step` touches only tensors that stay where they are: a GPU replays it as a CUDA graph, in which
    no kernel waits for Python. A CPU runs the same step, over the columns that are in use.
    """

    def __init__(self, model: GPT, B: int, width: int, eos: list[int]):
        config, device = model.config, model.device
        self.model, self.head = model.model, model.head       # not `model`, which owns this
        shape = (config.num_hidden_layers, B, config.num_key_value_heads, width, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=device)
        self.values = torch.zeros(shape, dtype=model.dtype, device=device)
        self.columns = torch.arange(width, device=device)
        self.cos, self.sin = model.model.rotations(self.columns, model.dtype)    # (width, D)
        self.eos = torch.tensor(eos, device=device)
        self.rows = torch.arange(B, device=device)            # that are still in the batch, b of B
        self.alive = torch.ones(B, dtype=torch.bool, device=device)
        self.padding = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)    # of the last token sampled
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=device)    # the last token sampled
        self.noise = torch.zeros(B, model.tokens_in_use, dtype=torch.float32, device=device)
        self.temperature = torch.ones((), device=device)
        self.tokens = torch.zeros(B, width, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(B, width, dtype=torch.float32, device=device)
        self.seen, self.padded = 0, False                     # columns in use; whether with padding
        self.graph = self.capture(width, device) if device.type == "cuda" else None

    def start(self, ids, padding, temperature):
        """Run the prompts ids (B, P) and sample the first token of each answer."""
        P = ids.shape[1]
        self.keys.zero_()                                     # a NaN left there would spread
        self.values.zero_()
        self.padding.copy_(padding)
        self.alive.fill_(True)
        self.temperature.fill_(temperature)
        self.column.fill_(P)
        self.seen, self.padded = P, bool(padding.any())
        hidden = self.last_hidden(ids, self.columns[:P], P, self.padded)
        self.sample(hidden)

    def next(self):
        """Sample the next token of each row."""
        self.seen += 1
        if self.graph is None:
            self.step(self.seen, self.padded)
        else:
            self.graph.replay()

    def step(self, seen: int, masked: bool):
        hidden = self.last_hidden(self.ids, self.column, seen, masked)
        self.column.add_(1)
        self.sample(hidden)

    def last_hidden(self, ids, columns, seen, masked):
        """The last of the hidden states (b, C) of tokens ids (b, T) in these columns (T,)."""
        mask = None
        if masked:
            mask = visible(self.columns[:seen] >= self.padding, columns, self.cos.dtype)
        positions = (columns - self.padding).clamp(min=0)                        # (b, T)
        caches = [(keys, values, columns, seen) for keys, values in zip(self.keys, self.values)]
        return self.model(ids, self.cos[positions], self.sin[positions], mask, caches)[:, -1]

    def sample(self, hidden):
        """Tokens by argmax(p / Exponential(1) noise), the Gumbel-max trick, from hidden (b, C).

        The noise is drawn for all B rows, whichever are left: nearly equal models then give nearly
        equal samples, the common random numbers that make a search's candidates comparable.
        """
        logits = F.linear(hidden, self.head).float()                             # (b, V)
        log_p = F.log_softmax(logits / self.temperature, dim=-1)                 # (b, V)
        noise = self.noise if len(self.rows) == len(self.noise) else self.noise[self.rows]
        token = (log_p - noise).argmax(-1)                                       # (b,)
        self.tokens[self.rows, self.column] = token
        self.log_probs[self.rows, self.column] = log_p.gather(-1, token[:, None])[:, 0]
        self.ids.copy_(token[:, None])
        self.alive &= (self.ids != self.eos).all(-1)

    def all_ended(self) -> bool:
        """Whether no row is left. On a CPU, ended rows leave the batch once they are half of it."""
        left = int(self.alive.sum())
        if self.graph is None and 0 < left <= len(self.rows) // 2:
            alive = self.alive
            self.rows, self.padding = self.rows[alive], self.padding[alive]
            self.ids, self.alive = self.ids[alive], alive[alive]
            self.keys = self.keys[:, alive]
            self.values = self.values[:, alive]
        return left == 0

    @torch.no_grad()
    def capture(self, width, device):
        """A CUDA graph of `step` over the whole width, after two steps that set the kernels up."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):                       # the streams are of this GPU
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step(width, masked=True)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self.step(width, masked=True)
        return graph


def visible(real, queries, dtype):
    """A mask to add to the scores, (B, 1, T, N): 0 where queries (T,) see columns, else very low.

    They see what is real (B, N) up to themselves, and always themselves: a softmax over nothing
    would be NaN in padding.
    """
    columns, queries = torch.arange(real.shape[1], device=real.device), queries[:, None]
    seen = (columns <= queries) & real[:, None] | (columns == queries)           # (B, T, N)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


# ------------------------------------------------------------------------------------------------
# Hugging Face's files and configs.

SAME_IN_HF = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
              "rms_norm_eps", "tie_word_embeddings", "eos_token_id")
# What a checkpoint directory has beside config and weights; saved models get a copy.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "chat_template*", "generation_config.json")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or the only one."""
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
        except Exception:                                     # a broken file can raise anything
            raise ValueError(f"{directory} cannot be loaded: its index is damaged") from None
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has no {file.name} (other formats are not read)")
    return files


def tie(state: dict, directory) -> bool:
    """One tensor for embedding and head, if the file has one or two equal ones; else False.

    Two that differ stay two, as in transformers, which goes by the file and not by its config.
    """
    names = "model.embed_tokens.weight", "lm_head.weight"
    found = [state[name] for name in names if name in state]
    if len(found) == 2 and not torch.equal(*found):
        warnings.warn(f"{directory}: its config says that embedding and head are tied, its file "
                      "has two that differ; both are used as they are")
        return False
    if found:
        state |= dict.fromkeys(names, found[0])
    return True


def end_tokens(*ids) -> list[int]:
    """Each once, in this order, of end tokens given as an id, a list of ids, or None."""
    lists = [i if isinstance(i, list) else [i] for i in ids if i is not None]
    return list(dict.fromkeys(sum(lists, [])))


def read_json(path: Path) -> dict:
    """{} where there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def change_json(path: Path, values: dict):
    content = read_json(path) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def config_from_hf(hf) -> GPTConfig:
    """From a LlamaConfig, Qwen2Config or Qwen3Config; ValueError for what is not supported."""
    if hf.model_type not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model type {hf.model_type!r} is not supported; llama, qwen2, qwen3 are")
    rope = dict(hf.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    found = {f"rope type {kind!r}": kind not in ("default", "llama3"),
             f"activation {hf.hidden_act!r}": hf.hidden_act != "silu",
             "a bias in the MLP": getattr(hf, "mlp_bias", False),
             "a bias in o_proj": getattr(hf, "attention_bias", False),
             "sliding-window attention": getattr(hf, "use_sliding_window", False)}
    for name, present in found.items():
        if present:
            raise ValueError(f"{name} of this {hf.model_type} checkpoint is not supported")
    return GPTConfig(
        **{name: getattr(hf, name, None) for name in SAME_IN_HF},    # Qwen2's has no head_dim
        rope_theta=theta, rope_scaling=rope if kind == "llama3" else None,
        attention_bias=hf.model_type == "qwen2", qk_norm=hf.model_type == "qwen3")


def config_to_hf(config: GPTConfig):
    """The transformers config of the family that a shape belongs to."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config
    families = {(False, False): LlamaConfig, (True, False): Qwen2Config, (False, True): Qwen3Config}
    family = families[config.attention_bias, config.qk_norm]
    rope = dict(rope_type="default", rope_theta=config.rope_theta) | (config.rope_scaling or {})
    same = {name: getattr(config, name) for name in SAME_IN_HF}
    return family(
        **same, bos_token_id=None, rope_parameters=rope,
        architectures=[family.__name__.removesuffix("Config") + "ForCausalLM"])


def download(repo_id: str) -> Path:
    """Fetch a repository's config, weights and tokenizer. FileNotFoundError where that fails."""
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "model*.safetensors", *COMPANIONS]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=wanted))
    except Exception as error:                                # no network, no such name, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"there is no directory {repo_id}, and no such repository could be "
                                f"downloaded: {reason}") from None
