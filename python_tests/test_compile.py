"""torch.compile of quantized denoisers: one whole graph for all timesteps, with the outputs of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.nn import LayerInfo, QuantLayer, quant_layers, swap_layers
from adpdm.step import StepState, attach_step_hook
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_unet

STEPS = 6
TIMESTEPS = (830, 498, 0)


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 3,
        "num_inference_steps": STEPS,
        "histogram_images": 2,
        "grouping": "uniform",
        "correct_bias": False,
        "correct_prediction": False,  # whose regression runs the kernels, so weights were packed before
    }
    return QuantConfig(**{**values, **changes})


@pytest.fixture(autouse=True)
def no_recompiles() -> Iterator[None]:
    """Every test starts without compiled code, and a second compilation of a frame is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def quantized(denoiser: nn.Module, settings: QuantConfig | None = None, **conditioning: Tensor) -> Any:
    adpdm.quantize(
        denoiser, settings or config(), scheduler=ddim_scheduler(), conditioning=conditioning or None
    )
    return denoiser


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def same_at_every_timestep(denoiser: Any, compiled: Any, timesteps: Any, *args: Any, **kwargs: Any) -> None:
    """The compiled denoiser gives what an untouched copy gives, which switches groups."""
    eager, groups = copy.deepcopy(denoiser), []
    for timestep in timesteps:
        got = compiled(*args, timestep, **kwargs).sample
        assert torch.equal(got, eager(*args, timestep, **kwargs).sample)
        groups.append(denoiser.adpdm_step.group_index.tolist())
    assert len({tuple(g) for g in groups}) == len(groups)


def test_unet_compiles_to_one_graph_for_all_timesteps(no_fallback: None) -> None:
    denoiser = quantized(tiny_unet())
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    # Nothing is packed yet: that must happen beside the graph, not in it.
    layers = [m for m in denoiser.modules() if isinstance(m, QuantLayer)]
    assert all(layer._packed is None for layer in layers)
    same_at_every_timestep(denoiser, compiled, map(torch.tensor, TIMESTEPS), noise(2, 1, 8, 8))
    assert any(layer._packed is not None for layer in layers)


def test_conditional_unet_compiles(no_fallback: None) -> None:
    context = noise(2, 5, 8)
    one_block = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    denoiser = quantized(tiny_conditional_unet(**one_block), encoder_hidden_states=context)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    timesteps = [torch.full((2,), t) for t in TIMESTEPS]
    same_at_every_timestep(denoiser, compiled, timesteps, noise(2, 4, 8, 8), encoder_hidden_states=context)


class OneLayer(nn.Module):
    """The least that has a clock: what is tested of it does not need the time to trace a whole U-Net."""

    def __init__(self, policy: Any = "nearest") -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        info = LayerInfo("conv", 0, self.conv.weight.numel(), (8, 8), "", None)
        step = swap_layers(self, [info], STEPS, lambda slots: StepState(slots, STEPS, policy))
        step.set_timesteps(torch.arange(STEPS - 1, -1, -1) * 166.0)
        layer = quant_layers(self)["conv"]
        table = torch.arange(STEPS, dtype=torch.int32)
        layer.quantizers[0].set_ranges(-1.0 - table, 1.0 + table, table)
        layer.freeze()
        attach_step_hook(self)

    def forward(self, sample: Tensor, timestep: Any) -> Any:
        return UNet2DOutput(sample=self.conv(sample))


@pytest.mark.parametrize("kind", [int, float])
def test_python_numbers_do_not_recompile_with_dynamic_shapes(kind: type) -> None:
    # Without dynamic=True torch takes the first number for a constant, in the float model as well.
    denoiser = OneLayer()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager", dynamic=True)
    same_at_every_timestep(denoiser, compiled, map(kind, TIMESTEPS), noise(2, 2, 8, 8))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), torch.int64), ((1,), torch.float32), ((2,), torch.bfloat16)]
)
def test_tensors_of_any_kind_do_not_recompile(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    denoiser = OneLayer()
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    timesteps = [torch.full(shape, t).to(dtype) for t in TIMESTEPS]
    same_at_every_timestep(denoiser, compiled, timesteps, noise(2, 2, 8, 8))


def test_compiled_graph_refuses_what_eager_mode_refuses() -> None:
    compiled = torch.compile(OneLayer("error"), fullgraph=True, backend="aot_eager")
    x = noise(2, 2, 8, 8)
    compiled(x, torch.tensor([830, 830]))
    with pytest.raises(RuntimeError, match="the batch mixes timesteps; call the denoiser once per timestep"):
        compiled(x, torch.tensor([830, 498]))
    with pytest.raises(RuntimeError, match="not calibrated and timestep_policy is 'error'"):
        compiled(x, torch.tensor([10, 10]))


def test_loaded_model_compiles_in_place(tmp_path: Any) -> None:
    quantized(tiny_unet(**ONE_BLOCK)).save_pretrained(tmp_path)
    denoiser = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    eager = copy.deepcopy(denoiser)
    denoiser.compile(fullgraph=True, backend="eager")
    x = noise(2, 1, 8, 8).bfloat16()
    for timestep in map(torch.tensor, TIMESTEPS):
        assert torch.equal(denoiser(x, timestep).sample, eager(x, timestep).sample)
