"""Float parts of transformers that run in fewer passes: what diffusers computes, and when they stand back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, PatchEmbed, TimestepEmbedding
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from adpdm import ops
from adpdm.nn import fuse_blocks, unfused
from adpdm.nn.embedding_blocks import embedding_rows, rows_of_block
from adpdm.nn.fusion import FusedBlock

pytestmark = pytest.mark.skipif(
    not ops.HAS_FAST_EMBEDDING, reason="wanted a CPU level with FMA: without, torch's operators run"
)


class Host(nn.Module):
    """A denoiser with one such part."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        generator = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            fan_in = max(parameter[0].numel(), 1)
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        self.eval().requires_grad_(False)
        fuse_blocks(self)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(*args, **kwargs)  # type: ignore[no-any-return]


def embedding() -> Host:
    return Host(CombinedTimestepLabelEmbeddings(10, 24))


def times(**changes: Any) -> Host:
    return Host(TimestepEmbedding(**{"in_channels": 20, "time_embed_dim": 24, **changes}))


def patches(**changes: Any) -> Host:
    settings = {"height": 12, "width": 12, "patch_size": 4, "in_channels": 3, "embed_dim": 20, **changes}
    return Host(PatchEmbed(**settings))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


TIMES, LABELS = torch.tensor([3, 700]), torch.tensor([1, 10])
CASES: dict[str, tuple[Callable[[], Host], tuple[Any, ...]]] = {
    "embedding": (embedding, (TIMES, LABELS, torch.float32)),
    "embedding of one timestep": (embedding, (TIMES[:1], LABELS, torch.float32)),
    "embedding of expanded ones": (
        embedding,
        (TIMES[:1].expand(3), LABELS[:1].expand(3), torch.float32),
    ),
    "timesteps": (times, (randn(3, 20),)),
    "timesteps that are the same": (times, (randn(1, 20).repeat(3, 1),)),
    "timesteps to another width, no bias": (
        lambda: times(out_dim=7, sample_proj_bias=False),
        (randn(1, 20),),
    ),
    "patches": (patches, (randn(2, 3, 12, 12),)),
    "patches, channels last": (
        patches,
        (randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last),),
    ),
    "patches, all channels last": (
        lambda: patches().to(memory_format=torch.channels_last),
        (randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last),),
    ),
    "patches without positions": (lambda: patches(pos_embed_type=None), (randn(2, 3, 8, 16),)),
    "patches without bias": (lambda: patches(bias=False), (randn(1, 3, 12, 12),)),
}


def assert_same_function(host: Host, args: tuple[Any, ...]) -> None:
    """Sums of at most 256 products in another order: some roundings of values around 1."""
    fused = host(*args)
    with unfused(host):
        wanted = host(*args)
    assert fused.dtype == wanted.dtype
    torch.testing.assert_close(fused.double(), wanted.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_float_block_computes_what_diffusers_computes(name: str, no_fallback: None) -> None:
    make, args = CASES[name]
    assert_same_function(make(), args)


def hooked(host: Host) -> Host:
    (host.block.timestep_embedder.linear_2).register_forward_hook(lambda m, args, y: y + 1)  # type: ignore
    return host


def replaced(host: Host) -> Host:
    host.block.timestep_embedder.linear_1 = nn.Linear(256, 24).requires_grad_(False)  # type: ignore
    return host


STAND_BACK: dict[str, tuple[Callable[[], Host], tuple[Any, ...]]] = {
    "bfloat16 wanted of float32": (
        lambda: embedding().to(torch.bfloat16),
        (TIMES, LABELS, torch.bfloat16),
    ),
    "a hook": (lambda: hooked(embedding()), (TIMES, LABELS, torch.float32)),
    "another layer": (lambda: replaced(embedding()), (TIMES, LABELS, torch.float32)),
    "one label for two timesteps": (embedding, (TIMES, LABELS[:1], torch.float32)),
    "labels of int32": (embedding, (TIMES, LABELS.int(), torch.float32)),
    "timesteps with a condition": (lambda: times(cond_proj_dim=5), (randn(2, 20), randn(2, 5))),
    "expanded timesteps": (times, (randn(1, 20).expand(3, -1),)),
    "positions of another size": (patches, (randn(1, 3, 8, 16),)),
    "a part of a patch left over": (lambda: patches(pos_embed_type=None), (randn(1, 3, 14, 12),)),
    "weights of bfloat16": (
        lambda: patches(pos_embed_type=None).to(torch.bfloat16),
        (randn(1, 3, 12, 12).bfloat16(),),
    ),
}


@pytest.mark.parametrize("name", STAND_BACK)
def test_float_block_stands_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, args = STAND_BACK[name]
    host, calls = make(), []
    per_layer = FusedBlock.per_layer
    monkeypatch.setattr(
        FusedBlock, "per_layer", lambda self, *a: calls.append(self.block) or per_layer(self, *a)
    )
    assert_same_function(host, args)
    assert calls[0] is host.block  # then, it may be, what is inside
    assert calls.count(host.block) == 1


@pytest.mark.parametrize(
    "block",
    [
        PatchEmbed(12, 12, 4, 3, 20, layer_norm=True),
        PatchEmbed(12, 12, 4, 3, 20, flatten=False),
        PatchEmbed(12, 12, 4, 3, 20, pos_embed_max_size=8),
    ],
)
def test_patches_of_other_settings_are_left_alone(block: nn.Module) -> None:
    assert not isinstance(Host(block).block.__dict__.get("forward"), FusedBlock)


@pytest.mark.parametrize("changes", [{"act_fn": "gelu"}, {"post_act_fn": "silu"}])
def test_timesteps_of_other_settings_are_left_alone(changes: dict[str, str]) -> None:
    assert not isinstance(times(**changes).block.__dict__.get("forward"), FusedBlock)


class Counted(nn.Linear):
    """What PEFT would put in place of a layer."""


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", [nn.Linear, Counted])
def test_rows_of_block_are_those_of_the_norm(images: int, kind: type[nn.Linear]) -> None:
    norm = AdaLayerNormZero(8)
    norm.linear = kind(8, 48)
    vector, x = randn(1, 8), randn(images, 5, 8)
    first, second = rows_of_block(norm, vector, images)
    modulation, gate, modulation2, gate2 = first.modulation, first.gate, second.modulation, second.gate
    wanted, *others = norm(x, emb=vector)
    scale, shift = modulation[:, None].chunk(2, 2)
    torch.testing.assert_close(norm.norm(x) * (1 + scale) + shift, wanted)
    scale2, shift2 = modulation2.chunk(2, 1)
    for row, other in zip((gate, shift2, scale2, gate2), others, strict=True):
        torch.testing.assert_close(row, other.expand(images, -1))
        assert row.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Counted])
def test_embedding_rows_are_those_of_the_layer(kind: type[nn.Linear], silu: bool) -> None:
    layer, embedding = kind(8, 12), randn(3, 8)
    wanted = layer(nn.functional.silu(embedding) if silu else embedding)
    torch.testing.assert_close(embedding_rows(layer, embedding, silu), wanted)


def test_gradient_of_timesteps_passes() -> None:
    sample = randn(2, 20).requires_grad_()
    times().block(sample).sum().backward()
    assert sample.grad is not None
    assert sample.grad.abs().max() > 0
