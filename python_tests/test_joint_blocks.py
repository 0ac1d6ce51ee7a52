"""Fused blocks of Stable Diffusion 3 and Flux: the results of their layers, and that path where asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from fused_blocks import WANTED_DB, frozen, randn, reason_of, sqnr_db
from torch import Tensor, nn
from transformer_cases import STEPS, make_case

import adpdm
from adpdm import QuantConfig, graph
from adpdm.nn import describe_fusion, fuse_blocks, unfused

IMAGE, TEXT, EMBEDDING = randn(2, 7, 16), randn(2, 3, 16, seed=4), randn(2, 16, seed=5)
ANGLES = randn(10, 4, seed=6).repeat_interleave(2, 1)  # of 3 tokens of text and 7 of the image
ROTATION = (ANGLES.cos(), ANGLES.sin())
Make = Callable[[], nn.Module]


def joint(**changes: Any) -> nn.Module:
    return JointTransformerBlock(16, 2, 8, **changes)


def flux(kind: Any) -> nn.Module:
    return kind(16, 2, 8)  # type: ignore[no-any-return]


BLOCKS: dict[str, tuple[Make, dict[str, Any]]] = {
    "stable diffusion 3": (joint, {}),
    "stable diffusion 3, last": (lambda: joint(context_pre_only=True), {}),
    "stable diffusion 3.5": (lambda: joint(qk_norm="rms_norm"), {}),
    "stable diffusion 3.5, two attentions": (
        lambda: joint(qk_norm="rms_norm", use_dual_attention=True),
        {},
    ),
    "flux": (lambda: flux(FluxTransformerBlock), {"image_rotary_emb": ROTATION}),
    "flux without positions": (lambda: flux(FluxTransformerBlock), {}),
    "flux, one sequence": (lambda: flux(FluxSingleTransformerBlock), {"image_rotary_emb": ROTATION}),
}


@torch.no_grad()
def run(host: Any, kwargs: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What the block passes on of text and image."""
    text, image = host.block(IMAGE.to(dtype), TEXT.to(dtype), temb=EMBEDDING.to(dtype), **kwargs)
    return [x for x in (text, image) if x is not None]


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("name", BLOCKS)
def test_joint_block_computes_what_its_layers_compute(
    name: str, bits: tuple[int, int], no_fallback: None
) -> None:
    make, kwargs = BLOCKS[name]
    host = frozen(make(), None, bits)
    for step in range(3):  # three groups
        host.step.set_step(step)
        fused = run(host, kwargs)
        with unfused(host):
            wanted = run(host, kwargs)
        assert [x.shape for x in fused] == [x.shape for x in wanted]
        assert all(sqnr_db(x, y) > WANTED_DB for x, y in zip(fused, wanted, strict=True))
    assert [(info.name, info.fused) for info in describe_fusion(host)] == [("block", True)]


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_of_codes_is_near_that_of_floats(name: str, no_fallback: None) -> None:
    make, kwargs = BLOCKS[name]
    host = frozen(make())
    in_float = run(host, kwargs)
    fuse_blocks(host, attention="int8")
    assert [info.attention for info in describe_fusion(host)] == ["int8"]
    in_int8 = run(host, kwargs)
    assert not torch.equal(in_int8[-1], in_float[-1])
    assert all(sqnr_db(x, y) > 28 for x, y in zip(in_int8, in_float, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])
@pytest.mark.parametrize("name", BLOCKS)
def test_copy_is_independent(name: str, duplicate: Callable[[Any], Any], no_fallback: None) -> None:
    make, kwargs = BLOCKS[name]
    host = frozen(make())
    wanted = run(host, kwargs)
    other = duplicate(host)
    for parameter in host.block.parameters():
        parameter.data.zero_()
    host.step.set_step(1)
    assert all(torch.equal(x, y) for x, y in zip(run(other, kwargs), wanted, strict=True))


@pytest.mark.parametrize("kind", [FluxTransformerBlock, FluxSingleTransformerBlock])
def test_flux_keeps_what_it_passes_on_within_float16(kind: Any, no_fallback: None) -> None:
    host = frozen(flux(kind)).to(torch.float16)
    norm = host.block.norm1_context if kind is FluxTransformerBlock else host.block.norm
    norm.linear.bias.data.fill_(3e4)  # of the gates, among others
    fused = run(host, {}, torch.float16)  # one layer after the other, products with gates would be infinite
    assert fused[0].abs().max() == 65504
    assert all(x.isfinite().all() for x in fused)


# ---- what keeps the path of one layer after the other ------------------------------------------------------


def other_processor(block: Any) -> None:
    kind = type(block.attn.processor)
    block.attn.processor = type("Other", (kind,), {})()


def own_backend(block: Any) -> None:
    block.attn.processor._attention_backend = "native"


def joined_projections(block: Any) -> None:
    block.attn.fused_projections = True


def other_norm(block: Any) -> None:
    block.attn.norm_q = None


def other_processor_of_the_second(block: Any) -> None:
    block.attn2.processor = type("Other", (JointAttnProcessor2_0,), {})()


def hook(block: Any) -> None:
    block.attn.to_q.register_forward_hook(lambda module, args, output: None)


def hook_on_unread_queries(block: Any) -> None:
    block.attn.add_q_proj.register_forward_hook(lambda module, args, output: None)


CHANGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("flux", other_processor, "the processor of attn is Other now"),
    ("stable diffusion 3", other_processor, "the processor of attn is Other now"),
    (
        "stable diffusion 3.5, two attentions",
        other_processor_of_the_second,
        "the processor of attn2 is Other now",
    ),
    ("flux, one sequence", own_backend, "the processor of attn has a backend of its own"),
    ("flux", joined_projections, "attn has joined projections"),
    ("stable diffusion 3.5", other_norm, "norm_q was replaced"),
    ("flux, one sequence", hook, "QuantLinear has hooks"),
    ("stable diffusion 3, last", hook_on_unread_queries, "QuantLinear has hooks"),
    ("stable diffusion 3", lambda block: block.set_chunk_feed_forward(1, 0), ""),
]


@pytest.mark.parametrize(("name", "change", "reason"), CHANGES)
def test_change_after_fusing_takes_the_class_forward(
    name: str, change: Callable[[Any], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = frozen(BLOCKS[name][0]())
    change(host.block)
    assert reason_of(host) == reason  # chunks are a matter of the call
    assert takes_the_class_forward(host, {}, monkeypatch)


def takes_the_class_forward(host: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(host.block.forward, "per_layer", lambda *a, **k: calls.append(1) or (TEXT, IMAGE))
        run(host, kwargs)
    return calls == [1]


@pytest.mark.parametrize("name", ["stable diffusion 3", "flux", "flux, one sequence"])
def test_joint_attention_kwargs_take_the_class_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, kwargs = BLOCKS[name]
    host = frozen(make())
    asked = {**kwargs, "joint_attention_kwargs": {"attention_mask": torch.zeros(10, 10)}}
    asked["joint_attention_kwargs"]["attention_mask"][:, 0] = -1e4  # the first token, seen by nobody
    assert takes_the_class_forward(host, asked, monkeypatch)
    assert not takes_the_class_forward(host, {**kwargs, "joint_attention_kwargs": {}}, monkeypatch)
    fused = run(host, asked)
    with unfused(host):
        wanted = run(host, asked)
    assert all(torch.equal(x, y) for x, y in zip(fused, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["stable diffusion 3", "flux", "flux, one sequence"])
def test_arguments_may_come_by_position(name: str, no_fallback: None) -> None:
    """As in diffusers' forward under gradient checkpointing."""
    make, kwargs = BLOCKS[name]
    host = frozen(make())
    by_position = host.block(IMAGE, TEXT, EMBEDDING, *kwargs.values(), None)
    assert all(torch.equal(x, y) for x, y in zip(by_position, run(host, kwargs), strict=True))


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_gradients_pass_through_the_class_forward_under_checkpointing(name: str) -> None:
    """Inputs of the embeddings want gradients, blocks do not."""
    case = make_case(name)
    settings = QuantConfig(num_groups=1, num_inference_steps=2, histogram_images=3, grouping="shared")
    arguments = {"scheduler": case.scheduler, "conditioning": case.conditioning, "call": case.call}
    adpdm.quantize(case.denoiser, settings, **arguments)
    sampler = case.sampler(case.denoiser)
    run = sampler.run(5, 0, 3)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            case.denoiser.enable_gradient_checkpointing()
        sample = run.samples[0].clone().requires_grad_()
        sampler.predict(sample, sampler.calls[0], run.conditioning).square().sum().backward()
        assert sample.grad is not None
        found.append(sample.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


class _Processor(JointAttnProcessor2_0):
    """One that nobody knows."""


class _FluxProcessor(FluxAttnProcessor):
    """Another."""


@pytest.mark.parametrize(
    ("make", "processor"), [(joint, _Processor), (lambda: flux(FluxSingleTransformerBlock), _FluxProcessor)]
)
def test_unknown_processor_is_named(make: Make, processor: Any) -> None:
    block: Any = make()
    block.attn.processor = processor()
    assert reason_of(frozen(block)) == f"the processor of attn is {processor.__name__}"


# ---- whole denoisers ---------------------------------------------------------------------------------------

OUTSIDE = {
    "pixart": ["caption_projection.linear_1", "caption_projection.linear_2"],
    "sd3": ["context_embedder"],
    "flux": ["context_embedder"],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_denoiser_runs_fused_and_captured(name: str, no_fallback: None) -> None:
    case = make_case(name)
    settings = QuantConfig(
        num_groups=2, num_inference_steps=STEPS, histogram_images=3, grouping="dp", attention="float"
    )
    run = case.sampler(case.denoiser).run(5, 0, 3)
    arguments = {"scheduler": case.scheduler, "conditioning": case.conditioning, "call": case.call}
    adpdm.quantize(case.denoiser, settings, **arguments)
    assert [i.name for i in describe_fusion(case.denoiser) if not i.fused] == OUTSIDE[name]
    sampler = case.sampler(case.denoiser)

    @torch.no_grad()
    def predict(call: int) -> Tensor:
        return sampler.predict(run.samples[call], sampler.calls[call], run.conditioning)

    fused = [predict(call) for call in range(len(sampler.calls))]
    with unfused(case.denoiser):
        wanted = [predict(call) for call in range(len(sampler.calls))]
    assert all(sqnr_db(x, y) > WANTED_DB for x, y in zip(fused, wanted, strict=True))
    graph.capture(case.denoiser)
    assert all(torch.equal(predict(call), x) for call, x in enumerate(fused))
    graph.release(case.denoiser)


@torch.no_grad()
@pytest.mark.parametrize("name", OUTSIDE)
def test_capture_records_again_when_attention_multiplies_something_else(name: str) -> None:
    case = make_case(name)
    settings = QuantConfig(num_groups=1, num_inference_steps=2, histogram_images=3, grouping="shared")
    arguments = {"scheduler": case.scheduler, "conditioning": case.conditioning, "call": case.call}
    adpdm.quantize(case.denoiser, replace(settings, attention="float"), **arguments)
    sampler = case.sampler(case.denoiser)
    run = sampler.run(5, 0, 3)

    def predict() -> Tensor:
        return sampler.predict(run.samples[0], sampler.calls[0], run.conditioning)

    graph.capture(case.denoiser)
    in_float = predict()
    fuse_blocks(case.denoiser, attention="int8")
    in_int8 = predict()
    graph.release(case.denoiser)
    assert torch.equal(predict(), in_int8)
    assert not torch.equal(in_int8, in_float)


@pytest.mark.parametrize("name", ["stable diffusion 3.5, two attentions", "flux", "flux, one sequence"])
def test_compiled_block_follows_the_step(name: str, no_fallback: None) -> None:
    make, kwargs = BLOCKS[name]
    host = frozen(make())
    compiled = torch.compile(host.block, backend="eager")
    outputs = []
    for step in range(2):
        host.step.set_step(step)
        with torch.no_grad():
            outputs.append(compiled(IMAGE, TEXT, temb=EMBEDDING, **kwargs)[1])
        assert torch.equal(outputs[step], run(host, kwargs)[-1])
    assert not torch.equal(outputs[0], outputs[1])
