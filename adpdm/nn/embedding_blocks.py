"""Float parts of transformers in fewer passes on the CPU: embeddings, rows they make of a block, patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .fusion import FusedBlock, fuses


def _reads(*tensors: Tensor | None) -> bool:
    """Whether the kernels read these where they lie."""
    return all(x is None or (_is_of_kernels(x) and x.is_contiguous()) for x in tensors)


def _is_of_kernels(x: Tensor) -> bool:
    return ops.HAS_FAST_EMBEDDING and x.dtype == torch.float32 and x.device.type == "cpu"


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody looks at a module, or has changed it: adapters, hooks, offloading."""
    state = module.__dict__
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
    return type(module) is kind and not hooked


def embedding_rows(
    layer: Any,  # nn.Linear, or what was put in its place
    embedding: Tensor,  # [N, D] float
    silu: bool = True,
) -> Tensor:
    """Rows layer(silu(embedding)) [N, O] f32 of the images of a batch."""
    if silu and _is_plain(layer, nn.Linear) and _reads(embedding, layer.weight, layer.bias):
        return ops.silu_linear(embedding, layer)
    return layer(F.silu(embedding) if silu else embedding).float()  # type: ignore[no-any-return]


@fuses("TimestepEmbedding")
class FusedTimestepEmbedding(FusedBlock):
    """Two layers with SiLU between them in one call."""

    is_float = True

    def inspect(self) -> None:
        b: Any = self.block
        self.first: nn.Linear = self.skip("linear_1", nn.Linear)
        self.skip("act", nn.SiLU)
        self.second: nn.Linear = self.skip("linear_2", nn.Linear)
        self.require(b.post_act is None, "it has an activation at its end")

    def __call__(self, sample: Tensor, condition: Tensor | None = None) -> Any:
        first, second = self.first, self.second
        weights = (first.weight, first.bias, second.weight, second.bias)
        plain = condition is None and sample.dim() == 2
        if not plain or not _reads(sample, *weights) or not self.applies(sample):
            return self.per_layer(sample, condition)
        return ops.timestep_embedding(sample, first, second)


@fuses("CombinedTimestepLabelEmbeddings")
class FusedClassEmbedding(FusedBlock):
    """Sinusoids through two layers, and the row of the class added, in one call."""

    is_float = True

    def inspect(self) -> None:
        b: Any = self.block
        times = self.contain("timestep_embedder")
        self.require(isinstance(times, FusedTimestepEmbedding), "its timestep_embedder is another")
        self.first: nn.Linear = times.first
        self.second: nn.Linear = times.second
        self.skip("class_embedder", type(b.class_embedder))
        self.require(type(b.class_embedder).__name__ == "LabelEmbedding", "its class_embedder is another")
        self.table: nn.Embedding = self.skip("class_embedder.embedding_table", nn.Embedding)
        self.require(self.table.max_norm is None, "its table is normalized")

    def __call__(
        self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Any:
        first, second, table = self.first, self.second, self.table.weight
        weights = (first.weight, first.bias, second.weight, second.bias, table)
        rows = class_labels.shape[0] if class_labels.dim() == 1 else 0
        fits = class_labels.dtype == torch.int64 and timestep.shape[0] in (1, rows)
        if not fits or hidden_dtype != torch.float32 or not _reads(*weights) or not self.applies():
            return self.per_layer(timestep, class_labels, hidden_dtype)
        block: Any = self.block
        waves = block.time_proj(timestep).to(hidden_dtype)
        return ops.timestep_embedding(waves, first, second, table, class_labels.contiguous())


@dataclass(frozen=True)
class Adaptive:
    """What the embedding of timestep and condition makes of a part of a block."""

    modulation: Tensor | None = None  # [N, 2C] f32, scale and shift of its norm
    gate: Tensor | None = None  # [N, C] f32, of its result


PLAIN = Adaptive()


def rows_of_block(
    norm: Any,  # AdaLayerNormZero, or one of as many parts as its layer gives rows for
    embedding: Tensor,  # [N or 1, D] float
    images: int,
) -> list[Adaptive]:
    """Rows of N images for each part of a block, attention and the feed-forward net, say."""
    layer = norm.linear
    parts = layer.out_features // (3 * norm.norm.normalized_shape[0])
    if parts == 2 and _is_plain(layer, nn.Linear) and _is_plain(norm.silu, nn.SiLU):
        rows = embedding if len(embedding) == images else embedding.expand(images, -1)
        rows = rows.contiguous()
        if _reads(rows, layer.weight, layer.bias):
            first, first_gate, second, second_gate = ops.adaptive_rows(rows, layer)
            return [Adaptive(first, first_gate), Adaptive(second, second_gate)]
    rows = layer(norm.silu(embedding)).float().expand(images, -1)
    return adaptive_parts(rows.unflatten(1, (3 * parts, -1)))


def adaptive_parts(
    rows: Tensor,  # [N, 3 * parts, C] f32: shift, scale and gate of each part in turn
) -> list[Adaptive]:
    """The rows of each part."""
    by_part = rows.unflatten(1, (-1, 3)).unbind(1)
    return [Adaptive(torch.cat([part[:, 1], part[:, 0]], 1), part[:, 2].contiguous()) for part in by_part]


@fuses("PatchEmbed")
class FusedPatches(FusedBlock):
    """The convolution of patches as a matrix product: with so few channels oneDNN takes ten times as long."""

    is_float = True

    def inspect(self) -> None:
        b: Any = self.block
        self.require(b.flatten and not b.layer_norm, "its result is no plain list of tokens")
        self.require(not b.pos_embed_max_size, "it crops positions")
        self.proj: nn.Conv2d = self.skip("proj", nn.Conv2d)
        conv = self.proj
        whole = conv.kernel_size == conv.stride and conv.dilation == (1, 1) and conv.groups == 1
        self.require(whole and conv.padding == (0, 0), "its patches overlap, have gaps or reach out")

    def __call__(self, latent: Tensor) -> Tensor:
        block: Any = self.block
        high, wide = self.proj.kernel_size
        height, width = latent.shape[-2] // high, latent.shape[-1] // wide
        known = block.pos_embed is None or (height, width) == (block.height, block.width)
        whole = latent.dim() == 4 and latent.shape[-2:] == (height * high, width * wide)
        weight, bias = self.proj.weight, self.proj.bias
        readable = _is_of_kernels(weight) and _reads(bias, block.pos_embed)
        if not known or not whole or not readable or not self.applies(latent):
            return self.per_layer(latent)  # type: ignore[no-any-return]
        patches = latent.unflatten(3, (width, wide)).unflatten(2, (height, high))
        # Values of a patch in the order of the weight's memory, which then needs no copy.
        if weight.is_contiguous():
            patches = patches.permute(0, 2, 4, 1, 3, 5)
        else:  # channels_last
            patches, weight = patches.permute(0, 2, 4, 3, 5, 1), weight.permute(0, 2, 3, 1)
        patches = patches.reshape(latent.shape[0], height * width, -1)
        tokens = F.linear(patches, weight.flatten(1), bias)
        return tokens if block.pos_embed is None else tokens + block.pos_embed
