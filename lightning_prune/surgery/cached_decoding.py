"""Checks that a Hugging Face decoder computes the same with a cache as without, so that ``generate`` is right."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.model.calls import ExampleInputs, run, same_draws, tensors_in
from lightning_prune.model.errors import reraise_out_of_memory
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.surgery.configs import pretrained_models
from lightning_prune.surgery.skipped import temporarily_skipped

_CACHES = ("past_key_values", "cache")  # what transformers call it
_SOURCES = ("decoder_input_ids", "input_ids")  # tokens that are decoded
_TOLERANCE = 1e-3  # of the largest output: other kernels may run on one token than on many


def cache_is_wrong(model: nn.Module, example_inputs: ExampleInputs, skips: Mapping[str, dict[str, Any]]) -> str:
    """Say how decoding with a cache differs from decoding without one once some layers are gone, if it does.

    The second half of the tokens is decoded with the cache of the first half. Models in which these differ with all
    their layers are not judged, nor those that are given no tokens.

    Args:
        model: The model with all its layers; it is left as found.
        example_inputs: What it runs on.
        skips: Path of a layer -> what is returned in its place.
    """
    for path, decoder in pretrained_models(model):
        names = inspect.signature(decoder.forward).parameters
        cache = next((name for name in _CACHES if name in names), None)
        if cache is None or "use_cache" not in names:
            continue
        given = _given(model, decoder, example_inputs)
        if given is None:
            continue
        with temporarily_skipped(model, skips):
            wrong = _difference(model, decoder, given, cache)
        if wrong and not _difference(model, decoder, given, cache):
            return f"with a cache {path or 'the model'} computes something else: {wrong}"
    return ""


def _given(model: nn.Module, decoder: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any] | None:
    """Return what a decoder is called with, by name; None if that holds no two tokens."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        calls.append({**named, **named.pop("kwargs", {})})

    with undisturbed(model, example_inputs), same_draws():
        decoder.register_forward_pre_hook(note, with_kwargs=True)
        run(model, example_inputs)
    if not calls:
        return None
    given = {name: value for name, value in calls[0].items() if name not in (*_CACHES, "use_cache", "labels")}
    tokens = _tokens(given)
    return given if tokens is not None and tokens.shape[1] > 1 else None


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens to decode, ``(batch, length)``."""
    found = next((given[name] for name in _SOURCES if isinstance(given.get(name), Tensor)), None)
    return found if found is not None and found.dim() == 2 else None


def _difference(model: nn.Module, decoder: nn.Module, given: Mapping[str, Any], cache: str) -> str:
    """Say how outputs on the second half of the tokens differ with a cache, if they do."""
    tokens = _tokens(given)
    assert tokens is not None  # asked for before
    half = tokens.shape[1] // 2
    first, second = dict(given), dict(given)
    for name, value in given.items():
        alike = isinstance(value, Tensor) and value.shape[:2] == tokens.shape and value.dim() == 2
        if alike and (value is tokens or "decoder_input_ids" not in given or name.startswith("decoder_")):
            first[name] = value[:, :half]
            if "mask" not in name:  # which is of all tokens that were seen
                second[name] = value[:, half:]
    try:
        with undisturbed(model, given), same_draws():
            whole = _output(decoder(**given, use_cache=False), tokens.shape[1])
            held = getattr(decoder(**first, use_cache=True), cache, None)
            if whole is None or held is None:
                return ""
            part = _output(decoder(**second, **{cache: held}, use_cache=True), tokens.shape[1] - half)
    except Exception as error:
        reraise_out_of_memory(error)
        return f"{type(error).__name__}: {error}"
    if part is None:
        return "outputs have another shape"
    apart = (part - whole[:, half:]).abs().max() / whole.abs().max().clamp(min=torch.finfo(whole.dtype).tiny)
    return "" if apart <= _TOLERANCE else f"outputs differ by {float(apart):.2g} of the largest"


def _output(outputs: Any, length: int) -> Tensor | None:
    """Return the first output with numbers for each token, ``(batch, length, ...)``."""
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point() and tensor.dim() >= 3 and tensor.shape[1] == length:
            return tensor
    return None
