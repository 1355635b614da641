"""Small integers as compressed bytes, by the standard library, and back; knows no file."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["compress", "decompress", "distances", "places"]

_FAR = 255  # a byte that says: so many places further, and no entry yet
# Symbols are taken for independent, so the coder's contexts, of positions and of the byte before, only cost.
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**20}]


def compress(numbers: Tensor, least: int = 0) -> Tensor:
    """Compress integers from 0 to 255 into the smallest of three streams: bytes, Huffman's code, LZMA's range coder.

    Args:
        numbers: Integers of any shape.
        least: Bytes that the stream shall have at least, if one of the three has as many.

    Returns:
        Bytes, ``(n,)`` uint8 on the CPU; the first names the coder.

    Examples:
        >>> decompress(compress(torch.tensor([3, 3, 1])), 3)
        tensor([3, 3, 1], dtype=torch.uint8)
    """
    raw = numbers.cpu().to(torch.uint8).contiguous().view(-1).numpy().tobytes()
    found = [bytes([coder]) + encode(raw) for coder, (encode, _) in enumerate(_CODERS)]
    allowed = [stream for stream in found if len(stream) >= least]
    return torch.frombuffer(bytearray(min(allowed or found, key=len)), dtype=torch.uint8)


def decompress(stream: Tensor, most: int) -> Tensor:
    """Undo :func:`compress`.

    Args:
        stream: Bytes, ``(n,)`` uint8.
        most: How many integers there are at most.

    Returns:
        Integers, ``(m,)`` uint8.

    Raises:
        ValueError: If the stream is damaged, or holds more.
    """
    if stream.dtype != torch.uint8 or stream.dim() != 1 or not len(stream) or int(stream[0]) >= len(_CODERS):
        raise ValueError("no compressed stream")
    data = stream.cpu().numpy().tobytes()
    try:
        raw = _CODERS[data[0]][1](data[1:], most + 1)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"a damaged stream ({error})") from None
    if len(raw) > most:
        raise ValueError("a stream that is too long")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def distances(present: Tensor) -> Tensor:
    """Return how many places lie before each entry that is present, since the last; far ones in several bytes.

    Args:
        present: Booleans, ``(n,)``.

    Returns:
        Bytes, ``(m,)`` uint8.

    Examples:
        >>> distances(torch.tensor([False, False, True, True]))
        tensor([2, 0], dtype=torch.uint8)
    """
    at = present.cpu().numpy().nonzero()[0]
    gaps = np.diff(at, prepend=-1) - 1
    steps, rest = np.divmod(gaps, _FAR)
    found = np.full(len(gaps) + int(steps.sum()), _FAR, dtype=np.uint8)
    found[np.cumsum(steps + 1) - 1] = rest
    return torch.from_numpy(found)


def places(found: Tensor, size: int) -> Tensor:
    """Undo :func:`distances`.

    Args:
        found: Bytes, ``(m,)`` uint8.
        size: How many places there are.

    Returns:
        Booleans, ``(size,)``.

    Raises:
        ValueError: If an entry lies beyond the last place.
    """
    gaps = found.numpy().astype(np.int64)
    ends = gaps != _FAR
    at = np.cumsum(gaps + ends)[ends] - 1
    if len(at) and at[-1] >= size:
        raise ValueError("an entry beyond the last place")
    present = np.zeros(size, dtype=bool)
    present[at] = True
    return torch.from_numpy(present)


def _huffman(raw: bytes) -> bytes:
    coder = zlib.compressobj(level=9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def _from_huffman(data: bytes, most: int) -> bytes:
    coder = zlib.decompressobj(wbits=-15)
    raw = coder.decompress(data, most)
    if len(raw) < most and not coder.eof:
        raise EOFError("it ends too early")
    return raw


def _range_coded(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_LZMA)


def _from_range_coded(data: bytes, most: int) -> bytes:
    coder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA)
    raw = coder.decompress(data, most)
    if len(raw) < most and not coder.eof:
        raise EOFError("it ends too early")
    return raw


_CODERS: list[tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]] = [
    (lambda raw: raw, lambda data, most: data[:most]),
    (_huffman, _from_huffman),
    (_range_coded, _from_range_coded),
]
"""How to write and how to read; a stream begins with the place of its coder here."""
