"""Equalization: where it folds, that the float model stays the same, and what must be refused afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_cases import STEPS, make_case, noise

import adpdm
from adpdm import QuantConfig, equalize
from adpdm.equalize import Rows, channel_factors, find_sites, is_wanted
from adpdm.nn.dataflow import Dataflow
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_transformer, tiny_unet
from adpdm.trajectory import Sampler

LABELS = {"class_labels": torch.tensor([0, 1, 2])}
EXACT = 1e-5  # relative; factors are no powers of two, so float32 rounds differently


def config(**changes: Any) -> QuantConfig:
    settings: dict[str, Any] = {"num_groups": 2, "num_inference_steps": STEPS, "histogram_images": 3}
    return QuantConfig(**{**settings, "grouping": "dp", "equalization": "on", **changes})


def uneven_transformer() -> Any:
    """Channels of all inputs, up to 2^6 apart, as trained adaptive norms make them."""
    model = tiny_transformer()
    spread = 2.0 ** torch.linspace(-3, 3, 16)
    block: Any = model.transformer_blocks[0]
    width = len(spread)
    with torch.no_grad():
        for part in (0, 1, 3, 4):  # shift and scale of attention and of the feed-forward net
            block.norm1.linear.weight[part * width : (part + 1) * width] *= spread[:, None]
            block.norm1.linear.bias[part * width : (part + 1) * width] *= spread
        block.attn1.to_v.weight *= spread[:, None]
    return model


def sites_of(model: nn.Module, forward: Any) -> list[tuple[list[str], list[str]]]:
    """Names of what makes an input, and of its readers."""
    names = {module: name for name, module in model.named_modules()}
    layers = {m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return [
        (sorted({names[m.layer] for m in site.makers}), [names[r] for r in site.readers])
        for site in find_sites(Dataflow.of(model, forward), layers)
    ]


def quantized(model: Any, **changes: Any) -> adpdm.QuantizationReport:
    return adpdm.quantize(model, config(**changes), scheduler=ddim_scheduler(), conditioning=LABELS)


def equalized_model() -> Any:
    model = uneven_transformer()
    quantized(model, activation_bits=6)
    return model


# ---- where it folds ----------------------------------------------------------------------------------------


def test_adaptive_norms_and_values_of_a_transformer_are_found() -> None:
    model = tiny_transformer()
    block = "transformer_blocks.0."
    assert sites_of(model, lambda: model(noise(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))) == [
        ([block + "norm1.linear"], [f"{block}attn1.{name}" for name in ("to_q", "to_k", "to_v")]),
        ([block + "attn1.to_v"], [block + "attn1.to_out.0"]),
        ([block + "norm1.linear"], [block + "ff.net.0.proj"]),
        (["proj_out_1"], ["proj_out_2"]),
    ]


def test_norms_with_weights_are_found_but_not_before_a_nonlinearity() -> None:
    model = tiny_conditional_unet()
    found = sites_of(model, lambda: model(noise(1, 4, 8, 8), 3, noise(1, 5, 8)))
    mid = "mid_block.attentions.0."
    block = mid + "transformer_blocks.0."
    assert [(a, b) for a, b in found if b[0].startswith("mid_block")] == [
        ([mid + "norm"], [mid + "proj_in"]),
        ([block + "norm1"], [f"{block}attn1.{name}" for name in ("to_q", "to_k", "to_v")]),
        ([block + "attn1.to_v"], [block + "attn1.to_out.0"]),
        ([block + "norm2"], [block + "attn2.to_q"]),
        ([block + "attn2.to_v"], [block + "attn2.to_out.0"]),
        ([block + "norm3"], [block + "ff.net.0.proj"]),
    ]
    assert not [b for _, b in found if b[0].endswith(("conv1", "conv2", "ff.net.2"))]  # behind SiLU and GEGLU


def test_values_of_text_and_image_take_one_factor() -> None:
    case = make_case("sd3")
    sampler = case.sampler(case.denoiser)
    sample = noise(1, *sampler.sample_shape)

    def forward() -> Tensor:
        return sampler.predict(sample, sampler.calls[0], sampler.conditions(0, 1))

    block = "transformer_blocks.0.attn."
    assert ([block + "add_v_proj", block + "to_v"], [block + "to_out.0", block + "to_add_out"]) in sites_of(
        case.denoiser, forward
    )


class Reader(nn.Module):
    """A norm and a linear layer that reads it; subclasses do more with what the norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x))
        return result


class Residual(Reader):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        return seen + self.linear(seen)  # type: ignore[no-any-return]


class InPlace(Reader):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        result: Tensor = self.linear(seen)
        seen += 1
        return result


class Twice(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.linear(x)  # type: ignore[no-any-return]


class Reshaped(Reader):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x).flatten().reshape(-1, 4).to(torch.float32))
        return result


@pytest.mark.parametrize(
    ("kind", "count"), [(Reader, 1), (Reshaped, 1), (Residual, 0), (InPlace, 0), (Twice, 0)]
)
def test_an_input_folds_if_known_layers_alone_use_it(kind: type[Reader], count: int) -> None:
    model = kind()
    assert len(sites_of(model, lambda: model(noise(2, 3, 4)))) == count


def test_a_reader_that_stays_float_keeps_the_others_from_folding() -> None:
    model = tiny_transformer()
    forward = lambda: model(noise(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))  # noqa: E731
    attention: Any = model.transformer_blocks[0].attn1
    flow = Dataflow.of(model, forward)
    assert list(find_sites(flow, {attention.to_q, attention.to_v})) == []
    assert len(list(find_sites(flow, {attention.to_q, attention.to_k, attention.to_v}))) == 1


# ---- the float model stays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "sdxl"])
def test_predictions_stay(name: str) -> None:
    case = make_case(name)
    sampler = case.sampler(case.denoiser)
    run = sampler.run(5, 0, 2)
    layers = {n for n, m in case.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def forward() -> None:
        sampler.predict(run.samples[0, :1], sampler.calls[0], sampler.conditions(0, 1))

    with torch.no_grad():
        found = equalize.equalize(sampler, layers, config(), forward, lambda *_: None)
        assert found.warning == ""
        assert len(found.changed) >= 4
        assert max(found.spread.values()) > 1.1
        for call, timestep in enumerate(sampler.calls):
            seen = sampler.predict(run.samples[call], timestep, run.conditioning)
            wanted = run.noise_preds[call]
            assert float((seen - wanted).norm() / wanted.norm()) < EXACT


def test_norms_without_a_bias_take_part() -> None:
    model = tiny_unet()
    attention: Any = model.up_blocks[0].attentions[0]
    attention.to_out[0] = nn.Sequential(nn.RMSNorm(16), attention.to_out[0])
    report = adpdm.quantize(model, config(activation_bits=6, grouping="shared"), scheduler=ddim_scheduler())
    assert report.trace.warnings == []
    assert report.trace.equalization["up_blocks.0.attentions.0.to_out.0.1"] > 1


def test_a_fold_that_changes_the_model_is_put_back_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "divide", lambda self, factors: None)
    model, untouched = uneven_transformer(), uneven_transformer()
    report = quantized(model, activation_bits=6)
    assert [w for w in report.trace.warnings if "equalization changed the float model by" in w]
    assert report.trace.equalization == {}
    quantized(untouched, activation_bits=6, equalization="off")
    other = untouched.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_interrupt_puts_the_parameters_back() -> None:
    model = uneven_transformer()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "partition":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(model, config(), scheduler=ddim_scheduler(), conditioning=LABELS, progress=interrupt)
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, i) for n, (i, _) in before.items()]
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


# ---- what it gains, and when -------------------------------------------------------------------------------


def test_factors_even_channels_out_by_the_root() -> None:
    factors = channel_factors(torch.tensor([16.0, 1.0, 1 / 16, 1.0]))  # root mean squares 4, 1, 1/4, 1
    assert factors.tolist() == pytest.approx([2.0, 1.0, 0.5, 1.0])


def test_factors_of_silent_channels_stay_finite() -> None:
    assert channel_factors(torch.tensor([0.0, 0.0])).tolist() == [1.0, 1.0]
    factors = channel_factors(torch.tensor([0.0, 4.0]))
    assert float(factors[1] / factors[0]) == pytest.approx((2 / 1e-3) ** 0.5)  # of a mean of 1


def prediction_error(model: Any) -> float:
    """Mean squared error against the float model along its trajectory."""
    original = uneven_transformer()
    sampler = Sampler(original, ddim_scheduler(), (1, 8, 8), STEPS, LABELS)
    run = sampler.run(9, 0, 3)
    other = Sampler(model, ddim_scheduler(), (1, 8, 8), STEPS, LABELS)
    with torch.no_grad():
        made = [
            other.predict(x, t, run.conditioning) for x, t in zip(run.samples, sampler.calls, strict=True)
        ]
    return float((torch.stack(made) - run.noise_preds).square().mean())


def test_uneven_channels_lose_less() -> None:
    plain, even = uneven_transformer(), uneven_transformer()
    quantized(plain, activation_bits=5, equalization="off")
    quantized(even, activation_bits=5)
    assert prediction_error(even) < 10**-0.2 * prediction_error(plain)  # by 2 dB at least


AUTO = [(8, 8, False), (8, 6, True), (6, 6, True), (4, 8, False), (4, 6, False), (4, 4, True)]


@pytest.mark.parametrize(("weight_bits", "activation_bits", "wanted"), AUTO)
def test_auto_follows_the_bits(weight_bits: int, activation_bits: int, wanted: bool) -> None:
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    assert is_wanted(config(equalization="auto", **bits)) == wanted
    assert is_wanted(config(equalization="on", **bits))
    assert not is_wanted(config(equalization="off", **bits))


def test_nothing_to_fold_is_no_error() -> None:
    model = tiny_unet(**ONE_BLOCK)
    report = adpdm.quantize(model, config(activation_bits=6), scheduler=ddim_scheduler())
    assert report.trace.equalization == {}
    assert "equalized" not in model.config.quantization_config.to_dict()


# ---- what must be known afterwards -------------------------------------------------------------------------


def test_checkpoint_says_which_modules_changed(tmp_path: Path) -> None:
    model = equalized_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    x = noise(2, 1, 8, 8)
    given = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([0, 1])}
    with torch.no_grad():
        assert torch.equal(model(x, **given).sample, loaded(x, **given).sample)
    equalized = loaded.config.quantization_config.to_dict()["equalized"]
    assert {"transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn1.to_q"} <= set(equalized)


@pytest.mark.parametrize("target", ["to_q", "norm1.linear"])  # one quantized, one float
@pytest.mark.parametrize("way", ["made", "loaded", "dequantized", "quantized again", "loaded again"])
def test_adapters_on_changed_modules_are_refused(target: str, way: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = equalized_model()
    if way in ("dequantized", "quantized again", "loaded again"):
        model.dequantize()
    if way in ("quantized again", "loaded again"):
        quantized(model, equalization="off")
    if way in ("loaded", "loaded again"):
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapters are made for the channels of the float model"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target]), model)


def test_adapters_on_other_modules_work() -> None:
    peft = pytest.importorskip("peft")
    model = equalized_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["ff.net.2"]), model)
    with torch.no_grad():
        model(noise(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0]))


def test_tables_of_a_changed_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="equalization changed weights of layers that are not quantized"):
        adpdm.save_tables(equalized_model(), tmp_path / "tables.safetensors")


@pytest.mark.parametrize("names", ["no list", [3]])
def test_checkpoint_with_other_than_names_is_refused(names: Any) -> None:
    settings = equalized_model().config.quantization_config.to_dict()
    with pytest.raises(ValueError, match="equalized must be a list of names"):
        adpdm.AdpdmConfig.from_dict({**settings, "equalized": names})


def test_checkpoint_with_unknown_modules_is_refused(tmp_path: Path) -> None:
    model = equalized_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"]["equalized"][0] = "nowhere"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="equalized must name modules of DiTTransformer2DModel, got"):
        type(model).from_pretrained(tmp_path)
