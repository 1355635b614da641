"""Configs of Hugging Face models follow a cut, so that what save_pretrained writes is what from_pretrained builds."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_prune import FilterL1Pruning, load_state_dict_, prune_filters
from tests.runs import trainer

hf = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CAUSAL = {"input_ids": IDS, "use_cache": False}
LLAMA = {
    "vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 96}
VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
DISTIL = {"vocab_size": 100, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 96}
GPT2 = {"vocab_size": 100, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
T5 = {"vocab_size": 100, "d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6,
      "decoder_start_token_id": 0}  # fmt: skip

MODELS = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)), TEXT),
    "distilbert": (lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)), TEXT),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), CAUSAL),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), CAUSAL),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA)), CAUSAL),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)), CAUSAL),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, intermediate_size=96)),
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False},
    ),
}
GENERATING = ("gpt2", "llama", "mistral", "qwen2", "t5")
WIDTHS = {  # what makes hidden units of the feed-forward layers, and the heads
    "bert": ("*.intermediate.dense", "*.self"),
    "distilbert": ("*.ffn.lin1", "*.q_lin"),
    "gpt2": ("*.c_fc", "*.c_attn"),
    "llama": ("*.gate_proj", "*.q_proj"),
    "mistral": ("*.gate_proj", "*.q_proj"),
    "qwen2": ("*.gate_proj", "*.q_proj"),
    "vit": ("*.fc1", "*.q_proj"),
    "t5": ("*.wi", "*.q"),
}


def made(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make().eval(), inputs


def pruned(name, *args, **more):
    model, inputs = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_filters(model, inputs, *args, progress=False, **more)
    return model, inputs, report


def assert_reloads(model, inputs, folder, generates):
    """What is saved is built and loaded again, bit by bit, and generates the same."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    if generates:
        asked = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        assert torch.equal(model.generate(**asked), again.generate(**asked))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "asked",
    [
        {"amount": 0.5},
        {"amount": 0.3, "uniform": True},
        {"amount": 0.4, "uniform": True, "scope": "global"},
        {"amount": 0.4, "uniform": True, "target": "params"},
        {"amount": 0.5, "uniform": True, "target": "flops", "scope": "global"},
    ],
    ids=str,
)
def test_slim_models_are_saved_and_loaded_by_their_own_project(name, asked, tmp_path):
    """With one width for all layers of a kind the config says it, whatever is asked."""
    model, inputs, report = pruned(name, **asked)
    assert report.params_after < report.params_before and not report.config
    other, _ = made(name)
    load_state_dict_(other, model.state_dict())
    assert other.config.to_dict() == model.config.to_dict()
    assert_reloads(model, inputs, tmp_path, name in GENERATING)


@pytest.mark.parametrize("name", MODELS)
def test_one_kind_of_width_alone(name, tmp_path):
    """The hidden width of the feed-forward layers is a field by itself; heads are where their width is another one."""
    wide, heads = WIDTHS[name]
    model, inputs, report = pruned(name, {wide: 0.3})
    assert_reloads(model, inputs, tmp_path / "wide", name in GENERATING)
    model, inputs, report = pruned(name, {heads: 0.4})
    if report.config:
        assert name in ("bert", "distilbert", "gpt2", "vit")
    else:
        assert_reloads(model, inputs, tmp_path / "heads", name in GENERATING)


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_several_widths_are_named(name):
    """A config has one width for all blocks: where blocks differ, it stays as it was, and the layers are named."""
    model, inputs = made(name)
    before = model.config.to_dict()
    wide = WIDTHS[name][0]
    first = next(path for path, _ in model.named_modules() if path.endswith(wide[1:]))
    with pytest.warns(UserWarning, match="cannot express this cut .*uniform=True"):
        report = prune_filters(model, inputs, {first: 0.5}, progress=False)
    assert model.config.to_dict() == before and f"{first}" in report.config
    other, _ = made(name)
    load_state_dict_(other, model.state_dict())
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_a_layer_that_stays_holds_those_of_its_kind():
    """One width for all means that of none where one cannot be pruned, with the reason."""
    _, _, report = pruned("llama", 0.5, uniform=True, ignore=["model.layers.1.mlp.gate_proj"])
    widths = {group.name: (group.before, group.after) for group in report.groups}
    assert "model.layers.0.mlp.gate_proj" not in widths and widths["model.embed_tokens"] == (48, 24)
    reasons = {pin.tensor: pin.reason for pin in report.pinned}
    assert "uniform=True" in reasons["model.layers.0.mlp.gate_proj.weight"]


class Lit(LightningModule):
    """A Hugging Face model as people train it."""

    def __init__(self):
        super().__init__()
        self.net = made("llama")[0]

    def forward(self, ids):
        return self.net(input_ids=ids, use_cache=False).logits

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_configs_follow_in_a_run(tmp_path):
    """After a run of several pruning steps the network inside the module is saved and loaded by its own project."""
    torch.manual_seed(0)
    module = Lit()
    data = torch.utils.data.DataLoader([ids for ids in IDS for _ in range(4)], batch_size=4)
    trainer(FilterL1Pruning(0.5, uniform=True, scope="global"), max_epochs=2).fit(module, data)
    assert module.net.config.hidden_size < 48 or module.net.config.intermediate_size < 96
    assert_reloads(module.net.eval(), CAUSAL, tmp_path, True)
