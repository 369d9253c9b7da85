"""model.py against transformers, and against what sampling means."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from model import GPT, GPTConfig, KVCache, config_to_hf, packed, times_packed

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
FAMILIES = {
    "llama": dict(tie_word_embeddings=True),
    "llama-grouped-untied": dict(num_key_value_heads=2, tie_word_embeddings=False),
    "llama3-rope": dict(num_key_value_heads=1, rope_scaling=LLAMA3_ROPE, rope_theta=500_000.0),
    "qwen2": dict(attention_bias=True, num_key_value_heads=2, rope_theta=1e6),
    "qwen2-untied": dict(attention_bias=True, tie_word_embeddings=False),
    "qwen3": dict(qk_norm=True, head_dim=32, num_key_value_heads=2),
    "qwen3-untied": dict(qk_norm=True, tie_word_embeddings=False),
}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


def tiny(seed=0, **settings):
    """A small random model whose every parameter, norms and biases too, is away from its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(dict(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=128) | settings)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_the_same_in_transformers(family, tmp_path):
    model = tiny(**FAMILIES[family], eos_token_id=4)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == family.split("-")[0].replace("llama3", "llama")

    ids = torch.randint(0, 20, (3, 100))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    mask = torch.ones_like(ids)
    mask[0, :30] = mask[1, 70:] = 0                           # padding on the left, and on the right
    with torch.no_grad():
        ours, ref = model(ids, mask), theirs(ids, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(ours[mask.bool()], ref[mask.bool()], atol=1e-4, rtol=0)

    greedy = model.generate([ids[0, :7].tolist()], 64, temperature=0).tokens
    ref = theirs.generate(ids[:1, :7], attention_mask=torch.ones(1, 7), max_new_tokens=64, do_sample=False,
                          eos_token_id=-1, pad_token_id=0)
    assert greedy[0].tolist() == ref[0, 7:].tolist()

    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16
    assert torch.equal(again(ids), model(ids))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_checkpoint_saved_by_transformers_loads(tmp_path):
    tiny(num_key_value_heads=2).save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ids = torch.randint(0, 20, (2, 10))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path / "theirs")(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_matrices_sample_the_same_and_are_gone_afterwards(family, monkeypatch):
    model = tiny(**FAMILIES[family])
    plain = model.generate(PROMPTS, 20, generator=torch.Generator().manual_seed(0), eos_token_id=4)
    monkeypatch.setattr("model.PACK", 0)
    calls = []
    monkeypatch.setattr("model.times_packed", lambda *args: calls.append(1) or times_packed(*args))
    fast = model.generate(PROMPTS, 20, generator=torch.Generator().manual_seed(0), eos_token_id=4)
    assert torch.equal(plain.tokens, fast.tokens) and len(calls) > 20
    torch.testing.assert_close(plain.log_probs, fast.log_probs)
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), packed(model, 3):
        assert "forward" in vars(model.lm_head)
        1 / 0
    assert "forward" not in vars(model.lm_head)


@pytest.mark.skipif("SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR is not set: the directory of a SmolLM2 "
                    "checkpoint with its tokenizer (README.md says how to make one)")
def test_a_real_checkpoint_is_the_same_in_transformers():
    source = os.environ["SMOLLM2_DIR"]
    model, theirs = GPT.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                             return_dict=True)["input_ids"]
               for question in ("What is 17 + 25?", "Name three rivers in Europe, and a city on each of them.")]
    together = model.generate(prompts, 64, temperature=0)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        reference = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                                    eos_token_id=-1, pad_token_id=0)[0, len(prompt):]
        assert together.tokens[row].tolist() == reference.tolist()


def test_what_came_with_a_checkpoint_is_saved_with_it(tmp_path):
    source, saved = tmp_path / "theirs", tmp_path / "ours"
    theirs = AutoModelForCausalLM.from_config(config_to_hf(tiny().config), dtype=torch.bfloat16)
    theirs.config.update(dict(bos_token_id=1, pad_token_id=3, eos_token_id=[2, 4]))
    theirs.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[2, 4], pad_token_id=3)
    theirs.save_pretrained(source)
    words = {w: i for i, w in enumerate("<unk> <s> </s> <pad> one two three four".split())}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="</s>",
                            pad_token="<pad>", chat_template="{{ messages[0]['content'] }}").save_pretrained(source)

    GPT.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(saved)
    again, config = AutoTokenizer.from_pretrained(saved), json.loads((saved / "config.json").read_text())
    assert again.get_vocab() == words and again.pad_token_id == 3 and again.eos_token_id == 2
    assert again.apply_chat_template([{"role": "user", "content": "two"}], tokenize=False) == "two"
    assert config == json.loads((source / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["bos_token_id"] == 1 and config["eos_token_id"] == [2, 4]
    model, ids = AutoModelForCausalLM.from_pretrained(saved), torch.tensor([[4, 5, 6]])
    assert model.dtype == torch.bfloat16 and model.generation_config.max_new_tokens == 5
    assert torch.equal(model.generate(ids, do_sample=False), theirs.generate(ids, do_sample=False))

    GPT.from_pretrained(saved).save_pretrained(saved)        # in place; float32 this time
    assert GPT.from_pretrained(saved).hf_config.dtype == torch.float32


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, "llama, qwen2 and qwen3"), ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ({"mlp_bias": True}, "bias in the MLP"), ({"attention_bias": True}, "bias in o_proj"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'linear'"),
    ({"hidden_size": 64, "head_dim": 8}, "size mismatch"), ({"hidden_size": "wide"}, "cannot be loaded"),
])
def test_what_is_not_supported_is_refused_in_one_line(change, words, tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, content", [("config.json", b"{"), ("config.json", b"{}"),
                                           ("model.safetensors", b"short")])
def test_broken_files_are_refused_in_one_line(file, content, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        GPT.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        GPT.from_pretrained(tmp_path)
    config_to_hf(tiny().config).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_bfloat16_keeps_exact_angles():
    model = tiny().to(torch.bfloat16)
    assert torch.equal(model.model.frequencies, tiny().model.frequencies)
    assert model(torch.tensor([PROMPTS[1]])).dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids, calls = tiny(num_key_value_heads=2, qk_norm=True), torch.randint(0, 20, (3, 9)), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        F.cross_entropy(model(ids, mask).flatten(0, 1), ids.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 3                                    # once without; forward and backward with it
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ragged_prompts_do_not_disturb_each_other(family):
    model = tiny(**FAMILIES[family])
    together = model.generate(PROMPTS, 12, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], 12, temperature=0)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(together.log_probs[row], alone.log_probs[0], atol=1e-5, rtol=0)


def test_ragged_prompts_sample_what_they_sample_alone():
    model, n = tiny(), 20
    together = model.generate(PROMPTS, n, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.empty(3, 20).exponential_(generator=generator) for _ in range(n)])       # (R, B, V)
    for row, prompt in enumerate(PROMPTS):                    # the definition, without a cache and without padding
        tokens = list(prompt)
        for r in range(n):
            log_p = F.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)
            tokens.append(int((log_p - noise[r, row].log()).argmax()))
        assert together.tokens[row].tolist() == tokens[len(prompt):]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward(temperature):
    model = tiny(qk_norm=True)
    rollout = model.generate(PROMPTS, 16, temperature=temperature)
    for row, prompt in enumerate(PROMPTS):
        whole = torch.tensor([prompt + rollout.tokens[row].tolist()])
        log_p = F.log_softmax(model(whole)[0, len(prompt) - 1:-1] / temperature, -1)                    # (R, V)
        expected = log_p.gather(-1, rollout.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(rollout.log_probs[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature):
    model, n = tiny(), 40_000
    tokens = model.generate([PROMPTS[1]] * n, 1, temperature, torch.Generator().manual_seed(0)).tokens[:, 0]
    p = F.softmax(model(torch.tensor([PROMPTS[1]]))[0, -1] / temperature, -1)
    frequency = torch.bincount(tokens, minlength=20) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()           # 5 standard errors


def test_rows_end_at_their_first_eos():
    model, eos = tiny(), [4, 7]
    rollout = model.generate(PROMPTS * 20, 30, generator=torch.Generator().manual_seed(0), eos_token_id=eos)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max() and rollout.tokens.shape[1] == lengths.max()
    for tokens, mask, log_probs in zip(rollout.tokens.tolist(), rollout.mask.tolist(), rollout.log_probs.tolist()):
        n = sum(mask)
        assert mask == [True] * n + [False] * (len(mask) - n)
        assert not set(tokens[:n - 1]) & set(eos)             # the first EOS is the last real token
        assert n == len(mask) == 30 or tokens[n - 1] in eos
        assert all(x == 0 for x in tokens[n:] + log_probs[n:]) and all(x < 0 for x in log_probs[:n])


def test_rows_that_end_leave_the_others_alone():
    model, n, eos = tiny(), 40, [4, 7]
    free = model.generate(PROMPTS * 20, n, generator=torch.Generator().manual_seed(0))
    rollout = model.generate(PROMPTS * 20, n, generator=torch.Generator().manual_seed(0), eos_token_id=eos)
    assert rollout.mask[:, -1].sum() <= 60 // 4             # the batch was halved twice
    R = rollout.tokens.shape[1]
    ended = torch.isin(free.tokens, torch.tensor(eos)).long().cumsum(1)
    mask = torch.cat((torch.zeros(60, 1), ended[:, :-1]), dim=1)[:, :R] == 0         # up to the first EOS
    assert torch.equal(rollout.mask, mask)
    assert torch.equal(rollout.tokens, free.tokens[:, :R] * mask)
    torch.testing.assert_close(rollout.log_probs, free.log_probs[:, :R] * mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama-grouped-untied", "qwen3"])
def test_compiled_decoding_is_the_same(family):
    model = tiny(**FAMILIES[family])
    plain, compiled = [[model.generate(prompts, 20, generator=torch.Generator().manual_seed(0), eos_token_id=4,
                                       compile=compile) for prompts in (PROMPTS, PROMPTS[::-1], [[1, 2]] * 3)]
                       for compile in (False, "eager")]
    for one, other in zip(plain, compiled):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)


def test_generation_stops_when_all_rows_ended():
    model = tiny()
    with torch.no_grad():                                     # whatever came before, the next token is 4
        model.lm_head.weight.zero_()
        model.lm_head.weight[4] = 1.0
    bias = model.model.norm.register_forward_hook(lambda *_: torch.full(_[2].shape, 10.0))
    rollout = model.generate(PROMPTS, 50, eos_token_id=4)
    bias.remove()
    assert rollout.tokens.tolist() == [[4]] * 3 and rollout.mask.all()


def test_no_new_tokens_and_bad_prompts():
    model = tiny()
    assert model.generate(PROMPTS, 0).tokens.shape == (3, 0)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[1], []], 5)
    with pytest.raises(ValueError, match="at least one prompt"):
        model.generate([], 5)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(PROMPTS, 5, temperature=-1.0)
    with pytest.raises(ValueError, match="context of 128"):
        model.generate([[1] * 100], 29)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of"):
        GPTConfig(20, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ValueError, match="even"):
        GPTConfig(20, head_dim=7)


@pytest.mark.parametrize("padding", [[[0], [0]], [[2], [0]]])
def test_a_cache_may_be_extended_in_pieces(padding):
    """By one column or by several, it gives the hidden states that the whole gives at once."""
    model, padding = tiny(num_key_value_heads=2), torch.tensor(padding)
    real = torch.arange(8) >= padding
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
    with torch.no_grad():
        cache = KVCache(model, padding, 8, compile=False)
        pieces = torch.cat([cache.extend(ids[:, a:b]) for a, b in ((0, 4), (4, 7), (7, 8))], dim=1)
        whole = model.hidden_states(ids, attention_mask=real.long())
    assert (pieces[real] - whole[real]).abs().max() < 1e-5
