"""What diffusers demands of a quantization backend, case by case as in its own test mixins for quantizers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, WanTransformer3DModel
from diffusers.quantizers import PipelineQuantizationConfig
from loaded_models import (
    ATTENTION,
    CONFIGS,
    MEMORY_REDUCTIONS,
    both_kinds,
    every_config,
    inputs,
    load,
    random,
    relative,
    run,
)
from torch import Tensor, nn

import adpdm
from adpdm import AdpdmConfig, QuantConfig
from adpdm.nn import CodedLayer, LoadedConv2d, LoadedLinear, loaded_layers
from adpdm.testing import tiny_conditional_unet, tiny_pipeline, tiny_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model in one file; tests must not change it."""
    path = tmp_path_factory.mktemp("float")
    tiny_conditional_unet().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in many files."""
    path = tmp_path_factory.mktemp("sharded")
    tiny_conditional_unet().save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture(scope="module")
def calibrated_once() -> Any:
    pipe = tiny_pipeline()
    settings = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 1, "grouping": "uniform"}
    adpdm.quantize(pipe, QuantConfig(**settings, weight_rounding="nearest"))
    return pipe.unet


@pytest.fixture
def calibrated(calibrated_once: Any) -> Any:
    """A denoiser with calibrated ranges, to change."""
    return copy.deepcopy(calibrated_once)


# ---- the cases of the mixins -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8", "w8a8"])
def test_number_of_parameters_is_that_of_the_float_model(folder: Path, name: str) -> None:
    assert load(folder, CONFIGS[name]).num_parameters() == tiny_conditional_unet().num_parameters()


def test_number_of_4_bit_parameters_counts_bytes(folder: Path) -> None:
    # diffusers counts elements and doubles those of bitsandbytes only: ours come out as stored bytes.
    model = load(folder, CONFIGS["w4"])
    surplus = sum(
        layer.weight_shape.numel() - layer.weight.numel()
        for layer in loaded_layers(model).values()
        if layer.weight.dtype == torch.uint8
    )
    assert surplus > 0
    assert model.num_parameters() + surplus == tiny_conditional_unet().num_parameters()


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_footprint(folder: Path, name: str) -> None:
    quantized, original = load(folder, CONFIGS[name]), tiny_conditional_unet()
    assert original.get_memory_footprint() / quantized.get_memory_footprint() >= MEMORY_REDUCTIONS[name]


@pytest.mark.parametrize(("name", "bound"), [("w8", 0.03), ("w4", 0.3), ("w8a8", 0.06), ("w4a8", 0.3)])
def test_inference_is_near_the_float_model(folder: Path, name: str, bound: float) -> None:
    # Per layer 2^-7 and 2^-3 of relative rounding; the network adds up what some twenty in a row contribute.
    output, wanted = run(load(folder, CONFIGS[name])), run(tiny_conditional_unet())
    assert 0 < relative(output, wanted) < bound


@both_kinds
def test_assigning_a_dtype_raises(folder: Path, settings: dict[str, Any]) -> None:
    model = load(folder, settings)
    for change in (
        lambda: model.to(torch.float16),
        lambda: model.to(device="cpu", dtype=torch.float16),
        model.float,
        model.half,
    ):
        with pytest.raises(ValueError, match="not supported for quantized|quantized model .* unsupported"):
            change()
    before = run(model)
    model.to("cpu")
    assert torch.equal(run(model), before)


@every_config
def test_lora_inference(folder: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = load(folder, settings)
    before = run(model)
    targets = [*ATTENTION, "conv1"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    changed = run(model)
    assert changed.isfinite().all()
    assert relative(changed, before) > 0.01
    model.disable_adapters()
    assert torch.equal(run(model), before)


@every_config
@pytest.mark.parametrize("shards", ["10GB", "20KB"], ids=["one file", "sharded"])
def test_saved_model_loads_with_the_same_outputs(
    folder: Path, tmp_path: Path, settings: dict[str, Any], shards: str
) -> None:
    model = load(folder, settings)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), run(model))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@both_kinds
def test_sharded_float_model_gives_the_same_codes(
    folder: Path, sharded: Path, settings: dict[str, Any]
) -> None:
    one, many = load(folder, settings).state_dict(), load(sharded, settings).state_dict()
    assert list(one) == list(many)
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_config_can_be_written(folder: Path) -> None:
    config = load(folder).config["quantization_config"]
    assert json.loads(config.to_json_string()) == config.to_dict() == config.to_diff_dict()
    assert config.to_dict()["format_version"] == 3


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_original_dtype_is_on_record(folder: Path, dtype: torch.dtype | None) -> None:
    model = load(folder, torch_dtype=dtype)
    assert model.config["_pre_quantization_dtype"] == (dtype or torch.float32)


@every_config
def test_all_layers_are_quantized(folder: Path, settings: dict[str, Any]) -> None:
    model, original = load(folder, settings), tiny_conditional_unet()
    kinds = {name: type(m) for name, m in model.named_modules()}
    for name, module in original.named_modules():
        if isinstance(module, nn.Conv2d):
            assert kinds[name] is LoadedConv2d
        elif isinstance(module, nn.Linear):
            assert kinds[name] is LoadedLinear


def test_first_last_and_embedding_layers_keep_8_bits_and_float_inputs(folder: Path) -> None:
    layers = loaded_layers(load(folder, CONFIGS["w4a8"]))
    bits = {name: (m.weight_quantizer.num_bits, m.activation_bits) for name, m in layers.items()}
    careful = {name for name in bits if "time_emb" in name or name in ("conv_in", "conv_out")}
    assert len(careful) == 4 + 8  # of each residual block one
    assert {bits[name] for name in careful} == {(8, None)}
    assert {bits[name] for name in set(bits) - careful} == {(4, 8)}


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["mid_block"], 18),
        (["to_q"], 8),
        (["down_blocks.1.resnets.0.conv1"], 1),
        (["*conv?"], 16),
        (["attentions.0", "conv_in"], 37),
    ],
)
def test_modules_to_not_convert_stay_float(folder: Path, patterns: list[str], count: int) -> None:
    everything, model = load(folder), load(folder, {"modules_to_not_convert": patterns})
    names = set(loaded_layers(everything)) - set(loaded_layers(model))
    assert len(names) == count
    for name in names:
        assert type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear)
        assert model.get_submodule(name).weight.dtype == torch.float32
        assert any(p.strip("*?") in name for p in patterns)
    assert model.get_memory_footprint() > everything.get_memory_footprint()


def test_pattern_that_matches_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="pattern 'to_z' matches no layer; layers are e.g."):
        load(folder, {"modules_to_not_convert": ["to_z"]})


def test_nothing_left_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no layer left to quantize"):
        load(folder, {"modules_to_not_convert": ["*"]})


def test_modules_kept_in_float32_by_their_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    small = {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 16}
    WanTransformer3DModel(patch_size=(1, 2, 2), **shape, **small).save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=AdpdmConfig(weight_bits=4), torch_dtype=torch.bfloat16
    )
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "time_embedder" in n]
    assert len(kept) == 2
    for name in kept:
        assert type(model.get_submodule(name)) is nn.Linear
        assert model.get_submodule(name).weight.dtype == torch.float32
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(kept) == set(
        loaded_layers(model)
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16, torch.uint8, torch.int8}
    with torch.no_grad():
        x, text = random(1, 4, 1, 4, 4).bfloat16(), random(1, 3, 16).bfloat16()
        output = model(x, torch.tensor([500]), text).sample
    assert output.isfinite().all()
    model.save_pretrained(tmp_path / "quantized")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor([500]), text).sample, output)


@both_kinds
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folder: Path, settings: dict[str, Any], device_map: Any) -> None:
    model = load(folder, settings, device_map=device_map)
    assert model.hf_device_map is not None
    if not torch.cuda.is_available():
        assert model.device == torch.device("cpu")
    assert torch.equal(run(model).cpu(), run(load(folder, settings).to(model.device)).cpu())


def test_quantizing_to_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    # diffusers would write the float weight past the quantizer.
    with pytest.raises(ValueError, match=r"device_map puts \['mid_block'\] on disk"):
        load(folder, device_map={"": "cpu", "mid_block": "disk"}, offload_folder=str(tmp_path))


@every_config
def test_dequantize_gives_the_float_model_of_the_codes(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = load(folder, settings)
    weight_only = load(folder, {**settings, "activation_bits": None})
    wanted = run(weight_only)
    model.dequantize()
    assert not [m for m in model.modules() if isinstance(m, CodedLayer)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(run(model), wanted)
    model.half().float()  # a float model like any other
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert "quantization_config" not in again.config
    assert all(type(m) is nn.Linear for m in again.modules() if isinstance(m, nn.Linear))


class Adapter(nn.Module):
    """A linear layer with a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        output: Tensor = self.base(x, *args) + self.up(self.down(x))
        return output


def with_adapters(model: Any) -> list[Adapter]:
    """Freeze the model and put adapters on its attention."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    adapters = []
    for module in model.modules():
        if hasattr(module, "to_k"):
            for name in ("to_q", "to_k", "to_v"):
                adapters.append(Adapter(getattr(module, name)))
                setattr(module, name, adapters[-1])
    return adapters


@every_config
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_training_of_adapters(folder: Path, settings: dict[str, Any], autocast: bool) -> None:
    model = load(folder, settings).train()
    adapters = with_adapters(model)
    assert len(adapters) == 24
    with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(**inputs()).sample.norm().backward()
    for adapter in adapters:
        assert adapter.up.weight.grad is not None
        assert float(adapter.up.weight.grad.norm()) > 0


@both_kinds
def test_peft_adapters_learn(folder: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model, target = load(folder, settings), run(tiny_conditional_unet(seed=1))
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION))
    trained = [p for p in model.parameters() if p.requires_grad]
    codes = {name: m.weight.clone() for name, m in loaded_layers(model).items()}
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(8):
        loss = (model(**inputs()).sample - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(m.weight, codes[name]) for name, m in loaded_layers(model).items())


@pytest.mark.parametrize("name", ["w8", "w8a8"])
def test_gradients_are_near_those_of_the_float_model(folder: Path, name: str) -> None:
    gradients = []
    for model in (load(folder, CONFIGS[name]), tiny_conditional_unet()):
        adapters = with_adapters(model)
        (model(**inputs()).sample * random(2, 4, 8, 8, seed=2)).sum().backward()
        gradients.append([adapter.up.weight.grad.flatten() for adapter in adapters])
    for got, wanted in zip(*gradients, strict=True):
        assert float(torch.cosine_similarity(got, wanted, 0)) > 0.99


def test_is_trainable_says_that_gradients_pass(folder: Path, calibrated: Any) -> None:
    assert load(folder, CONFIGS["w8a8"]).hf_quantizer.is_trainable
    assert calibrated.hf_quantizer.is_trainable


def test_dequantize_of_a_calibrated_model_leaves_nothing_of_adpdm(calibrated: Any) -> None:
    x = random(2, 1, 8, 8)
    with torch.no_grad():
        wanted = calibrated(x, 750).sample
        calibrated.dequantize()
        assert 0 < relative(calibrated(x, 750).sample, wanted) < 0.2
    assert not [name for name in calibrated.state_dict() if "adpdm" in name or "quantizer" in name]
    assert not calibrated._forward_pre_hooks
    assert "quantization_config" not in calibrated.config
    original = tiny_unet()
    for name, parameter in calibrated.named_parameters():
        if name.endswith("weight"):
            assert relative(parameter.detach(), original.get_parameter(name).detach()) < 0.01


# ---- torch.compile, offloading (groups: test_group_offload.py), copies -------------------------------------


@pytest.fixture
def no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["w4", "w4a8"])
def test_compiles_to_one_graph_for_all_timesteps(tmp_path: Path, name: str, no_recompiles: None) -> None:
    small = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    tiny_conditional_unet(**small).save_pretrained(tmp_path)
    model = load(tmp_path, CONFIGS[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = [run(compiled, timestep=torch.tensor(t)) for t in (830, 498, 0)]
    assert not torch.equal(outputs[0], outputs[2])
    for got, t in zip(outputs, (830, 498, 0), strict=True):
        assert torch.equal(got, run(model, timestep=torch.tensor(t)))


def test_model_cpu_offload(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    mapping = {"unet": AdpdmConfig(weight_bits=4, activation_bits=8)}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    images = []
    for offload in (False, True):
        pipe = DDIMPipeline.from_pretrained(tmp_path, quantization_config=config)
        pipe.set_progress_bar_config(disable=True)
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()


@both_kinds
def test_copies_are_independent(folder: Path, settings: dict[str, Any]) -> None:
    model = load(folder, settings)
    wanted = run(model)  # packed by now
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), wanted)
        for layer in loaded_layers(copied).values():
            layer.weight_scale.mul_(2)
            layer.drop_packed()
        assert not torch.equal(run(copied), wanted)
        assert torch.equal(run(model), wanted)


def test_calibrated_model_can_be_pickled(calibrated: Any) -> None:
    model, x = calibrated, random(2, 1, 8, 8)
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for timestep in (750, 0):
            assert torch.equal(copied(x, timestep).sample, model(x, timestep).sample)
    assert copied.adpdm_step is not model.adpdm_step
    assert all(
        layer.quantizers[0].step is copied.adpdm_step for layer in adpdm.nn.quant_layers(copied).values()
    )
