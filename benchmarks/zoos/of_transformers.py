"""Architectures of Hugging Face transformers, and how to build each from a small configuration; cuts nothing."""

import importlib

import torch
from torch import Tensor, nn

__all__ = ["build", "names"]

TASKS = {
    "CausalLM": (
        "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
        "gemma3_text", "phi", "phi3", "stablelm", "starcoder2", "mpt", "codegen", "olmo", "olmo2", "cohere", "granite",
        "mixtral", "qwen2_moe", "mamba", "rwkv", "biogpt", "xglm",
    ),
    "MaskedLM": (
        "bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "mpnet", "xlm-roberta",
        "convbert", "squeezebert", "roformer", "nystromformer", "fnet", "modernbert", "megatron-bert", "camembert",
    ),
    "Seq2SeqLM": (
        "t5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "mt5", "switch_transformers",
    ),
    "ImageClassification": (
        "vit", "beit", "swin", "swinv2", "convnext", "convnextv2", "resnet", "mobilevit", "segformer", "poolformer",
        "dinov2", "pvt", "cvt", "regnet", "mobilenet_v2", "vit_msn", "focalnet",
    ),
}  # fmt: skip
"""Task -> architectures, as transformers names them."""

SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("d_ff", "d_inner", "n_inner"), 128),
    **dict.fromkeys(("d_kv", "head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "moe_intermediate_size"), 64),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 200, "num_labels": 5},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}  # fmt: skip
"""Sizes that make a configuration small; each counts where the configuration has it as a number."""

PLAIN_IMAGES = ("vit", "beit", "dinov2", "vit_msn")
"""Image networks that take the sizes above; the others have stages of several widths, and keep those."""


def names() -> list[str]:
    """List the architectures, task by task."""
    return [name for names in TASKS.values() for name in names]


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build an architecture with random weights, and inputs for its task."""
    library = importlib.import_module("transformers")
    task = next(task for task, names in TASKS.items() if name in names)
    whole = library.AutoConfig.for_model(name)
    takes = task != "ImageClassification" or name in PLAIN_IMAGES
    sizes = {key: size for key, size in SMALL.items() if takes and type(getattr(whole, key, "")) in (int, type(None))}
    sizes |= {"attention_types": [[["global", "local"], 1]]} if name == "gpt_neo" else {}
    config = library.AutoConfig.for_model(name, **sizes)
    config.use_cache = False
    model = getattr(library, f"AutoModelFor{task}").from_config(config)
    if task == "ImageClassification":
        side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
        return model, {"pixel_values": torch.randn(1, 3, side, side)}
    tokens = torch.randint(3, SMALL["vocab_size"], (2, 12))
    return model, {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :7]} if task == "Seq2SeqLM" else {})}
