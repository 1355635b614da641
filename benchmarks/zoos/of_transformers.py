"""Architectures of Hugging Face transformers, and how to build each from a small configuration; cuts nothing."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build", "names"]

TASKS = {
    "CausalLM": (
        "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
        "gemma3_text", "phi", "phi3", "stablelm", "starcoder2", "mpt", "codegen", "olmo", "olmo2", "cohere", "granite",
        "mixtral", "qwen2_moe", "mamba", "rwkv", "biogpt", "xglm", "falcon", "gpt_bigcode", "gpt_oss", "jamba",
        "mamba2", "falcon_mamba", "falcon_h1", "recurrent_gemma", "phimoe", "cohere2", "openai-gpt", "ctrl", "nemotron",
        "persimmon", "lfm2", "smollm3", "glm4", "olmoe", "granitemoe", "llama4_text", "exaone4", "qwen3_moe",
        "qwen3_next", "diffllama", "jetmoe", "minimax", "xlstm", "bitnet",
    ),
    "MaskedLM": (
        "bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "mpnet", "xlm-roberta",
        "convbert", "squeezebert", "roformer", "nystromformer", "fnet", "modernbert", "megatron-bert", "camembert",
        "funnel", "big_bird", "esm", "longformer", "mobilebert", "layoutlm", "flaubert", "xlm", "rembert", "ibert",
        "yoso", "mra", "nomic_bert", "eurobert",
    ),
    "Seq2SeqLM": (
        "t5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "mt5", "switch_transformers", "led",
        "longt5", "mvp", "prophetnet", "nllb-moe", "umt5", "bigbird_pegasus", "plbart", "pegasus_x", "fsmt",
    ),
    "ImageClassification": (
        "vit", "beit", "swin", "swinv2", "convnext", "convnextv2", "resnet", "mobilevit", "segformer", "poolformer",
        "dinov2", "pvt", "cvt", "regnet", "mobilenet_v2", "vit_msn", "focalnet", "deit", "levit", "bit", "efficientnet",
        "hiera", "mobilenet_v1", "mobilevitv2", "pvt_v2", "siglip", "swiftformer", "data2vec-vision",
        "dinov2_with_registers", "hgnet_v2", "ijepa", "textnet", "donut-swin",
    ),
    "AudioClassification": ("wav2vec2", "hubert", "wavlm", "sew", "sew-d", "unispeech", "wav2vec2-conformer"),
    "SpeechSeq2Seq": ("whisper",),
    "ObjectDetection": ("detr", "yolos", "conditional_detr", "deformable_detr", "rt_detr", "dab-detr"),
    "SemanticSegmentation": ("dpt", "upernet"),
    "DepthEstimation": ("glpn", "depth_anything"),
    "ContrastiveLearning": ("clip",),
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

OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None},
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64},
    "fsmt": {"src_vocab_size": 200, "tgt_vocab_size": 200},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_hidden_layers": None},
}
"""What a configuration needs beside or instead of these sizes; none that are None."""

WHOLE = ("ImageClassification", "ObjectDetection", "SemanticSegmentation", "DepthEstimation", "ContrastiveLearning")
"""Tasks whose architectures have stages of several widths, and keep the sizes they bring."""

PLAIN = ("vit", "beit", "dinov2", "vit_msn", "deit", "ijepa", "data2vec-vision", "dinov2_with_registers")
"""Architectures of these tasks that take the sizes above all the same."""

CLASSES = {
    "deit": "DeiTForImageClassification", "levit": "LevitForImageClassification", "clip": "CLIPModel",
}  # fmt: skip
"""Architectures that transformers has no class of this task for, or several."""


def names() -> list[str]:
    """List the architectures, task by task."""
    return [name for names in TASKS.values() for name in names]


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build an architecture with random weights, and inputs for its task."""
    library = importlib.import_module("transformers")
    task = next(task for task, names in TASKS.items() if name in names)
    whole = library.AutoConfig.for_model(name)
    takes = task not in WHOLE or name in PLAIN
    sizes = {key: size for key, size in SMALL.items() if takes and _has(whole, key)}
    sizes = {key: size for key, size in {**sizes, **OWN.get(name, {})}.items() if size is not None}
    config = library.AutoConfig.for_model(name, **sizes)
    config.use_cache = False
    own = CLASSES.get(name)
    model = (
        getattr(library, f"AutoModelFor{task}").from_config(config) if own is None else getattr(library, own)(config)
    )
    return model, _INPUTS.get(task, _image)(config)


def _has(config: Any, key: str) -> bool:
    """Tell whether a configuration has a number of this name that can be set."""
    computed = getattr(type(config), key, None)
    settable = not isinstance(computed, property) or computed.fset is not None
    return settable and type(getattr(config, key, "")) in (int, type(None))


def _tokens(config: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, SMALL["vocab_size"], (2, 12))}


def _two_texts(config: Any) -> dict[str, Tensor]:
    tokens = torch.randint(3, SMALL["vocab_size"], (2, 12))
    return {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]}


def _image(config: Any) -> dict[str, Tensor]:
    side = min(config.image_size, 224) if isinstance(getattr(config, "image_size", None), int) else 224
    return {"pixel_values": torch.randn(1, 3, side, side)}


def _sound(config: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 8000)}


def _spectrum_and_text(config: Any) -> dict[str, Tensor]:
    spectrum = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": spectrum, "decoder_input_ids": torch.randint(3, SMALL["vocab_size"], (1, 7))}


_INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "CausalLM": _tokens, "MaskedLM": _tokens, "Seq2SeqLM": _two_texts, "AudioClassification": _sound,
    "SpeechSeq2Seq": _spectrum_and_text, "ContrastiveLearning": lambda config: {**_tokens(config), **_image(config)},
}  # fmt: skip
"""Task -> what makes its inputs, where that is not an image."""
