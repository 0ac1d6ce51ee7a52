"""`adpdm doctor`: right about kernels, CUDA, threads and the layers of a saved model, as text and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

import adpdm
from adpdm import AdpdmConfig, QuantConfig, _native, cli, doctor
from adpdm.doctor import LEVELS, Advice, LayerState, ModelState
from adpdm.layer_runs import recorded_coverage
from adpdm.nn import quant_layers
from adpdm.testing import ONE_BLOCK, tiny_pipeline

VNNI, FAST_AVX512 = "avx512_vnni", LEVELS["avx512"]


def levels(
    active: str, features: tuple[str, ...], obstacle: str = "", **environment: str
) -> dict[str, tuple[str, str]]:
    found = doctor.cpu_levels(active, features, {"amx": obstacle}, environment)
    return {level.name: (level.state, level.reason) for level in found}


# ---- kernels -----------------------------------------------------------------------------------------------


def test_levels_are_those_that_the_extension_decides_by() -> None:
    build = _native.build_info()
    assert [k.name for k in doctor.diagnose().kernels if k.state == "used"] == [build["isa"]]
    if "ADPDM_CPU" not in os.environ:
        found = doctor.cpu_levels("", build["cpu_features"], build["isa_obstacles"], {})
        possible = [level.name for level in found if level.state == "available"]
        assert build["isa"] == [name for name in possible if name != "amx"][0]


def test_avx512_without_vnni_is_named() -> None:
    features = tuple(f for f in FAST_AVX512 if f != VNNI)
    state, reason = levels("avx2", features)["avx512"]
    assert state == "unavailable"
    assert reason == "the CPU lacks avx512_vnni, though it has avx512f, avx512bw, avx512vl, avx512dq"
    advice = doctor._kernel_advice(doctor.cpu_levels("avx2", features, {}, {}), features)
    assert [a.what for a in advice] == [f"AVX-512 is present but not enough of it: {reason}"]


def test_amx_is_used_only_on_request() -> None:
    features = LEVELS["amx"]
    assert levels("avx512", features)["amx"] == ("available", "only on request: set ADPDM_CPU=amx")
    (advice,) = doctor._kernel_advice(doctor.cpu_levels("avx512", features, {}, {}), features)
    assert "set ADPDM_CPU=amx" in advice.do
    assert levels("avx512", features, "Linux denied it")["amx"] == ("unavailable", "Linux denied it")
    assert levels("amx", features, ADPDM_CPU="amx")["amx"] == ("used", "")


def test_level_forced_by_the_environment_is_named() -> None:
    found = levels("avx2", FAST_AVX512, ADPDM_CPU="avx2")
    assert found["avx512"] == ("available", "ADPDM_CPU=avx2 asks for avx2")
    assert found["portable"] == ("available", "avx2 is faster")
    kernels = doctor.cpu_levels("avx2", FAST_AVX512, {}, {"ADPDM_CPU": "avx2"})
    assert [a.do for a in doctor._kernel_advice(kernels, FAST_AVX512)] == ["unset ADPDM_CPU"]


def test_avx512_encodes_avx_vnni_too() -> None:
    assert levels("avx512", FAST_AVX512)["avx_vnni"] == ("available", "avx512 is faster")
    assert levels("avx_vnni", FAST_AVX512, ADPDM_CPU="avx_vnni")["avx_vnni"] == ("used", "")
    features = tuple(f for f in FAST_AVX512 if f != VNNI)
    assert levels("avx2", features)["avx_vnni"] == ("unavailable", "the CPU lacks avx_vnni")


def test_avx_vnni_is_used_where_there_is_no_avx512() -> None:
    features = LEVELS["avx_vnni"]
    found = levels("avx_vnni", features)
    assert (found["avx_vnni"][0], found["avx2"]) == ("used", ("available", "avx_vnni is faster"))
    assert doctor._kernel_advice(doctor.cpu_levels("avx_vnni", features, {}, {}), features) == []


def test_build_without_avx_vnni_is_named() -> None:
    features = LEVELS["avx_vnni"]
    kernels = doctor.cpu_levels("avx2", features, {"avx_vnni": "the compiler has none"}, {})
    (advice,) = doctor._kernel_advice(kernels, features)
    assert advice.what == "this CPU's AVX-VNNI is not used: the compiler has none"


def test_old_cpu_is_told_what_to_expect() -> None:
    (advice,) = doctor._kernel_advice(doctor.cpu_levels("portable", (), {}, {}), ())
    assert advice.what == "no vector instructions that adpdm has kernels for"


# ---- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "capability", "how"),
    [
        ("80-real", (8, 0), "code"),
        ("80-real", (8, 6), "code"),
        ("80-real", (9, 0), ""),
        ("80-virtual", (9, 0), "ptx"),
        ("80-virtual", (7, 5), ""),
        ("80", (8, 9), "code"),
        ("80", (12, 0), "ptx"),
        ("90a-real", (9, 0), "code"),
        ("90a-real", (10, 0), ""),
        ("86-real", (8, 0), ""),
    ],
)
def test_which_builds_serve_which_devices(entry: str, capability: tuple[int, int], how: str) -> None:
    assert doctor.covers(entry, capability) == how


@pytest.mark.parametrize(
    ("archs", "device", "what"),
    [
        ("", (9, 0), "CUDA device 0 (sm_90) is not used: the extension was built without CUDA"),
        ("90a-real", (8, 0), "CUDA device 0 (sm_80) has no kernels: the build is for 90a-real"),
        ("80-real;80-virtual", (12, 0), "CUDA device 0 (sm_120) has kernels as PTX only"),
        ("90-real", (9, 0), "CUDA device 0 (sm_90) runs without wgmma: the build is for 90-real"),
    ],
)
def test_device_that_the_build_does_not_serve_well(archs: str, device: tuple[int, int], what: str) -> None:
    (advice,) = doctor.cuda_advice(archs, [device], "13.0")
    assert advice.what.startswith(what)


def test_device_that_the_build_serves_needs_no_advice() -> None:
    default = "80-real;90a-real;80-virtual"
    assert doctor.cuda_advice(default, [(8, 0), (8, 6), (9, 0)], "13.0") == []


# ---- threads -----------------------------------------------------------------------------------------------


def threads(**changes: Any) -> list[Advice]:
    facts = {"torch_threads": 8, "usable_cpus": 8, "cpu_quota": None, "load_average": "0.50"}
    return doctor.thread_advice({**facts, "OMP_NUM_THREADS": None, **changes})


def test_as_many_threads_as_cpus_need_no_advice() -> None:
    assert threads() == []


@pytest.mark.parametrize("limit", [{"usable_cpus": 4}, {"cpu_quota": "4.50"}])
def test_more_threads_than_cpus_are_oversubscription(limit: dict[str, Any]) -> None:
    (advice,) = threads(**limit, OMP_NUM_THREADS="8")
    assert advice.what == "8 threads share 4 CPUs (OMP_NUM_THREADS is 8)"
    assert advice.do.startswith("set OMP_NUM_THREADS=4 ")


def test_idle_cpus_and_busy_machines_are_named() -> None:
    (advice,) = threads(torch_threads=2)
    assert advice.what == "2 of 8 usable CPUs work for one call"
    assert advice.do.endswith("run 4 processes")
    (advice,) = threads(load_average="3.10")
    assert advice.what == "the load average is 3.1 on 8 CPUs: others are at work here"


def test_thread_facts_are_those_of_this_process() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        facts = doctor.thread_facts({"OMP_NUM_THREADS": "5"})
    finally:
        torch.set_num_threads(before)
    assert (facts["torch_threads"], facts["kernel_threads"], facts["OMP_NUM_THREADS"]) == (2, 2, "5")


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", "1.50")])
def test_quota_of_a_control_group_is_read(text: str, quota: str | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert doctor._cpu_quota(tmp_path / "cpu.max") == quota
    assert doctor._cpu_quota(tmp_path / "none") is None


# ---- models ------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "num_inference_steps": 2,
    "num_groups": 2,
    "histogram_images": 2,
    "grouping": "uniform",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized pipeline with its report; one convolution was left out."""
    folder = tmp_path_factory.mktemp("doctor") / "quantized"
    pipe = tiny_pipeline(**ONE_BLOCK)
    excluded = ("mid_block.resnets.0.conv2",)
    settings = QuantConfig(**QUICK, modules_to_not_convert=excluded, input_output_bits=8)
    report = adpdm.quantize(pipe, settings)
    pipe.save_pretrained(folder)
    (folder / doctor.REPORT_NAME).write_text(json.dumps(report.to_dict()))
    return folder


def test_layers_of_a_saved_model(saved: Path) -> None:
    model = doctor.model_state(saved)
    layers = {layer.name: layer for layer in model.layers}
    assert layers["down_blocks.0.resnets.0.conv1"].runs == "fused"
    assert layers["down_blocks.0.resnets.0.conv1"].bits == (8, 8)
    alone = layers["mid_block.resnets.0.conv1"]
    assert alone.runs == "per layer"
    assert alone.reason == "mid_block.resnets.0 (ResnetBlock2D): conv2 is not quantized"
    assert layers["mid_block.resnets.0.conv2"].reason == "excluded by modules_to_not_convert"
    assert layers["time_embedding.linear_1"].reason == "embedding path"
    assert layers["conv_in"].shape == "conv 3x3 1->8"
    assert sum(layer.macs or 0 for layer in model.layers) == pytest.approx(1)
    by_state = {runs: sum(x.runs == runs for x in model.layers) for runs in ("fused", "per layer", "float")}
    assert by_state["fused"] + by_state["per layer"] == len(quant_layers(adpdm.load_pipeline(saved).unet))


def test_reason_of_a_float_layer_is_that_of_the_record(tmp_path: Path) -> None:
    pipe = tiny_pipeline(**ONE_BLOCK)
    # As the class of a model may pad; the one that loads here does not.
    pipe.unet.mid_block.resnets[0].conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    report = adpdm.quantize(pipe, QuantConfig(**QUICK))
    pipe.save_pretrained(tmp_path)
    (tmp_path / doctor.REPORT_NAME).write_text(json.dumps(report.to_dict()))
    layers = {layer.name: layer for layer in doctor.model_state(tmp_path).layers}
    wanted = "padding (1, 1) with mode 'circular' is not supported"
    assert layers["mid_block.resnets.0.conv2"].reason == wanted
    (tmp_path / doctor.REPORT_NAME).unlink()  # all that is left is the model
    layers = {layer.name: layer for layer in doctor.model_state(tmp_path).layers}
    assert layers["time_embedding.linear_1"].reason == "embedding path"
    assert layers["mid_block.resnets.0.conv2"].reason == "not reached by the traced forward pass"


def test_report_says_the_same_of_every_layer(saved: Path) -> None:
    recorded = recorded_coverage(json.loads((saved / doctor.REPORT_NAME).read_text())).layers
    found = {x.name: (x.runs, x.macs, x.reason) for x in doctor.model_state(saved).layers}
    assert {x.name: (x.runs, x.macs_share) for x in recorded} == {k: v[:2] for k, v in found.items()}
    assert all(found[x.name][2].endswith(x.reason) for x in recorded)


def test_advice_names_slow_layers_and_what_to_do(saved: Path) -> None:
    advice = {a.what: a.do for a in doctor.model_advice(doctor.model_state(saved))}
    first = next(what for what in advice if what.startswith("conv_in "))
    assert "fills 12.5% of its tiles" in first  # 8 of 16 outputs, 1 of 4 channels
    assert "--exclude 'conv_in'" in advice[first]
    block = "runs one layer after the other: mid_block.resnets.0 (ResnetBlock2D): conv2 is not quantized"
    assert advice[block].startswith("quantize that layer too")


def test_float_work_is_named_where_it_is_large() -> None:
    layers = [
        LayerState("a", "conv 3x3 8->8", "float", "excluded by modules_to_not_convert", None, None, 0.4),
        LayerState("b", "linear 8->8", "float", "embedding path", None, None, 0.01),
        LayerState("c", "conv 3x3 8->16", "fused", "", (8, 8), 1.0, 0.59),
    ]
    (advice,) = doctor.model_advice(ModelState("x", "UNet2DModel", "", layers))
    assert (
        advice.what
        == "a (conv 3x3 8->8, 40.0% of the work) runs in float: excluded by modules_to_not_convert"
    )


def test_model_that_is_not_quantized_is_told_so(tmp_path: Path) -> None:
    tiny_pipeline(**ONE_BLOCK).save_pretrained(tmp_path / "float")
    model = doctor.model_state(tmp_path / "float")
    assert {layer.runs for layer in model.layers} == {"float"}
    assert {layer.reason for layer in model.layers} == {"the model is not quantized"}
    (advice,) = doctor.model_advice(model)
    assert advice.do == f"adpdm quantize {tmp_path / 'float'} --out DIR --bits w8a8"


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_layers_that_were_quantized_while_loading(tmp_path: Path, activation_bits: int | None) -> None:
    tiny_pipeline(**ONE_BLOCK).save_pretrained(tmp_path / "float")
    config = AdpdmConfig(activation_bits=activation_bits, modules_to_not_convert=["mid_block"])
    unet = UNet2DModel.from_pretrained(tmp_path / "float" / "unet", quantization_config=config)
    pipe = adpdm.load_pipeline(tmp_path / "float", unet=unet)
    pipe.save_pretrained(tmp_path / "loaded")
    model = doctor.model_state(tmp_path / "loaded")
    layers = {layer.name: layer for layer in model.layers}
    kept, layer = layers["mid_block.resnets.0.conv1"], layers["down_blocks.0.resnets.0.conv1"]
    assert (kept.runs, kept.reason) == ("float", "AdpdmConfig left it out")
    if activation_bits is None:
        assert layer.runs == "float"
        assert layer.reason == "its 8-bit weight becomes float at every call, as AdpdmConfig says"
    else:
        assert (layer.runs, layer.bits) == ("per layer", (8, 8))
        assert any("adpdm.quantize" in advice.do for advice in doctor.model_advice(model))


@pytest.mark.parametrize(
    ("layer", "weight_bits", "share"),
    [
        (torch.nn.Conv2d(64, 64, 3), 8, 1.0),
        (torch.nn.Conv2d(24, 24, 3, groups=24), 8, 24 / 32),  # depthwise
        (torch.nn.Conv2d(16, 32, 3, groups=16), 8, 2 / 64),
        (torch.nn.Conv2d(33, 16, 1), 8, 33 / 36),
        (torch.nn.Conv2d(33, 16, 1), 4, 33 / 40),  # nibbles come in pairs of quads
        (torch.nn.Linear(32, 24), 8, 24 / 32),
    ],
)
def test_share_of_tiles_that_a_layer_fills(layer: Any, weight_bits: int, share: float) -> None:
    from adpdm.nn import QuantConv2d, QuantLinear
    from adpdm.step import StepState

    kind = QuantConv2d if isinstance(layer, torch.nn.Conv2d) else QuantLinear
    twin = kind.of(layer, (weight_bits, 8), 1, 0, StepState(1, 1), None)
    assert doctor.tile_share(twin) == pytest.approx(share)


# ---- the command -------------------------------------------------------------------------------------------


def test_command_prints_text_or_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(saved)]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
    layers = f"layers of {saved} (UNet2DModel)"
    assert titles == ["machine and build", "CPU kernels", "threads", layers, "fused", "what to do"]
    assert cli.main(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"] is None
    assert [k["name"] for k in values["kernels"]] == list(LEVELS)
    assert values["facts"]["adpdm"] == adpdm.__version__


def test_folder_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", str(tmp_path / "nothing")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "doctor: wanted the folder of a saved pipeline, got" in error
