"""Decoders of Hugging Face without some layers: the logits, decoding with a cache, and what files bring back."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lightning_prune import load_state_dict_, prune_layers
from lightning_prune.model.output_forms import main_output
from lightning_prune.structure.skippable import find_skippable
from lightning_prune.surgery.pass_through import Skipped, passed, skip_of
from lightning_prune.surgery.remove_layers import close_gaps_, remove_layers_
from lightning_prune.surgery.verify_skips import verify_skips

hf = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 100, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 6, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
MIXED = {**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4, "head_dim": 8}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**MIXED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**MIXED)),
}
CASES = st.tuples(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.sampled_from(["", "attention", "rest", "both"]), min_size=4, max_size=4).filter(any),
    st.integers(0, 2**20),
)


def made(name, seed=0):
    """Return a model whose weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    return model


def drawn_skips(depth, gone):
    """Return the layers of a draw: of each decoder layer its attention, the rest of it, or all of it."""
    skips = {}
    for path, layer in depth.layers.items():
        number = int(path.split(".")[2])
        names = path.split(".")[3:]
        kind = "both" if not names else "attention" if "attn" in names[0] else "rest"
        both = gone[number] == "both" and (kind == "both" or ".".join(path.split(".")[:3]) not in depth.layers)
        if gone[number] == kind or both:
            skips[path] = skip_of(layer)
    return skips


def twin_logits(model, skips):
    """Return the logits of the whole model, in which hooks return what layers are given, or nothing for branches."""
    twin = copy.deepcopy(model)
    for path, skip in skips.items():

        def replace(module, args, kwargs, output, skip=skip):
            assert main_output(output) is not None
            return passed(skip, args, kwargs)

        twin.get_submodule(path).register_forward_hook(replace, with_kwargs=True)
    with torch.no_grad():
        return twin(IDS, use_cache=False).logits


def generated(model, use_cache):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use_cache)


@settings(max_examples=15, deadline=None)
@given(CASES)
def test_generation_with_a_cache_is_right(drawn):
    """Any attentions and layers leave with the cache in the outputs; tokens are those of the model without a cache."""
    name, gone, seed = drawn
    model = made(name, seed)
    assert model.config.use_cache
    depth = find_skippable(model, IDS)
    skips = drawn_skips(depth, gone)
    proof = verify_skips(model, IDS, skips)
    if proof.wrong:  # the first entry of the cache is of a kind of which no attention stays
        kinds = model.config.layer_types
        first = [i for i, kind in enumerate(kinds) if kind == kinds[0]]
        assert "with a cache" in proof.wrong and all(gone[i] in ("attention", "both") for i in first)
        assert any(gone[i] not in ("attention", "both") for i in range(len(gone)))
        return
    expected = twin_logits(model, skips)
    remove_layers_(model, skips)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected)
    if any(what not in ("attention", "both") for what in gone):
        assert torch.equal(generated(model, True), generated(model, False))


def test_the_attention_of_the_first_layer_leaves():
    """The entries of the cache are those of the attentions that stay, from the first on."""
    model = made("llama")
    ignored = ["model.layers.*.mlp", *(f"model.layers.{i}" for i in (1, 2, 3))]
    with pytest.warns(UserWarning, match="cannot express"):
        report = prune_layers(model, IDS, 0.1, ignore=ignored, progress=False)
    assert [layer.path for layer in report.removed] == ["model.layers.0.self_attn"] and report.proved
    assert isinstance(model.model.layers[0].self_attn, Skipped)
    assert [model.model.layers[i].self_attn.layer_idx for i in (1, 2, 3)] == [0, 1, 2]
    assert torch.equal(generated(model, True), generated(model, False))


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    again.generation_config.eos_token_id = None
    return again


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(gone=st.sets(st.integers(0, 3), min_size=1, max_size=3), seed=st.integers(0, 2**20))
def test_files_bring_back_the_model_that_is_left(tmp_path_factory, name, gone, seed):
    """Once whole decoder layers are gone, save_pretrained and from_pretrained give the same model, and tokens."""
    model = made(name, seed)
    dense = copy.deepcopy(model)
    depth = find_skippable(model, IDS)
    skips = drawn_skips(depth, ["both" if i in gone else "" for i in range(4)])
    expected = twin_logits(model, skips)
    if verify_skips(model, IDS, skips).wrong:
        return  # asserted above
    remove_layers_(model, skips)
    assert close_gaps_(model, IDS) == ""
    again = saved_and_loaded(model, tmp_path_factory.mktemp("saved"))
    assert again.config.num_hidden_layers == model.config.num_hidden_layers == 4 - len(gone)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected)
        torch.testing.assert_close(model(IDS).logits, expected)
    tokens = generated(model, False)
    for one in (model, again):
        assert torch.equal(generated(one, True), tokens)
    load_state_dict_(model, dense.state_dict())
    assert model.config.num_hidden_layers == 4 and torch.equal(generated(model, True), generated(dense, True))


def test_parts_of_layers_are_said_not_to_be_in_the_config():
    """Where the attention alone is gone, a warning says that from_pretrained makes it anew, and how to save instead."""
    model = made("llama")
    ignored = ["model.layers.*.mlp", *(f"model.layers.{i}" for i in (1, 2, 3))]
    with pytest.warns(UserWarning, match=r"model.layers.0.self_attn is removed.* Save the state dict by torch.save"):
        report = prune_layers(model, IDS, 0.1, ignore=ignored, progress=False)
    assert "LlamaConfig" in report.config
    again = type(model)(model.config)
    again.generation_config.eos_token_id = None
    load_state_dict_(again.eval(), model.state_dict())
    assert torch.equal(generated(again, True), generated(model, False))
