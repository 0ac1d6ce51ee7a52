"""`adpdm.quantize` on whole denoisers: groupings, schedulers, sampling, interrupts and bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, SearchConfig
from adpdm.nn import Coverage, describe_layers, quant_layers
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_pipeline, tiny_unet
from adpdm.trajectory import Sampler

STEPS = 6


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 3,
        "num_inference_steps": STEPS,
        "calibration_images": 6,
        "round_size": 2,
        "histogram_images": 8,
        "search": SearchConfig(num_steps=6, refit_steps=2, batch_size=2),
    }
    return QuantConfig(**{**values, **changes})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predictions(
    denoiser: nn.Module, steps: tuple[int, ...] = (999, 500, 0), **conditioning: Tensor
) -> Tensor:
    """Noise predictions of two fixed images at a few timesteps."""
    settings: Any = denoiser.config
    x = noise(2, settings.in_channels, 8, 8)
    with torch.no_grad():
        return torch.stack([denoiser(x, t, **conditioning).sample for t in steps])


def worst_error(denoiser: nn.Module, original: nn.Module, steps: int, batch: int = 2, size: int = 8) -> float:
    """Largest share of a prediction's energy that quantization spoils, over a float trajectory."""
    settings: Any = original.config
    sampler = Sampler(original, ddim_scheduler(), (settings.in_channels, size, size), steps)
    run = sampler.run(7, 0, batch)
    with torch.no_grad():
        errors = [
            (denoiser(x, t).sample - pred).square().mean() / pred.square().mean()
            for x, t, pred in zip(run.samples, sampler.timesteps, run.noise_preds, strict=True)
        ]
    return float(max(errors))


# 8 bits on every layer of the tiny models leave under 1 % of the energy (measured: 0.3 to 0.8 %). A wrong
# scale, segment or halo anywhere costs ten times that.
TOLERATED = 0.02


def state_bytes(denoiser: nn.Module) -> bytes:
    return safetensors.torch.save({k: v.contiguous() for k, v in denoiser.state_dict().items()})


@pytest.fixture(scope="module")
def quantized() -> Any:
    """A pipeline after the paper's method at 8 bits; tests must not change it."""
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config())
    return pipe


# ---- what comes out ----------------------------------------------------------------------------------------


# Every grouping with one selection; every selection with the search, which generates images at its choices.
@pytest.mark.parametrize(
    ("grouping", "selection"),
    [
        *((grouping, "srm") for grouping in ("shared", "uniform", "per_step", "dp", "search")),
        *(("search", selection) for selection in ("uniform", "normal", "random")),
    ],
)
def test_quantize_every_grouping_and_selection(grouping: str, selection: str) -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    settings = config(grouping=grouping, selection=selection, num_inference_steps=4, num_groups=2)
    report = adpdm.quantize(denoiser, settings, scheduler=ddim_scheduler())
    groups = {"shared": 1, "per_step": 4}.get(grouping, 2)
    for layer in quant_layers(denoiser).values():
        assert layer.is_frozen
        assert layer.weight.dtype == torch.int8
        assert [q.scale.numel() for q in layer.quantizers] == [groups] * len(layer.quantizers)
    assert report.config == settings
    assert (report.trace.outcome is not None) == (grouping == "search")
    assert len(report.trace.rounds) == (3 if grouping == "search" else 0)
    assert report.timesteps == [750.0, 500.0, 250.0, 0.0]
    assert worst_error(denoiser, tiny_unet(**ONE_BLOCK), 4) < TOLERATED


def test_steps_that_the_selection_left_out_keep_ranges_of_their_own() -> None:
    """With a group per step, how often a step was chosen decides nothing."""
    settings = config(grouping="per_step", num_inference_steps=4)
    states = {}
    for selection, visits in (("srm", [1, 1, 1, 1]), ("normal", [0, 0, 1, 2])):
        denoiser = tiny_unet(**ONE_BLOCK)
        chosen = settings.replace(selection=selection)
        report = adpdm.quantize(denoiser, chosen, scheduler=ddim_scheduler())
        assert report.trace.visits == visits
        states[selection] = state_bytes(denoiser)
    assert states["normal"] == states["srm"]


def test_shared_groups_give_all_layers_one_table() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    adpdm.quantize(denoiser, config(shared_groups=True), scheduler=ddim_scheduler())
    table = denoiser.adpdm_step.table
    assert bool((table == table[:, :1]).all())
    assert len(table[:, 0].unique()) > 1


def test_report_is_plain_json() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    report = adpdm.quantize(denoiser, config(), scheduler=ddim_scheduler())
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert QuantConfig.from_dict(values["config"]) == report.config
    assert values["trace"]["outcome"]["gap_db"] == report.trace.outcome.gap_db


def test_layers_that_stay_float_have_a_reason() -> None:
    denoiser = tiny_unet()
    report = adpdm.quantize(
        denoiser,
        config(grouping="shared", modules_to_not_convert=("mid_block.*",)),
        scheduler=ddim_scheduler(),
    )
    reasons = {x.name: x.reason for x in report.layers}
    assert reasons["conv_in"] == reasons["conv_out"] == "input or output layer"
    assert reasons["time_embedding.linear_1"] == "embedding path"
    assert reasons["mid_block.resnets.0.time_emb_proj"] == "excluded by modules_to_not_convert"
    assert reasons["mid_block.resnets.0.conv1"] == "excluded by modules_to_not_convert"
    assert reasons["down_blocks.1.attentions.0.to_q"] == ""
    kept = {name for name, reason in reasons.items() if reason}
    assert kept.isdisjoint(quant_layers(denoiser))
    assert set(reasons) - kept == set(quant_layers(denoiser))
    assert type(denoiser.conv_in) is nn.Conv2d


def test_input_and_output_layers_are_quantized_to_eight_bits_on_request() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    adpdm.quantize(
        denoiser,
        config(grouping="shared", weight_bits=4, activation_bits=4, input_output_bits=8),
        scheduler=ddim_scheduler(),
    )
    layers = quant_layers(denoiser)
    for name in ("conv_in", "conv_out"):
        assert layers[name].weight_quantizer.num_bits == layers[name].quantizers[0].num_bits == 8
    assert layers["mid_block.resnets.0.conv1"].weight_quantizer.num_bits == 4


@pytest.mark.parametrize("split", [True, False])
def test_skip_concatenations_are_split_where_they_meet(split: bool) -> None:
    denoiser = tiny_unet()
    adpdm.quantize(
        denoiser, config(grouping="shared", split_skip_connections=split), scheduler=ddim_scheduler()
    )
    splits = {name: x.weight_quantizer.split for name, x in quant_layers(denoiser).items()}
    found = {name: value for name, value in splits.items() if value is not None}
    if not split:
        assert found == {}
        return
    # Every residual block of the up path reads a concatenation of its input with a skip.
    blocks = [f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(2)]
    assert sorted(found) == sorted(f"{b}.{c}" for b in blocks for c in ("conv1", "conv_shortcut"))
    assert found["up_blocks.0.resnets.0.conv1"] == 16
    assert found["up_blocks.1.resnets.1.conv1"] == 8


def test_coverage_of_a_typical_unet_is_above_97_percent() -> None:
    denoiser = tiny_unet(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    layers = describe_layers(denoiser, config(), lambda: denoiser(noise(1, 3, 32, 32), 10))
    assert Coverage.of(layers).macs > 0.97
    # An independent count: a 3x3 convolution from 32 to 32 channels on 32 x 32 pixels.
    macs = {x.name: x.macs for x in layers}
    assert macs["down_blocks.0.resnets.0.conv1"] == 32 * 32 * 32 * 32 * 9
    assert macs["down_blocks.1.attentions.0.to_q"] == 16 * 16 * 64 * 64


# ---- kinds of models and schedulers ------------------------------------------------------------------------


def test_conditional_unet_under_guidance() -> None:
    denoiser = tiny_conditional_unet()
    contexts = noise(3, 5, 8, seed=1)
    first, second = contexts[:2], contexts[1:]
    wanted = predictions(denoiser, (999,), encoder_hidden_states=first)
    settings = config(grouping="dp")
    report = adpdm.quantize(
        denoiser, settings, scheduler=ddim_scheduler(), conditioning={"encoder_hidden_states": contexts}
    )
    names = {x.name for x in report.layers if x.bits}
    assert (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in names
    )  # cross-attention reads the context
    error = predictions(denoiser, (999,), encoder_hidden_states=first) - wanted
    assert float(error.square().mean() / wanted.square().mean()) < TOLERATED
    # Guidance calls twice per step: what is in between must not count.
    once = predictions(denoiser, encoder_hidden_states=first)
    x, twice = noise(2, 4, 8, 8), []
    with torch.no_grad():
        for timestep in (999, 500, 0):
            twice.append(denoiser(x, timestep, encoder_hidden_states=first).sample)
            denoiser(x, timestep, encoder_hidden_states=second)
    assert torch.equal(torch.stack(twice), once)


@pytest.mark.parametrize(
    ("prompts", "texts"), [(["a cat", "a dog"], ["", "a cat", "a dog"]), ("a cat", ["", "a cat"])]
)
def test_prompts_are_encoded_with_the_empty_one(prompts: list[str] | str, texts: list[str]) -> None:
    asked: list[list[str]] = []

    def encode_prompt(
        prompt: list[str], device: str, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> tuple[Tensor, None]:
        asked.append(prompt)
        return noise(len(prompt), 5, 8).double(), None

    pipe = SimpleNamespace(
        unet=tiny_conditional_unet(), scheduler=ddim_scheduler(), encode_prompt=encode_prompt
    )
    adpdm.quantize(pipe, config(grouping="shared", histogram_images=3), prompts=prompts)
    assert asked == [texts]
    assert quant_layers(pipe.unet)


# ---- sampling afterwards -----------------------------------------------------------------------------------


def samples(pipe: Any, batch: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=batch, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(images)


@pytest.mark.parametrize(("batch", "steps"), [(1, STEPS), (3, STEPS), (2, 4), (2, 17), (1, 50)])
def test_predictions_at_other_step_counts_and_batches(quantized: Any, batch: int, steps: int) -> None:
    # Along the float trajectory: a random network is chaotic, so final samples would tell little.
    assert worst_error(quantized.unet, tiny_unet(), steps, batch) < TOLERATED


@pytest.mark.parametrize("steps", [STEPS, 4, 50])
def test_pipeline_samples_at_any_step_count(quantized: Any, steps: int) -> None:
    images = samples(quantized, 2, steps)
    assert images.shape == (2, 8, 8, 1)
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    assert torch.equal(images, samples(quantized, 2, steps))


@pytest.mark.parametrize("size", [12, 16, 20])
def test_other_resolutions_than_calibrated(quantized: Any, size: int) -> None:
    assert worst_error(quantized.unet, tiny_unet(), STEPS, size=size) < 2 * TOLERATED


def test_odd_rectangle(quantized: Any) -> None:
    x = noise(2, 1, 6, 14)
    with torch.no_grad():
        actual, wanted = quantized.unet(x, 999).sample, tiny_unet()(x, 999).sample
    assert actual.shape == x.shape
    assert float((actual - wanted).square().mean() / wanted.square().mean()) < 2 * TOLERATED


def test_empty_batch() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)  # the attention of diffusers cannot reshape an empty batch
    adpdm.quantize(denoiser, config(grouping="shared"), scheduler=ddim_scheduler())
    with torch.no_grad():
        assert denoiser(torch.zeros(0, 1, 8, 8), 500).sample.shape == (0, 1, 8, 8)


def test_timestep_tensor_of_the_batch(quantized: Any) -> None:
    x = noise(3, 1, 8, 8)
    with torch.no_grad():
        wanted = quantized.unet(x, 333).sample
        assert torch.equal(quantized.unet(x, timestep=torch.full((3,), 333)).sample, wanted)
        with pytest.raises(ValueError, match="mixes timesteps"):
            quantized.unet(x, torch.tensor([333, 333, 2]))


def test_deepcopied_pipeline_samples_alike(quantized: Any) -> None:
    other = copy.deepcopy(quantized)
    assert torch.equal(samples(other, 2, STEPS), samples(quantized, 2, STEPS))


def test_error_policy_refuses_other_timesteps() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    adpdm.quantize(denoiser, config(grouping="shared", timestep_policy="error"), scheduler=ddim_scheduler())
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        denoiser(noise(1, 1, 8, 8), timestep)
    with pytest.raises(ValueError, match="timestep_policy is 'error': got 10, calibrated are"):
        denoiser(noise(1, 1, 8, 8), 10)


def test_switched_groups_change_the_output(quantized: Any) -> None:
    x = noise(1, 1, 8, 8)
    with torch.no_grad():
        wanted = quantized.unet(x, 0).sample
        stuck = copy.deepcopy(quantized.unet)
        stuck.adpdm_step.table[:] = stuck.adpdm_step.table[
            :1
        ].clone()  # the noisiest step's groups everywhere
        assert not torch.equal(stuck(x, 0).sample, wanted)


# ---- repeatable, interruptible -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> bytes:
    """The state of a small denoiser after one whole run."""
    pipe = tiny_pipeline(**ONE_BLOCK)
    adpdm.quantize(pipe, config())
    return state_bytes(pipe.unet)


def test_one_seed_gives_identical_bytes(uninterrupted: bytes) -> None:
    again, other = tiny_pipeline(**ONE_BLOCK), tiny_pipeline(**ONE_BLOCK)
    torch.rand(3)  # the global generator must not matter
    adpdm.quantize(again, config())
    assert state_bytes(again.unet) == uninterrupted
    adpdm.quantize(other, config(seed=1))
    assert state_bytes(other.unet) != uninterrupted


class StopAfter:
    """A progress callback that presses Ctrl-C at a given point."""

    def __init__(self, phase: str, done: int) -> None:
        self.phase, self.done, self.phases = phase, done, []  # type: ignore[var-annotated]

    def __call__(self, phase: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.phases.append(phase)
        if phase == self.phase and done >= self.done:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("phase", "done"),
    [("trajectories", 3), ("partition", 2), ("bias correction", 3), ("search", 5), ("search", 8)],
)
def test_interrupt_restores_the_float_model(phase: str, done: int) -> None:
    pipe = tiny_pipeline()
    pipe.unet.train()
    pipe.unet.conv_in.weight.requires_grad_(False)
    wanted = predictions(pipe.unet)
    strides = [p.stride() for p in pipe.unet.parameters()]
    modules = [(name, type(m)) for name, m in pipe.unet.named_modules()]
    tensors = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(pipe, config(), progress=StopAfter(phase, done))
    assert [(name, type(m)) for name, m in pipe.unet.named_modules()] == modules
    assert [p.stride() for p in pipe.unet.parameters()] == strides
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks
    assert pipe.unet.training
    assert [n for n, p in pipe.unet.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    state = pipe.unet.state_dict()
    assert sorted(state) == sorted(tensors)
    assert all(torch.equal(state[k], tensors[k]) for k in tensors)
    assert torch.equal(predictions(pipe.unet), wanted)
    assert "quantization_config" not in pipe.unet.config


@pytest.mark.parametrize("done", [1, 5, 7])
def test_resumed_run_gives_the_same_bytes(uninterrupted: bytes, tmp_path: Path, done: int) -> None:
    state = tmp_path / "state.safetensors"
    pipe = tiny_pipeline(**ONE_BLOCK)
    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(pipe, config(), progress=StopAfter("search", done), state_file=state)
    # Rounds of two optimizer steps: stopped in the first round nothing is saved yet.
    assert state.exists() == (done > 2)
    watch = StopAfter("never", 0)
    report = adpdm.quantize(pipe, config(), progress=watch, state_file=state)
    assert ("resuming" in watch.phases) == (done > 2)
    assert state_bytes(pipe.unet) == uninterrupted
    assert [row["round"] for row in report.trace.rounds] == [0, 1, 2]
    assert len(report.trace.losses) == 8


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.norm1", "conv_in"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_reported_with_layer_and_timestep(name: str, value: float) -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    with torch.no_grad():
        denoiser.get_submodule(name).weight.view(-1)[0] = value
    first = "mid_block.resnets.0.conv2" if name.startswith("mid") else "down_blocks.0.resnets.0.conv1"
    message = f"the input of layer '{first}' at timestep 830 must be finite, got range"
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(denoiser, config(), scheduler=ddim_scheduler())


def refused(denoiser_or_pipe: Any, error: type[Exception], message: str, **arguments: Any) -> None:
    """Quantizing must fail with this message and leave the model as it was."""
    denoiser = getattr(denoiser_or_pipe, "unet", denoiser_or_pipe)
    is_module = isinstance(denoiser, nn.Module)
    before = [(p.requires_grad, p.stride()) for p in denoiser.parameters()] if is_module else []
    modules = len(list(denoiser.modules())) if is_module else 0
    with pytest.raises(error, match=message):
        adpdm.quantize(denoiser_or_pipe, arguments.pop("config", config()), **arguments)
    if is_module:
        assert [(p.requires_grad, p.stride()) for p in denoiser.parameters()] == before
        assert len(list(denoiser.modules())) == modules


def test_quantized_model_is_refused(quantized: Any) -> None:
    refused(quantized, ValueError, "UNet2DModel is quantized already; load the original again")
    by_another = tiny_unet()
    by_another.is_quantized = True  # as diffusers says of what bitsandbytes, torchao and others have changed
    refused(by_another, ValueError, "UNet2DModel is quantized already; load the original again")
    assert by_another.is_quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_wrong_dtype_is_refused(dtype: torch.dtype) -> None:
    message = rf"wanted float32 parameters on the CPU or on CUDA to calibrate, got .* as {dtype} on cpu"
    refused(tiny_pipeline().to(dtype), ValueError, message)


def test_bare_denoiser_without_scheduler_is_refused() -> None:
    refused(tiny_unet(), ValueError, r"a bare denoiser needs scheduler=.*got None")


def test_something_else_as_scheduler_is_refused() -> None:
    refused(
        tiny_unet(), TypeError, r"wanted a diffusers scheduler with set_timesteps\(\), got int", scheduler=3
    )


def test_conditional_unet_without_conditioning_is_refused() -> None:
    message = r"UNet2DConditionModel needs conditioning=\{'encoder_hidden_states'.*got neither"
    refused(tiny_conditional_unet(), ValueError, message, scheduler=ddim_scheduler())


def test_unknown_layer_pattern_is_refused() -> None:
    message = r"modules_to_not_convert: pattern 'encoder\.\*' matches no layer; layers are e\.g\. \["
    refused(tiny_pipeline(), ValueError, message, config=config(modules_to_not_convert=("encoder.*",)))


def test_excluding_every_layer_is_refused() -> None:
    message = "no layer left to quantize"
    refused(tiny_pipeline(), ValueError, message, config=config(modules_to_not_convert=("*",)))


def test_model_without_sample_size_is_refused() -> None:
    denoiser = tiny_unet()
    denoiser.register_to_config(sample_size=None)
    refused(denoiser, ValueError, "config.sample_size must be set, got None", scheduler=ddim_scheduler())


def test_inpainting_model_is_refused() -> None:
    message = r"must predict what it is given, got \(1, 4, 8, 8\) for samples \(1, 9, 8, 8\); .* inpainting"
    conditioning = {"encoder_hidden_states": noise(1, 5, 8)}
    denoiser = tiny_conditional_unet(in_channels=9)
    refused(denoiser, ValueError, message, scheduler=ddim_scheduler(), conditioning=conditioning)


def test_module_that_is_no_diffusers_model_is_refused() -> None:
    refused(nn.Linear(2, 2), TypeError, "wanted a diffusers model, got Linear", scheduler=ddim_scheduler())
