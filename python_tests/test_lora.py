"""LoRA adapters of PEFT on both kinds of quantized models: beside the layers, and folded into their codes."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loaded_models import inputs, load, random, relative, run
from lora_models import (
    EVERY_KIND,
    EVERY_LAYER,
    FOUR_BITS,
    adapt,
    deltas,
    load_adapter,
    lora,
    peft,
    quantized,
    same,
    saved,
    state_of,
)
from torch import nn

import adpdm
from adpdm import ops
from adpdm.nn import CodedLayer, adapters_of, describe_fusion, load_layer, mark_equalized, unfused
from adpdm.testing import ddim_scheduler, tiny_conditional_unet

AGAIN = r"call unload_lora\(\) before trying again"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One model of every kind; tests must not change them."""
    return {kind: quantized(kind, tmp_path_factory.mktemp("float")) for kind in EVERY_KIND}


@pytest.fixture(params=EVERY_KIND)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    """A quantized model, to change."""
    return copy.deepcopy(models[request.param])


@pytest.fixture(params=FOUR_BITS)
def packed(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    """A model with 4-bit weights and integer products, to change."""
    return copy.deepcopy(models[request.param])


# ---- beside the layers -------------------------------------------------------------------------------------


def test_adapters_are_float_and_on_every_kind_of_layer(model: Any) -> None:
    adapt(model)
    found = adapters_of(model)
    assert {type(m).__name__ for m in found.values()} == {"AdaptedLinear", "AdaptedConv2d"}
    assert all(isinstance(m.base_layer, CodedLayer) for m in found.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(found)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_adapters_run_beside_the_layers(model: Any) -> None:
    before = run(model)
    adapt(model)
    for name, m in adapters_of(model).items():
        x = (
            random(2, m.in_features, 6, 6)
            if isinstance(m.base_layer, nn.Conv2d)
            else random(2, 5, m.in_features)
        )
        with torch.no_grad():
            update = m.base_layer.multiply(x, m.get_delta_weight("default"), None)
            assert relative(m(x) - m.base_layer(x), update) < 1e-5, name
    assert relative(run(model), before) > 0.1
    model.disable_lora()
    # Fused blocks step aside for adapters, and round their sums elsewhere: same codes, other float orders.
    with unfused(model):
        disabled = run(model)
    assert relative(disabled, before) < 0.05
    model.unload_lora()
    assert torch.equal(run(model), before)


def test_weights_of_two_adapters_add_up(model: Any) -> None:
    adapt(model, "first")
    adapt(model, "second", seed=1)
    model.set_adapters(["first", "second"], [0.5, 2.0])
    layer = next(m for name, m in adapters_of(model).items() if name.endswith("to_k"))
    x = random(2, 5, layer.in_features)
    halves = 0.5 * 8 / 4, 2.0 * 8 / 4  # weight * alpha / r
    products = [layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("first", "second")]
    update = x @ sum(h * p for h, p in zip(halves, products, strict=True)).T
    with torch.no_grad():
        assert relative(layer(x) - layer.base_layer(x), update.detach()) < 1e-5
    both = run(model)
    model.set_adapters("second", 2.0)
    alone = run(model)
    assert relative(alone, both) > 0.01
    model.delete_adapters("first")
    assert torch.equal(run(model), alone)


def test_adapters_of_the_float_model_load_and_go_back(model: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    load_adapter(model, path)
    wanted = tiny_conditional_unet()
    load_adapter(wanted, path)
    got, exact = deltas(model), deltas(wanted)
    assert list(got) == list(exact)
    # PEFT convolves the factors of an update, ours is their matrix product: sums in other orders.
    assert all(torch.allclose(got[key], exact[key], rtol=1e-5, atol=1e-6) for key in got)
    with pytest.raises(ValueError, match="quantized model cannot be cast, so upcast_before_saving"):
        model.save_lora_adapter(tmp_path / "again", upcast_before_saving=True)
    model.save_lora_adapter(tmp_path / "again")
    assert model.is_quantized
    again = tiny_conditional_unet()
    load_adapter(again, tmp_path / "again")
    assert torch.equal(run(again), run(wanted))


def test_hotswap_gives_what_loading_would(packed: Any, tmp_path: Path) -> None:
    first, second, fresh = saved(tmp_path), saved(tmp_path, 1), copy.deepcopy(packed)
    load_adapter(packed, first)
    before = run(packed)
    load_adapter(packed, second, hotswap=True)
    load_adapter(fresh, second)
    assert torch.equal(run(packed), run(fresh))
    assert not torch.equal(run(packed), before)


def test_pipeline_loads_sets_fuses_and_unloads(packed: Any, tmp_path: Path) -> None:
    source = tiny_conditional_unet()
    adapt(source)
    layers = peft.get_peft_model_state_dict(source)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        **parts, unet=packed, scheduler=DDIMScheduler(), requires_safety_checker=False
    )
    before = state_of(packed)
    output = run(packed)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    beside = run(packed)
    assert relative(beside, output) > 0.1
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    pipe.unfuse_lora()
    assert torch.equal(run(packed), beside)
    pipe.unload_lora_weights()
    assert torch.equal(run(packed), output)
    assert same(state_of(packed), before)


# ---- folded into codes -------------------------------------------------------------------------------------


def test_fused_codes_are_those_of_the_sum(model: Any) -> None:
    adapt(model)
    sums = {name: m.base_layer.dequantized_weight() + m.get_delta_weight("default") for name, m in
            adapters_of(model).items()}  # fmt: skip
    model.fuse_lora()
    for name, m in adapters_of(model).items():
        layer, wanted = m.base_layer, sums[name]
        assert layer.weight.dtype == (torch.uint8 if layer.weight_quantizer.num_bits <= 4 else torch.int8)
        steps = layer.weight_scale.new_ones(1) / (2 ** (layer.weight_quantizer.num_bits - 1) - 1)
        # Per output channel: half a step of its largest weight, and what least squares clips beyond that.
        worst = (layer.dequantized_weight() - wanted).flatten(1).norm(dim=1)
        coded = ops.hadamard(wanted, layer.hadamard) if layer.hadamard else wanted  # no longer than it was
        peak = coded.detach().flatten(1).abs().amax(1) * wanted[0].numel() ** 0.5
        assert (worst <= 0.5 * steps * peak * 1.001).all(), name


@pytest.mark.parametrize(("name", "bound"), [("w8", 0.03), ("w8a8", 0.06), ("calibrated w8a8", 0.06)])
def test_fused_model_is_near_the_one_with_adapters(models: Any, name: str, bound: float) -> None:
    model = copy.deepcopy(models[name])
    # Calibrated ranges are those of the model without adapters: what leaves them far is clipped once fused.
    adapt(model, lora_alpha=1)
    beside = run(model)
    model.fuse_lora()
    fused = run(model)
    assert 0 < relative(fused, beside) < bound
    model.unload_lora()  # what is fused stays, and the memory of the adapter is free
    assert relative(run(model), fused) < 0.03  # blocks are fused again and round elsewhere
    assert not adapters_of(model)


def test_unfusing_restores_every_bit(model: Any) -> None:
    adapt(model, lora_bias=True, targets=["conv1", "to_out.0"])
    before, beside = state_of(model), run(model)
    model.fuse_lora()
    assert not same(state_of(model), before)
    model.unfuse_lora()
    assert same(state_of(model), before)
    assert torch.equal(run(model), beside)


def test_fusing_one_after_the_other_unfuses_at_once(packed: Any) -> None:
    adapt(packed, "first")
    adapt(packed, "second", seed=1)
    packed.set_adapters(["first", "second"])
    before = state_of(packed)
    packed.fuse_lora(adapter_names=["first"])
    packed.fuse_lora(adapter_names=["second"], lora_scale=0.5)
    packed.unfuse_lora()
    assert same(state_of(packed), before)


def test_disabling_fused_adapters_unfuses_them(packed: Any) -> None:
    adapt(packed)
    before = state_of(packed)
    packed.disable_lora()
    plain = run(packed)
    packed.enable_lora()
    packed.fuse_lora()
    packed.disable_lora()
    assert torch.equal(run(packed), plain)
    assert same(state_of(packed), before)


def test_copies_of_a_fused_model_unfuse_on_their_own(packed: Any) -> None:
    adapt(packed)
    beside = run(packed)
    packed.fuse_lora()
    fused = run(packed)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(run(copied), fused)
        copied.unfuse_lora()
        assert torch.equal(run(copied), beside)
    assert torch.equal(run(packed), fused)


def test_update_smaller_than_rounding_is_said(models: Any) -> None:
    model = copy.deepcopy(models["w4"])
    adapt(model, init_lora_weights=True, targets=["to_q"])  # B is zero: nothing to fold in
    for m in adapters_of(model).values():
        nn.init.constant_(m.lora_B["default"].weight, 1e-6)
    with pytest.warns(UserWarning, match="rounding to 4 bits moves weights further than the fused adapter"):
        model.fuse_lora()


# ---- fused blocks ------------------------------------------------------------------------------------------


def test_fused_blocks_say_that_they_step_aside(models: Any) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    was = {info.name: info for info in describe_fusion(model)}
    assert was["mid_block.resnets.0"].fused
    adapt(model, targets=["conv2", "to_v"])
    reasons = {info.name: info.reason for info in describe_fusion(model)}
    assert reasons["mid_block.resnets.0"] == "conv2 has an adapter"
    assert reasons["mid_block.attentions.0.transformer_blocks.0.attn1"] == "to_v has an adapter"
    model.unload_lora()
    assert {info.name: info for info in describe_fusion(model)} == was


@pytest.mark.parametrize("target", ["conv1", "conv2", "to_v", "ff.net.2", "proj_out", "conv"])
def test_fused_blocks_take_the_codes_that_fusing_made(models: Any, target: str) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    before = run(model)  # plans are made
    adapt(model, targets=[target])
    model.fuse_lora()
    model.unload_lora()
    fused = run(model)
    assert relative(fused, before) > 0.02
    with unfused(model):
        assert relative(run(model), fused) < 0.03
    fresh = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(fresh), fused)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_reach_all_adapters_and_nothing_else(model: Any, training: bool) -> None:
    model.train(training)
    adapt(model, targets=[*EVERY_LAYER, "time_emb_proj"])
    codes = state_of(model)
    model(**inputs()).sample.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in key), key
        assert parameter.grad is None or parameter.grad.norm() > 0
    assert same(state_of(model), codes)


@pytest.mark.parametrize("target", ["time_emb_proj", "to_q"])
def test_gradients_of_few_adapters_pass_the_blocks_behind_them(models: Any, target: str) -> None:
    model, gradients = copy.deepcopy(models["calibrated w8a8"]).eval(), []
    adapt(model, targets=[target])
    for manager in (nullcontext(), unfused(model)):
        with manager:
            model.zero_grad()
            (model(**inputs()).sample * random(2, 4, 8, 8, seed=2)).sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if "lora_" in key})
    for key, wanted in gradients[1].items():
        # Embeddings are summed in another order where blocks run fused: a few codes are others.
        assert (gradients[0][key] - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", ["calibrated w8a8", "w8a8"])
def test_adapters_learn(models: Any, kind: str) -> None:
    model, target = copy.deepcopy(models[kind]).train(), run(tiny_conditional_unet(seed=1))
    adapt(model, init_lora_weights=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(6):
        loss = (model(**inputs()).sample - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


# ---- saving ------------------------------------------------------------------------------------------------


def test_adapters_beside_are_left_out_of_what_is_saved(packed: Any, tmp_path: Path) -> None:
    wanted = run(packed)
    adapt(packed)
    with pytest.warns(UserWarning, match="adapters are left out, unless fused"):
        packed.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), wanted)


def test_fused_adapters_are_saved_with_the_model(packed: Any, tmp_path: Path) -> None:
    adapt(packed)
    packed.fuse_lora()
    with pytest.warns(UserWarning, match="adapters are left out, unless fused"):
        packed.save_pretrained(tmp_path / "with")
    packed.unload_lora()
    packed.save_pretrained(tmp_path / "without")
    for name in ("with", "without"):
        again = UNet2DConditionModel.from_pretrained(tmp_path / name)
        assert same(state_of(again), state_of(packed))
        assert torch.equal(run(again), run(packed))


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
)
def test_adapters_that_compute_with_the_weight_are_refused(packed: Any, changes: dict[str, Any]) -> None:
    what = next(f"{key}={value!r}" for key, value in changes.items())
    with pytest.raises(ValueError, match=rf"must be plain LoRA .*got {what}, which computes .*{AGAIN}"):
        packed.add_adapter(lora(**changes))


def test_other_methods_are_refused(packed: Any) -> None:
    kind = r"must be LoRA on Linear or Conv2d, got peft\.tuners\.lokr"
    with pytest.raises(TypeError, match=f"{kind}.*{AGAIN}"):
        packed.add_adapter(peft.LoKrConfig(target_modules=["to_q"]))


@pytest.mark.parametrize(
    "refused",
    [
        lora(["time_emb_proj", "to_q"], use_dora=True),
        peft.LoKrConfig(target_modules=["time_emb_proj", "to_q"]),
    ],
    ids=["DoRA", "LoKr"],
)
def test_after_a_refusal_adapters_are_taken_as_it_says(models: Any, refused: Any) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    before = run(model)
    with pytest.raises((ValueError, TypeError), match=AGAIN):
        model.add_adapter(refused)
    model.unload_lora()
    assert not adapters_of(model)
    assert torch.equal(run(model), before)
    adapt(model, targets=["to_q"])
    assert relative(run(model), before) > 0.01


def test_other_layers_take_adapters_after_equalized_ones_refused(models: Any) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    mark_equalized(model, [name for name, _ in model.named_modules() if name.endswith("to_v")])
    with pytest.raises(ValueError, match=f"which equalization has changed .*{AGAIN} on other layers"):
        model.add_adapter(lora(["to_q", "to_v"]))
    model.unload_lora()
    adapt(model, targets=["to_q"])
    assert all(name.endswith("to_q") for name in adapters_of(model))


def test_float_layers_take_any_adapter(tmp_path: Path) -> None:
    tiny_conditional_unet().save_pretrained(tmp_path)
    model = load(tmp_path, {"modules_to_not_convert": ["to_q"]})
    model.add_adapter(lora(["to_q"], use_dora=True))
    assert {type(m) for m in adapters_of(model).values()} == {peft.tuners.lora.Linear}


def test_fusing_an_adapter_that_is_not_finite_is_refused(packed: Any) -> None:
    adapt(packed, targets=["to_q"])
    before = state_of(packed)
    first = next(iter(adapters_of(packed).values()))
    first.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapters \['default'\] must be finite to be fused"):
        first.merge()
    first.lora_B["default"].weight.data[0, 0] = before[next(k for k in before if "lora_B" in k)][0, 0]
    assert same(state_of(packed), before)
    assert not first.merged


@pytest.mark.parametrize(
    ("layer", "changes", "sentence"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), {}, "fuse_lora on a convolution must find groups=1, got groups=2"),
        (nn.Linear(4, 8, bias=False), {"lora_bias": True}, "need a layer with a bias .* got LoadedLinear"),
    ],
    ids=["groups", "no bias"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # PEFT says so as well, when adapters are made
def test_fusing_what_a_layer_cannot_hold_is_refused(layer: Any, changes: Any, sentence: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    load_layer(model, "layer", (4, 8)).fill(layer.weight.detach(), torch.device("cpu"))
    peft.inject_adapter_in_model(lora(["layer"], **changes), model)
    x = random(2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else random(2, 4)
    assert model["layer"](x).isfinite().all()
    before = state_of(model)
    with pytest.raises(ValueError, match=sentence):
        model["layer"].merge()
    assert same(state_of(model), before)


@pytest.mark.parametrize("verb", ["quantize", "dequantize", "save_tables"])
def test_what_changes_layers_refuses_adapters(models: Any, verb: str, tmp_path: Path) -> None:
    model = tiny_conditional_unet() if verb == "quantize" else copy.deepcopy(models["calibrated w8a8"])
    adapt(model)
    actions: dict[str, Any] = {
        "quantize": lambda: adpdm.quantize(model, scheduler=ddim_scheduler()),
        "dequantize": model.dequantize,
        "save_tables": lambda: adpdm.save_tables(model, tmp_path / "tables"),
    }
    with pytest.raises(ValueError, match=f"{verb}: .*unload_lora"):
        actions[verb]()


# ---- tables ------------------------------------------------------------------------------------------------


def refused_tables(model: Any, folder: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"save_tables: {sentence}"):
        adpdm.save_tables(model, folder / "tables")
    assert not list(folder.iterdir())


def test_tables_refuse_adapters_on_float_layers(models: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    adapt(model, targets=["time_emb_proj"])
    refused_tables(model, tmp_path, r"wanted .* without adapters, .* call unload_lora\(\) first$")


@pytest.mark.parametrize("targets", [["to_q"], ["to_q", "time_emb_proj"]], ids=str)
def test_tables_refuse_fused_adapters(models: Any, targets: list[str], tmp_path: Path) -> None:
    model, changed = copy.deepcopy(models["calibrated w8a8"]), "fused adapters changed the weights of .*to_q"
    adapt(model, targets=targets)
    model.fuse_lora()
    refused_tables(model, tmp_path, rf"{changed}.* call unfuse_lora\(\) if .*, or use save_pretrained")
    model.unload_lora()
    assert not [key for key in model.state_dict() if "requantized" in key]
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        refused_tables(copied, tmp_path, changed)


def test_unfused_adapters_leave_tables_that_load(models: Any, tmp_path: Path) -> None:
    model, again = copy.deepcopy(models["calibrated w8a8"]), tiny_conditional_unet()
    adapt(model, targets=["to_q"])
    model.fuse_lora()
    model.unfuse_lora()
    model.unload_lora()
    adpdm.save_tables(model, tmp_path / "tables")
    adpdm.load_tables(again, tmp_path / "tables")
    assert same(state_of(again), state_of(model))


def test_unfusing_does_not_forget_what_was_fused_before(models: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(models["calibrated w8a8"])
    adapt(model, targets=["to_q"])
    model.fuse_lora()
    model.unload_lora()
    adapt(model, targets=["to_q"], seed=1)
    model.fuse_lora()
    model.unfuse_lora()
    model.unload_lora()
    refused_tables(model, tmp_path, "fused adapters changed")
