"""Which networks other libraries bring, and how to build each with random weights and small inputs; cuts nothing."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ZOOS", "Inputs", "Zoo"]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Zoo:
    """Names of networks, and how to build one with its example inputs."""

    names: Callable[[], list[str]]
    build: Callable[[str], tuple[nn.Module, Inputs]]


def _torchvision_names() -> list[str]:
    """List classification, segmentation and video; detection calls operators that a build without a GPU lacks."""
    models = importlib.import_module("torchvision.models")
    kinds = (models, models.segmentation, models.video)
    return [name for kind in kinds for name in models.list_models(module=kind)]


def _torchvision(name: str) -> tuple[nn.Module, Tensor]:
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(name).__module__.split(".")[2]
    arguments: dict[str, Any] = {"weights_backbone": None} if kind == "segmentation" else {}
    model = models.get_model(name, weights=None, **arguments)
    if kind == "video":
        side = 224 if name.startswith(("mvit", "swin", "s3d")) else 112
        return model, torch.randn(1, 3, 16, side, side)
    side = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, side, side)


_TRANSFORMERS = {
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

_SMALL: dict[str, int] = {
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

_PLAIN_IMAGES = ("vit", "beit", "dinov2", "vit_msn")
"""Image networks that take the sizes above; the others have stages of several widths, and keep those."""


def _transformers_names() -> list[str]:
    return [name for names in _TRANSFORMERS.values() for name in names]


def _transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    library = importlib.import_module("transformers")
    task = next(task for task, names in _TRANSFORMERS.items() if name in names)
    whole = library.AutoConfig.for_model(name)
    takes = task != "ImageClassification" or name in _PLAIN_IMAGES
    sizes = {key: size for key, size in _SMALL.items() if takes and type(getattr(whole, key, "")) in (int, type(None))}
    sizes |= {"attention_types": [[["global", "local"], 1]]} if name == "gpt_neo" else {}
    config = library.AutoConfig.for_model(name, **sizes)
    config.use_cache = False
    model = getattr(library, f"AutoModelFor{task}").from_config(config)
    if task == "ImageClassification":
        side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
        return model, {"pixel_values": torch.randn(1, 3, side, side)}
    tokens = torch.randint(3, _SMALL["vocab_size"], (2, 12))
    return model, {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :7]} if task == "Seq2SeqLM" else {})}


ZOOS = {
    "torchvision": Zoo(_torchvision_names, _torchvision),
    "transformers": Zoo(_transformers_names, _transformers),
}
