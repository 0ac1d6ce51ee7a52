"""Fused blocks: the results of one layer after the other, and that path wherever something is unknown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from fused_blocks import WANTED_DB, frozen, randn, reason_of, sqnr_db
from torch import Tensor, nn

from adpdm.nn import QuantConv2d, describe_fusion, fuse_blocks, unfuse_blocks, unfused


def resnet(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "temb_channels": 6, "groups": 4}
    return ResnetBlock2D(**{**settings, **changes})


def spatial_attention(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "heads": 2,
        "dim_head": 4,
        "norm_num_groups": 2,
        "residual_connection": True,
        "bias": True,
        "upcast_softmax": True,
    }
    return Attention(8, **{**settings, **changes})


def transformer(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 5}
    return Transformer2DModel(2, 4, **{**settings, **changes})


def adaptive_block(**changes: Any) -> nn.Module:
    settings = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "norm_elementwise_affine": False}
    return BasicTransformerBlock(8, 2, 4, **{**settings, "activation_fn": "gelu-approximate", **changes})


def single_block(**changes: Any) -> nn.Module:
    settings = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "cross_attention_dim": 5}
    return BasicTransformerBlock(8, 2, 4, **{**settings, "activation_fn": "gelu-approximate", **changes})


MASK = torch.tensor([[[0.0, 0.0, -1e4]], [[0.0, -1e4, -1e4]]])  # [N, 1, M], added to scores
CONDITION = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 7])}
TEMB, CONTEXT, IMAGE = randn(2, 6, seed=5), randn(2, 3, 5, seed=6), randn(2, 8, 6, 4)
Case = tuple[Callable[[], Any], tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "resnet": (lambda: frozen(resnet()), (IMAGE, TEMB), {}),
    "resnet with shortcut and factor": (
        lambda: frozen(resnet(out_channels=12, output_scale_factor=1.4)),
        (IMAGE, TEMB),
        {},
    ),
    "resnet with scale and shift": (
        lambda: frozen(resnet(time_embedding_norm="scale_shift")),
        (IMAGE, TEMB),
        {},
    ),
    "resnet without time": (lambda: frozen(resnet(temb_channels=None)), (IMAGE, None), {}),
    "resnet, split between groups": (lambda: frozen(resnet(out_channels=4), 4), (IMAGE, TEMB), {}),
    "resnet, split within a group": (lambda: frozen(resnet(out_channels=4), 5), (IMAGE, TEMB), {}),
    "resnet, w4a4": (lambda: frozen(resnet(), None, (4, 4)), (IMAGE, TEMB), {}),
    "upsample": (lambda: frozen(Upsample2D(8, True)), (IMAGE,), {}),
    "upsample to twice the size": (lambda: frozen(Upsample2D(8, True)), (IMAGE, (12, 8)), {}),
    "downsample": (lambda: frozen(Downsample2D(8, True, name="op")), (IMAGE,), {}),
    "downsample, one-sided": (lambda: frozen(Downsample2D(8, True, padding=0, name="op")), (IMAGE,), {}),
    "spatial attention": (lambda: frozen(spatial_attention()), (IMAGE,), {"temb": TEMB}),
    "spatial attention with factor": (
        lambda: frozen(spatial_attention(rescale_output_factor=1.4, residual_connection=False)),
        (IMAGE,),
        {},
    ),
    "attention": (lambda: frozen(Attention(8, None, 2, None, 4)), (randn(2, 7, 8),), {}),
    "cross-attention": (lambda: frozen(Attention(8, 5, 2, None, 4)), (randn(2, 7, 8), CONTEXT), {}),
    "transformer block": (
        lambda: frozen(BasicTransformerBlock(8, 2, 4, cross_attention_dim=5)),
        (randn(2, 7, 8),),
        {"encoder_hidden_states": CONTEXT},
    ),
    "transformer block with two self-attentions": (
        lambda: frozen(BasicTransformerBlock(8, 2, 4, double_self_attention=True)),
        (randn(2, 7, 8),),
        {},
    ),
    "transformer block with GELU": (
        lambda: frozen(BasicTransformerBlock(8, 2, 4, activation_fn="gelu")),
        (randn(2, 7, 8),),
        {},
    ),
    "transformer block with adaptive norms": (
        lambda: frozen(adaptive_block()),
        (randn(2, 7, 8),),
        CONDITION,
    ),
    "transformer block with adaptive norms and GEGLU, one timestep for all": (
        lambda: frozen(adaptive_block(activation_fn="geglu")),
        (randn(2, 7, 8),),
        {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])},
    ),
    "transformer block with adaptive norms and context": (
        lambda: frozen(adaptive_block(cross_attention_dim=5)),
        (randn(2, 7, 8),),
        {"encoder_hidden_states": CONTEXT, **CONDITION},
    ),
    "transformer block with shared adaptive norms and a masked context": (
        lambda: frozen(single_block()),
        (randn(2, 7, 8),),
        {"encoder_hidden_states": CONTEXT, "encoder_attention_mask": MASK, "timestep": randn(2, 48)},
    ),
    "transformer block with shared adaptive norms and a mask for each token": (
        lambda: frozen(single_block()),
        (randn(2, 7, 8),),
        {
            "encoder_hidden_states": CONTEXT,
            "encoder_attention_mask": randn(2, 7, 3),
            "timestep": randn(2, 48),
        },
    ),
    "transformer block with shared adaptive norms and no context": (
        lambda: frozen(single_block(cross_attention_dim=None)),
        (randn(2, 7, 8),),
        {"timestep": randn(2, 48)},
    ),
    "transformer": (lambda: frozen(transformer()), (IMAGE, CONTEXT), {"return_dict": False}),
    "transformer with linear projections": (
        lambda: frozen(transformer(use_linear_projection=True)),
        (IMAGE, CONTEXT),
        {"return_dict": False},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    make, args, kwargs = CASES[request.param]
    return make(), args, kwargs


def run(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = host.block(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def test_fused_block_computes_what_its_layers_compute(
    case: tuple[Any, tuple[Any, ...], dict[str, Any]], no_fallback: None
) -> None:
    host, args, kwargs = case
    for step in range(3):  # three groups
        host.step.set_step(step)
        fused = run(host, args, kwargs)
        with unfused(host):
            wanted = run(host, args, kwargs)
        assert fused.shape == wanted.shape
        assert fused.dtype == wanted.dtype
        assert sqnr_db(fused, wanted) > WANTED_DB
    assert all(info.fused for info in describe_fusion(host))


UP = {
    "UpBlock2D": lambda: UpBlock2D(8, 12, 8, 6, num_layers=2, resnet_groups=4),
    "AttnUpBlock2D": lambda: AttnUpBlock2D(8, 12, 8, 6, num_layers=2, resnet_groups=4, attention_head_dim=4),
    "CrossAttnUpBlock2D": lambda: CrossAttnUpBlock2D(
        8, 8, 12, 6, num_layers=2, resnet_groups=4, num_attention_heads=2, cross_attention_dim=5
    ),
}


def up_arguments(kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    skips = (randn(2, 8, 6, 4, seed=7), randn(2, 8, 6, 4, seed=8))
    context = {"encoder_hidden_states": CONTEXT} if kind.startswith("Cross") else {}
    return (randn(2, 12, 6, 4), skips, TEMB), context


@pytest.mark.parametrize("split", [12, None])
@pytest.mark.parametrize("kind", UP)
def test_up_block_never_joins_the_skip_concatenation(
    kind: str, split: int | None, no_fallback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = frozen(UP[kind](), split)
    args, kwargs = up_arguments(kind)
    with unfused(host):
        wanted = run(host, args, kwargs)
    cat, joined = torch.cat, []

    def watched(parts: Any, *rest: Any, **others: Any) -> Tensor:
        joined.extend(p.dtype for p in parts if p.dim() == 4)
        return cat(parts, *rest, **others)

    run(host, args, kwargs)  # packs
    monkeypatch.setattr(torch, "cat", watched)
    fused = run(host, args, kwargs)
    # Without a split, the codes of the shortcut are joined: a quarter of the bytes.
    assert set(joined) == (set() if split else {torch.int8})
    assert sqnr_db(fused, wanted) > WANTED_DB


def test_parts_that_do_not_meet_at_the_split_are_joined(no_fallback: None) -> None:
    host = frozen(resnet(out_channels=4), 3)
    forward = host.block.forward
    fused = forward.run([IMAGE[:, :5], IMAGE[:, 5:]], TEMB)
    assert torch.equal(fused, run(host, (IMAGE, TEMB), {}))


def test_float_shortcut_is_called_as_it_is_now(no_fallback: None) -> None:
    host = frozen(resnet(out_channels=12))
    unfuse_blocks(host)
    host.block.conv_shortcut = nn.Conv2d(8, 12, 1)
    fuse_blocks(host)
    run(host, (IMAGE, TEMB), {})
    host.block.conv_shortcut = nn.Sequential(host.block.conv_shortcut, nn.Tanh())  # as an adapter would
    fused = run(host, (IMAGE, TEMB), {})
    with unfused(host):
        assert sqnr_db(fused, run(host, (IMAGE, TEMB), {})) > WANTED_DB


def test_block_of_the_same_name_elsewhere_is_unknown() -> None:
    host = frozen(resnet())
    unfuse_blocks(host)
    namesake = type("ResnetBlock2D", (ResnetBlock2D,), {"__module__": "diffusers.pipelines.other"})
    host.block.__class__ = namesake
    fuse_blocks(host)
    assert "forward" not in host.block.__dict__


def test_projections_share_codes_only_where_their_quantizers_agree(no_fallback: None) -> None:
    host = frozen(spatial_attention())
    wanted = run(host, (IMAGE,), {})
    assert len(host.block.forward.plan.to_itself.packed) == 1
    quantizer = host.block.to_k.quantizers[0]
    quantizer.scale = quantizer.scale * 1.5
    host.block.to_q.drop_packed()
    host.block.to_k.drop_packed()
    fused = run(host, (IMAGE,), {})
    assert host.block.forward.plan.to_itself.groups == [[0, 2], [1]]
    assert not torch.equal(fused, wanted)
    with unfused(host):
        assert sqnr_db(fused, run(host, (IMAGE,), {})) > WANTED_DB


# ---- what keeps the path of one layer after the other ------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: resnet(up=True), "it resamples inside"),
        (lambda: resnet(non_linearity="gelu"), "nonlinearity is a GELU, known is SiLU"),
        (lambda: Upsample2D(8, True, interpolate=False), "it does not interpolate"),
        (lambda: Upsample2D(8, True, norm_type="ln_norm", elementwise_affine=True), "it has a norm"),
        (lambda: spatial_attention(processor=AttnProcessor()), "its processor is AttnProcessor"),
        (lambda: spatial_attention(qk_norm="layer_norm"), "it has norm_q"),
        (
            lambda: BasicTransformerBlock(8, 2, 4, activation_fn="geglu-approximate"),
            "its feed-forward starts with ApproximateGELU",
        ),
        (
            lambda: BasicTransformerBlock(8, 2, 4, norm_type="ada_norm", num_embeds_ada_norm=10),
            "its norms are ada_norm",
        ),
    ],
)
def test_unknown_setting_is_named(block: Callable[[], nn.Module], reason: str) -> None:
    host = frozen(block())
    assert "forward" not in host.block.__dict__
    assert reason_of(host) == reason


def test_layer_left_in_float_is_named() -> None:
    host = frozen(resnet())
    unfuse_blocks(host)
    host.block.conv2 = nn.Conv2d(8, 8, 3, padding=1)
    fuse_blocks(host)
    assert reason_of(host) == "conv2 is not quantized"


def test_layer_outside_all_blocks_is_listed() -> None:
    host = frozen(nn.Sequential(nn.Conv2d(8, 8, 1)))
    infos = describe_fusion(host)
    assert [(i.name, i.kind, i.fused, i.reason) for i in infos] == [
        ("block.0", "QuantConv2d", False, "no known block around it")
    ]


def add_hook(host: Any) -> None:
    host.block.conv1.register_forward_hook(lambda module, args, output: None)


def add_pre_hook(host: Any) -> None:
    host.block.register_forward_pre_hook(lambda module, args: None)


def replace_child(host: Any) -> None:
    host.block.conv1 = copy.deepcopy(host.block.conv1)


def replace_forward(host: Any) -> None:
    host.block.conv2.forward = lambda x: QuantConv2d.forward(host.block.conv2, x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_hook, "QuantConv2d has hooks"),
        (add_pre_hook, "ResnetBlock2D has hooks"),
        (replace_child, "conv1 was replaced"),
        (replace_forward, "the forward of QuantConv2d was replaced"),
        (lambda host: host.block.dropout.train(), "Dropout is in training mode"),
    ],
)
def test_change_after_fusing_takes_the_class_forward(change: Callable[[Any], None], reason: str) -> None:
    host = frozen(resnet())
    calls: list[str] = []
    change(host)
    host.block.norm1.forward = lambda x: calls.append("norm1") or nn.GroupNorm.forward(host.block.norm1, x)
    run(host, (IMAGE, TEMB), {})
    assert calls == ["norm1"]
    del host.block.norm1.forward
    assert reason_of(host) == reason


def test_masked_attention_takes_the_class_forward() -> None:
    host = frozen(Attention(8, None, 2, None, 4))
    mask = torch.zeros(2, 1, 7)
    mask[:, :, 3:] = -1e4
    x = randn(2, 7, 8)
    fused = run(host, (x,), {"attention_mask": mask})
    with unfused(host):
        assert torch.equal(fused, run(host, (x,), {"attention_mask": mask}))
    assert not torch.equal(fused, run(host, (x,), {}))


def test_masks_of_unknown_form_take_the_class_forward() -> None:
    host = frozen(single_block())
    x, timestep = randn(2, 7, 8), randn(2, 48)
    for mask in (MASK[:1], MASK[:, 0], MASK.bfloat16(), MASK == 0, MASK.repeat_interleave(2, 0)):
        known = {"encoder_hidden_states": CONTEXT, "timestep": timestep}
        host.block.forward.per_layer = lambda *args, **kwargs: x
        assert run(host, (x,), {**known, "encoder_attention_mask": mask}) is x


def test_gradient_of_rows_that_are_made_outside_passes() -> None:
    host = frozen(single_block(cross_attention_dim=None))
    rows = randn(2, 48).requires_grad_()
    host.block(randn(2, 7, 8), timestep=rows).sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() > 0


def test_other_processor_takes_the_class_forward() -> None:
    host = frozen(spatial_attention())
    host.block.set_processor(AttnProcessor())
    assert reason_of(host) == "its processor is AttnProcessor now"
    host.block.set_processor(AttnProcessor2_0())  # as switching attention slicing off does
    assert reason_of(host) == ""
    host.block.set_processor(AttnProcessor())
    with unfused(host):
        wanted = run(host, (IMAGE,), {})
    assert torch.equal(run(host, (IMAGE,), {}), wanted)


def test_freeu_takes_the_class_forward() -> None:
    host = frozen(UP["UpBlock2D"](), 12)
    host.block.resolution_idx = 0
    plain = run(host, up_arguments("UpBlock2D")[0], {})
    for name, value in (("s1", 0.9), ("s2", 0.2), ("b1", 1.2), ("b2", 1.4)):
        setattr(host.block, name, value)
    changed = run(host, up_arguments("UpBlock2D")[0], {})
    with unfused(host):
        assert sqnr_db(changed, run(host, up_arguments("UpBlock2D")[0], {})) > WANTED_DB
    assert sqnr_db(changed, plain) < WANTED_DB


def test_residual_block_with_hooks_gets_the_joined_input_from_its_up_block() -> None:
    host = frozen(UP["UpBlock2D"](), 12)
    seen: list[Any] = []
    handle = host.block.resnets[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    args, _ = up_arguments("UpBlock2D")
    hooked = run(host, args, {})
    assert seen == [(2, 20, 6, 4)]
    handle.remove()
    assert sqnr_db(run(host, args, {}), hooked) > WANTED_DB


# ---- copies, moves, names ----------------------------------------------------------------------------------


def test_names_and_state_do_not_know_of_fusion() -> None:
    host = frozen(transformer())
    run(host, (IMAGE, CONTEXT), {"return_dict": False})
    fused = list(host.state_dict()), [name for name, _ in host.named_modules()], type(host.block)
    unfuse_blocks(host)
    assert fused == (
        list(host.state_dict()),
        [name for name, _ in host.named_modules()],
        Transformer2DModel,
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])
def test_copy_is_fused_and_independent(duplicate: Callable[[Any], Any], no_fallback: None) -> None:
    host = frozen(resnet())
    wanted = run(host, (IMAGE, TEMB), {})
    other = duplicate(host)
    assert other.block.forward.block is other.block
    assert other.block.forward is not host.block.forward
    host.block.norm1.weight.data.zero_()
    host.block.conv1.weight.data.zero_()
    host.step.set_step(1)
    assert torch.equal(run(other, (IMAGE, TEMB), {}), wanted)


def test_loading_other_weights_is_noticed(no_fallback: None) -> None:
    host = frozen(resnet())
    state = host.state_dict()
    state["block.conv2.weight"] = -state["block.conv2.weight"]
    state["block.norm2.bias"] = state["block.norm2.bias"] + 1
    before = run(host, (IMAGE, TEMB), {})
    host.load_state_dict(state)
    fused = run(host, (IMAGE, TEMB), {})
    with unfused(host):
        layers = run(host, (IMAGE, TEMB), {})
    wanted = run(copy.deepcopy(host), (IMAGE, TEMB), {})  # a copy derives everything anew
    assert torch.equal(fused, wanted)
    assert sqnr_db(layers, wanted) > WANTED_DB
    assert not torch.equal(fused, before)


def test_unfused_puts_the_same_objects_back() -> None:
    host = frozen(resnet())
    forward = host.block.forward

    def fail_unfused() -> None:
        with unfused(host):
            assert "forward" not in host.block.__dict__
            raise KeyError

    with pytest.raises(KeyError):
        fail_unfused()
    assert host.block.forward is forward


def test_compiled_block_follows_the_step() -> None:
    host = frozen(resnet())
    compiled = torch.compile(host.block, backend="eager")
    outputs = []
    for step in range(2):
        host.step.set_step(step)
        with torch.no_grad():
            outputs.append(compiled(IMAGE, TEMB))
        assert torch.equal(outputs[step], run(host, (IMAGE, TEMB), {}))
    assert not torch.equal(outputs[0], outputs[1])
