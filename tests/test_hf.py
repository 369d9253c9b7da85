"""Checkpoints in Hugging Face's format: what we save loads in transformers, and the other way."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          PreTrainedTokenizerFast)

from model import GPT, GPTConfig, config_to_hf, end_tokens

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


def tiny(seed=0, **settings):
    """A small random model, each of whose parameters is away from its initial value."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=128)
    model = GPT(GPTConfig(**shape | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def read(path):
    return json.loads(path.read_text())


def change(path, **values):
    path.write_text(json.dumps(read(path) | values))


# What we save.

@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_in_transformers(family, tmp_path):
    model = tiny(**FAMILIES[family], eos_token_id=4)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == family.split("-")[0].replace("llama3", "llama")

    ids = torch.randint(0, 20, (3, 100))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0                                          # padding on the left
    mask[1, 70:] = 0                                          # and on the right
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        ours, reference = model(ids, mask), theirs(ids, mask, position_ids=positions).logits
    torch.testing.assert_close(ours[mask.bool()], reference[mask.bool()], atol=1e-4, rtol=0)

    prompt = ids[:1, :7]
    greedy = model.generate(prompt.tolist(), 64, temperature=0).tokens
    reference = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64,
                                do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert greedy[0].tolist() == reference[0, 7:].tolist()

    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "llama3-rope", "qwen2"])
def test_older_readers_find_rope_where_they_look(family, tmp_path):
    """transformers 4 and what builds on it; tried with 4.57.6, whose logits were equal."""
    tiny(**FAMILIES[family]).save_pretrained(tmp_path / "new")
    loaded = GPT.from_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "again")
    for name in ("new", "again"):
        config = read(tmp_path / name / "config.json")
        assert config["rope_theta"] == loaded.config.rope_theta
        assert config["rope_scaling"] == FAMILIES[family].get("rope_scaling")
        assert config["rope_parameters"]["rope_theta"] == loaded.config.rope_theta
        del config["rope_parameters"]                         # what transformers 4 itself writes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert GPT.from_pretrained(tmp_path / name).config == loaded.config


def test_all_end_tokens_are_in_both_files(tmp_path):
    model = tiny(eos_token_id=[1, 2])
    model.save_pretrained(tmp_path / "bare")                  # which had no generation_config.json
    for file in ("config.json", "generation_config.json"):
        assert read(tmp_path / "bare" / file)["eos_token_id"] == [1, 2]
    change(tmp_path / "bare" / "generation_config.json", eos_token_id=[2, 5], top_k=7)
    loaded = GPT.from_pretrained(tmp_path / "bare")
    loaded.config.eos_token_id = [1, 2, 3]
    loaded.save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved" / "config.json")["eos_token_id"] == [1, 2, 3]
    generation = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert generation.eos_token_id == [1, 2, 3, 5] and generation.top_k == 7
    assert end_tokens(None, 3, [4, 3], None) == [3, 4] and end_tokens(None) == []


def test_what_came_with_a_checkpoint_is_saved_with_it(tmp_path):
    source, saved = tmp_path / "theirs", tmp_path / "ours"
    theirs = AutoModelForCausalLM.from_config(config_to_hf(tiny().config), dtype=torch.bfloat16)
    theirs.config.update(dict(bos_token_id=1, pad_token_id=3, eos_token_id=[2, 4]))
    theirs.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[2, 4],
                                                pad_token_id=3)
    theirs.save_pretrained(source)
    words = {w: i for i, w in enumerate("<unk> <s> </s> <pad> one two three four".split())}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="</s>",
        pad_token="<pad>", chat_template="{{ messages[0]['content'] }}").save_pretrained(source)

    GPT.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.get_vocab() == words and tokenizer.eos_token_id == 2
    settings = read(saved / "tokenizer_config.json")          # what transformers 4 needs:
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    chat = [{"role": "user", "content": "two"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "two"
    config = read(saved / "config.json")
    assert config.items() >= read(source / "config.json").items()
    assert config["dtype"] == "bfloat16" and config["bos_token_id"] == 1
    model, ids = AutoModelForCausalLM.from_pretrained(saved), torch.tensor([[4, 5, 6]])
    assert model.dtype == torch.bfloat16 and model.generation_config.max_new_tokens == 5
    assert torch.equal(model.generate(ids, do_sample=False), theirs.generate(ids, do_sample=False))

    GPT.from_pretrained(saved).save_pretrained(saved)         # in place; float32 this time
    assert read(saved / "config.json")["dtype"] == "float32"


# What we load.

def test_the_index_says_which_shards_there_are(tmp_path):
    tiny(num_key_value_heads=2).save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    index = read(tmp_path / "theirs" / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    old = {name: tensor + 1 for name, tensor in load_file(tmp_path / "theirs" / shards[0]).items()}
    save_file(old, tmp_path / "theirs" / "model-00009-of-00009.safetensors")
    save_file(old, tmp_path / "theirs" / "model.safetensors")
    ids = torch.randint(0, 20, (2, 10))
    with torch.no_grad():
        ours = GPT.from_pretrained(tmp_path / "theirs")(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=0)
    (tmp_path / "theirs" / shards[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[0]}"):
        GPT.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("heads", ["another", "equal", "alone"])
def test_a_head_in_the_file_of_a_tied_model_is_read_as_in_transformers(heads, tmp_path):
    tiny().save_pretrained(tmp_path / "files")
    state = load_file(tmp_path / "files" / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embedding.flip(0) if heads == "another" else embedding.clone()
    if heads == "alone":
        del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "files" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 20, (2, 10))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "files")(ids).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = GPT.from_pretrained(tmp_path / "files")
    said = [str(warning.message) for warning in said if "tied" in str(warning.message)]
    assert len(said) == (heads == "another")
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "saved")                  # whose config says what the file has
    assert read(tmp_path / "saved" / "config.json")["tie_word_embeddings"] == (heads != "another")
    assert torch.equal(GPT.from_pretrained(tmp_path / "saved")(ids), ours(ids))


@pytest.mark.parametrize("values, words", [
    ({"model_type": "gpt2"}, "llama, qwen2, qwen3"),
    ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ({"mlp_bias": True}, "bias in the MLP"),
    ({"attention_bias": True}, "bias in o_proj"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
     "rope type 'linear'"),
    ({"hidden_size": 64, "head_dim": 8}, "size mismatch"),
    ({"hidden_size": "wide"}, "cannot be loaded"),
])
def test_what_is_not_supported_is_refused_in_one_line(values, words, tmp_path):
    tiny().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **values)
    with pytest.raises(ValueError, match=words) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, content", [
    ("config.json", b"{"), ("config.json", b"{}"), ("model.safetensors", b"short"),
    ("model.safetensors.index.json", b"{")])
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
