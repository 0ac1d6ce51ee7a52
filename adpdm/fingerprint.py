"""Fingerprints of what a result depends on: tensors by their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """sha256 in hexadecimal digits over names, dtypes, shapes and bytes, after the words of `start`."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named_tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """Tensors in nested dicts and lists, with their paths, in one order."""
    return [(keystr(path), x) for path, x in tree_flatten_with_path(tree)[0] if isinstance(x, Tensor)]
