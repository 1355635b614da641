"""Mixtures of experts of Hugging Face without some experts: logits of twins built by config, files, generation."""

import copy

import pytest
import torch

from lightning_prune import PruningError, load_state_dict_
from lightning_prune.pruning.experts import prune_experts

hf = pytest.importorskip("transformers")

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    **COMMON, "num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 16, "moe_intermediate_size": 16,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
NARROW = {"intermediate_size": 16, "moe_intermediate_size": 16}
KINDS = {  # class, config, and how that names the number of experts
    "Mixtral": ({**COMMON, "intermediate_size": 16}, "num_local_experts"),
    "Qwen2Moe": ({**COMMON, **NARROW, "shared_expert_intermediate_size": 16}, "num_experts"),
    "Qwen3Moe": ({**COMMON, **NARROW, "head_dim": 4}, "num_experts"),
    "Olmoe": ({**COMMON, "intermediate_size": 16}, "num_experts"),
    "GptOss": ({**COMMON, "intermediate_size": 16, "head_dim": 4}, "num_local_experts"),
    "DeepseekV3": ({**DEEPSEEK, "n_group": 1, "topk_group": 1}, "n_routed_experts"),
    "DeepseekV3 in groups": ({**DEEPSEEK, "n_group": 2, "topk_group": 1}, "n_routed_experts"),
    "GraniteMoe": ({**COMMON, "intermediate_size": 16}, "num_local_experts"),
    "Phimoe": ({**COMMON, "intermediate_size": 16}, "num_local_experts"),
}


def made(kind, experts=8):
    """Return a model of one kind with random weights, vectors and corrections; skip where this version lacks it."""
    name, (settings, field) = kind.split()[0], KINDS[kind]
    if not hasattr(hf, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**settings, **{field: experts})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(0, 0.3 if tensor.dim() > 1 else 0.05)
    model.generation_config.eos_token_id = None
    return model


def twin_of(kind, dense, report):
    """Build a model by config with fewer experts, and copy the tensors of those that are kept."""
    twin = made(kind, report.groups[0].after)
    own = twin.state_dict()
    for name, tensor in dense.state_dict().items():
        layer = ".".join(name.split(".")[:3])
        if own[name].shape != tensor.shape:
            router = next(kept for other, kept in report.kept.items() if other.startswith(f"{layer}."))
            tensor = tensor[router[0]]
        own[name].copy_(tensor)
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_models_are_those_of_smaller_configs(kind, tmp_path):
    """Logits are those of the twin; files bring back the same model, and it generates the same."""
    model = made(kind)
    dense, other = copy.deepcopy(model), made(kind)
    report = prune_experts(model, {"input_ids": IDS}, 0.25)
    assert report.proved and report.config == ""
    assert {(group.before, group.after) for group in report.groups} == {(8, 6)} and len(report.groups) == 2
    twin = twin_of(kind, dense, report)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    told = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(again.generate(IDS, **told), twin.generate(IDS, **told))
    load_state_dict_(other, model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert getattr(other.config, KINDS[kind][1]) == 6


def test_losses_that_balance_experts():
    """The pruned model trains with the loss that balances experts; as an output that is another loss, and refused.

    It adds up experts of the same number over layers, and each layer keeps others.
    """
    model = made("Mixtral")
    with pytest.raises(PruningError, match="since of what lies outside of mixtures"):
        prune_experts(model, {"input_ids": IDS, "output_router_logits": True}, 0.5)
    assert prune_experts(model, {"input_ids": IDS}, 0.5).proved
    out = model.train()(input_ids=IDS, output_router_logits=True, labels=IDS)
    assert out.router_logits[0].shape[-1] == 4 and torch.isfinite(out.aux_loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_half_precision(kind):
    """Weights of bfloat16 are pruned as others: rounding changes no choice where outputs are compared."""
    model = made(kind).bfloat16()
    assert prune_experts(model, {"input_ids": IDS}, 0.5).proved
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def switch(kind="EncoderModel", sparse=1):
    """A Switch Transformer, whose experts are named in a dict, with random weights."""
    if not hasattr(hf, "SwitchTransformersConfig"):
        pytest.skip("no Switch Transformers here")
    config = hf.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=6,
        num_sparse_encoder_layers=sparse, num_sparse_decoder_layers=sparse, expert_capacity=64, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(hf, f"SwitchTransformers{kind}")(config).eval()


def test_experts_in_a_dict(tmp_path):
    """The config follows where experts are named in a dict: files and state dicts bring back the same model."""
    model, other = switch(), switch()
    report = prune_experts(model, {"input_ids": IDS}, 2)
    assert report.proved and report.groups[0].after == 4 and report.config == ""
    assert model.config.num_experts == 4
    model.save_pretrained(tmp_path)
    load_state_dict_(other, model.state_dict())
    assert other.config.num_experts == 4
    for again in (other, type(model).from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            one, two = model(input_ids=IDS), again(input_ids=IDS)
        assert torch.equal(one.last_hidden_state, two.last_hidden_state)
    again = prune_experts(other, {"input_ids": IDS}, 1)  # of what was loaded
    assert again.config == "" and other.config.num_experts == 3


def test_encoder_and_decoder_with_experts_in_dicts(tmp_path):
    """All mixtures of a model for generation follow one number; where some are kept, a warning says what to do."""
    model = switch("ForConditionalGeneration")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    report = prune_experts(model, inputs, 0.5)
    assert report.config == "" and {group.after for group in report.groups} == {3} and len(report.groups) > 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, again(**inputs).logits)
    told = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **told), again.generate(IDS, **told))
    model, other = switch("ForConditionalGeneration"), switch("ForConditionalGeneration")
    with pytest.warns(UserWarning, match="Remove as many experts of every mixture, or save the state dict"):
        report = prune_experts(model, inputs, 0.5, ignore=["decoder"])
    assert "cannot express this cut" in report.config and model.config.num_experts == 6
    load_state_dict_(other, model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, other(**inputs).logits)
