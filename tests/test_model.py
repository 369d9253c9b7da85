"""model.py against the definition of sampling; tests/test_hf.py has it against transformers."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny
from model import GPT, Decoder, GPTConfig

FAMILIES = {
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": dict(num_key_value_heads=1, attention_bias=True),
    "qwen3": dict(num_key_value_heads=2, qk_norm=True, head_dim=16),
}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
EOS = [4, 7]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def assert_same(rollout, other, atol=1e-5):
    assert torch.equal(rollout.tokens, other.tokens) and torch.equal(rollout.mask, other.mask)
    torch.testing.assert_close(rollout.log_probs, other.log_probs, atol=atol, rtol=0)


@torch.no_grad()
def one_by_one(model, prompts, n, temperature, generator, eos):
    """The definition: each row alone, whole forwards, no cache, argmax(log p - log Exponential)."""
    noise = torch.zeros(n, len(prompts), 20)
    if temperature:
        for each in noise:
            each.exponential_(generator=generator).log_()
    rows = []
    for b, prompt in enumerate(prompts):
        ids, log_probs = list(prompt), []
        while len(log_probs) < n and not (log_probs and ids[-1] in eos):
            log_p = F.log_softmax(model(torch.tensor([ids]))[0, -1] / (temperature or 1.0), -1)
            ids.append(int((log_p - noise[len(log_probs), b]).argmax()))
            log_probs.append(log_p[ids[-1]].item())
        rows.append((ids[len(prompt):], log_probs))
    return rows


def assert_rows(rollout, rows):
    """The rollout holds these answers, and nothing but zeros behind them."""
    assert rollout.tokens.shape[1] == max(len(tokens) for tokens, _ in rows)
    for b, (tokens, log_probs) in enumerate(rows):
        n = len(tokens)
        assert rollout.tokens[b].tolist() == tokens + [0] * (rollout.tokens.shape[1] - n)
        assert rollout.mask[b, :n].all() and not rollout.mask[b, n:].any()
        assert rollout.log_probs[b, :n].tolist() == pytest.approx(log_probs, abs=1e-5)
        assert not rollout.log_probs[b, n:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_samples_what_each_row_samples_alone(family, temperature):
    """Ragged prompts, rows that end early and leave the batch: same tokens, same log-probs."""
    model, prompts = tiny(**FAMILIES[family]), PROMPTS * 6
    rollout = model.generate(prompts, 30, temperature, seeded(), EOS)
    rows = one_by_one(model, prompts, 30, temperature, seeded(), EOS)
    assert_rows(rollout, rows)
    lengths = sorted(len(tokens) for tokens, _ in rows)
    if temperature == 1.0:
        assert lengths[0] == 1 and lengths[-5] < lengths[-1]  # the batch was halved twice


@pytest.mark.parametrize("eos", [EOS, None])
def test_the_step_that_a_gpu_replays_samples_the_same(eos, monkeypatch):
    """Over the whole width, all rows to the end, in a decoder that earlier calls have used."""
    model, kept, real = tiny(qk_norm=True, num_key_value_heads=2), {}, GPT.decoder_for
    plain = [model.generate(PROMPTS * 4, 20, 0.9, seeded(i), eos) for i in range(3)]

    def decoder_for(self, B, width, eos):
        if not kept:
            decoder = real(self, B, 64, eos)
            decoder.graph = SimpleNamespace(replay=lambda: decoder.step(64, masked=True))
            kept["decoder"] = decoder
        return kept["decoder"]

    monkeypatch.setattr(GPT, "decoder_for", decoder_for)
    for i, expected in enumerate(plain):
        assert_same(model.generate(PROMPTS * 4, 20, 0.9, seeded(i), eos), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature):
    model, n = tiny(), 10_000
    tokens = model.generate([PROMPTS[1]] * n, 1, temperature, seeded()).tokens[:, 0]
    p = F.softmax(model(torch.tensor([PROMPTS[1]]))[0, -1] / temperature, -1)
    frequency = torch.bincount(tokens, minlength=20) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()    # 5 std. errors


def test_padding_of_the_vocabulary_is_never_sampled():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[15:] *= 100
    model.tokens_in_use = 15
    assert model(torch.tensor(PROMPTS[:1])).shape == (1, 3, 15)
    assert model.generate(PROMPTS * 9, 20).tokens.max() < 15


def test_padded_rows_have_the_logits_and_gradients_that_they_have_alone():
    model, gradients = tiny(qk_norm=True, num_key_value_heads=2), []
    left = torch.tensor([[0, 0, 0, 0, 3, 1, 4], [1, 5, 9, 2, 6, 5, 3]])
    real = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    for logits in (model(left, real)[0, 4:], model(torch.tensor([PROMPTS[0]]))[0],
                   model(torch.tensor([PROMPTS[0] + [0, 0]]))[0, :3]):
        model.zero_grad()
        F.cross_entropy(logits, torch.tensor([1, 4, 2])).backward()
        gradients.append([logits.detach()] + [p.grad for p in model.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids, calls, gradients = tiny(), torch.randint(0, 20, (3, 9)), [], []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 3                                    # with it, forward and backward
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


# Low precision.

def test_bfloat16_keeps_exact_angles():
    model = tiny().to(torch.bfloat16)
    assert torch.equal(model.model.frequencies, tiny().model.frequencies)
    assert model(torch.tensor([PROMPTS[1]])).dtype == torch.bfloat16


def test_precision_samples_from_a_copy_that_follows_the_weights():
    model = tiny()
    model.precision = torch.bfloat16
    for seed in (0, 1):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)                    # in place, as EffOPD does
        plain = copy.deepcopy(model).to(torch.bfloat16)
        plain.precision = None
        expected = plain.generate(PROMPTS, 20, generator=seeded(seed))
        assert_same(model.generate(PROMPTS, 20, generator=seeded(seed)), expected, atol=0)
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.requires_grad
    assert model(torch.tensor([PROMPTS[1]])).dtype == torch.bfloat16


# What cannot work.

@pytest.mark.parametrize("arguments, words", [
    (([[1], []], 5), "at least one token"), (([], 5), "one prompt"),
    ((PROMPTS, 5, -1.0), "temperature"), (([[1] * 100], 29), "context of 128")])
def test_bad_prompts(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny().generate(*arguments)


# CUDA graphs.

@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_samples_what_eager_steps_sample(family, dtype, monkeypatch):
    torch.set_float32_matmul_precision("highest")             # a run of train.py sets TF32
    model = tiny(**FAMILIES[family]).cuda().to(dtype)
    graphs = [model.generate(PROMPTS * 9, 40, 1.0, seeded(i, "cuda"), EOS) for i in range(2)]
    assert len(model.decoders) == 1 and next(iter(model.decoders.values())).graph is not None

    def eager(self, width, device):
        return SimpleNamespace(replay=lambda: self.step(width, masked=True))

    model.decoders.clear()
    monkeypatch.setattr(Decoder, "capture", eager)
    for i, rollout in enumerate(graphs):
        assert_same(rollout, model.generate(PROMPTS * 9, 40, 1.0, seeded(i, "cuda"), EOS))


@needs_cuda
def test_a_cuda_graph_is_captured_once_and_reads_the_weights_as_they_are():
    model = tiny().cuda()
    first = model.generate(PROMPTS, 20, generator=seeded(0, "cuda"))
    (decoder,) = model.decoders.values()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 1.5)                                  # in place, as EffOPD does
    second = model.generate(PROMPTS, 21, generator=seeded(0, "cuda"))
    assert list(model.decoders.values()) == [decoder]         # 64 columns hold either length
    assert not torch.equal(first.tokens, second.tokens[:, :20])
    assert_same(second, copy.deepcopy(model).generate(PROMPTS, 21, generator=seeded(0, "cuda")))
    for n in (70, 20, 90, 110, 64):                           # at most four are kept
        model.generate(PROMPTS, n, generator=seeded(0, "cuda"), eos_token_id=n)
    assert len(model.decoders) == 4
    model.float()                                             # may move weights: all are dropped
    assert not model.decoders


@needs_cuda
def test_a_model_in_precision_samples_on_cuda_from_its_weights_as_they_are():
    model = tiny().cuda()
    model.precision = torch.bfloat16
    for _ in range(2):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        expected = copy.deepcopy(model).generate(PROMPTS, 20, generator=seeded(0, "cuda"))
        assert_same(model.generate(PROMPTS, 20, generator=seeded(0, "cuda")), expected, atol=0)
