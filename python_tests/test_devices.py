"""Calibration away from the CPU, without another device: what follows the inputs, and what must not mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import adpdm
from adpdm import QuantConfig, SearchConfig, bias, pipeline_checks, precision, rounding, search_run
from adpdm.nn import quant_layers
from adpdm.testing import CROSS_ATTENTION_DIM, ONE_BLOCK, tiny_conditional_unet, tiny_unet
from adpdm.trajectory import DenoiserCall, Sampler

CONDITIONAL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass goes where the others go."""
    monkeypatch.setattr(search_run, "HOLDOUT_BATCHES", 2)
    monkeypatch.setattr(rounding, "ROUNDING_STEPS", 2)
    monkeypatch.setattr(bias, "BIAS_STEPS", 2)
    monkeypatch.setattr(precision, "PROBE_STEPS", 2)


def config(objective: str = "teacher", **changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 2,
        "num_inference_steps": 3,
        "calibration_images": 3,
        "round_size": 2,
        "histogram_images": 2,
        "search": SearchConfig(num_steps=2, refit_steps=1, batch_size=2, objective=objective),  # type: ignore[arg-type]
    }
    return QuantConfig(**{**values, **changes})


# ---- tensors made without saying where ---------------------------------------------------------------------


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


CASES: dict[str, tuple[Any, Any, QuantConfig]] = {
    "search": (tiny_unet, HeunDiscreteScheduler, config()),
    "noise": (
        tiny_conditional_unet,
        DDIMScheduler,
        config("noise", selection="normal", shared_groups=True, weight_bits=4),
    ),
    "minmax": (
        tiny_unet,
        DPMSolverMultistepScheduler,
        config(grouping="dp", range_method="minmax", selection="random"),
    ),
    "uniform": (tiny_unet, DDIMScheduler, config(grouping="uniform", weight_rounding="nearest")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_calibration_says_where_its_tensors_live(case: str, tmp_path: Path) -> None:
    make, scheduler_type, settings = CASES[case]
    text = torch.randn(2, 3, CROSS_ATTENTION_DIM, generator=torch.Generator().manual_seed(0))
    takes_text = make is tiny_conditional_unet
    conditioning = {"encoder_hidden_states": text} if takes_text else None
    files = []
    for where in ("cpu", "meta"):  # what lands on meta by default has no values
        unet = make(**(CONDITIONAL if takes_text else ONE_BLOCK))
        scheduler = scheduler_type(num_train_timesteps=1000)
        folder, state = tmp_path / where, tmp_path / f"{where}.safetensors"
        with default_device(where):
            adpdm.quantize(unet, settings, scheduler=scheduler, conditioning=conditioning, state_file=state)
        unet.save_pretrained(folder)
        files.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert len(files[0]) >= 2
    assert files[0] == files[1]


# ---- tensors of two devices in one operation ---------------------------------------------------------------

# Indices may lie on the CPU, copies lead from one device to another.
MAY_MIX = (
    torch.ops.aten.copy_,
    torch.ops.aten.index,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
)


class Elsewhere(Tensor):
    """A tensor that claims to be on the meta device and keeps its values in one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_elsewhere(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch has none for subclasses


class Meta(TorchDispatchMode):
    """Makes what is moved to or created on the meta device a tensor with values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_elsewhere(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[None]:
    """Let the meta device hold values; torch.tensor copies numbers, which no dispatch sees, by itself."""
    original = torch.tensor

    def tensor(data: Any, *, device: Any = "cpu", **kwargs: Any) -> Tensor:
        return original(data, device="cpu", **kwargs).to(device)

    with Meta(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        yield


def run_elsewhere(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and refuse one that a GPU would refuse."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away = [t for t in tensors if isinstance(t, Elsewhere)]
    lands_elsewhere = bool(away)
    if kwargs.get("device") is not None:
        lands_elsewhere = torch.device(kwargs["device"]).type == "meta"
        kwargs = {**kwargs, "device": "cpu"}
    elif away and len(away) < len(tensors):
        strays = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
        into_cpu = not isinstance(args[0], Elsewhere) and func.overloadpacket is not torch.ops.aten.copy_
        if strays and (func.overloadpacket not in MAY_MIX or into_cpu):
            raise RuntimeError(f"{func} got tensors on two devices, one of shape {tuple(strays[0].shape)}")
    inner = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    outer = {id(t.inner): t for t in away}

    def wrap(result: Any) -> Any:
        if not isinstance(result, Tensor) or not lands_elsewhere:
            return result
        return outer[id(result)] if id(result) in outer else Elsewhere(result)

    return tree_map(wrap, func(*inner[0], **inner[1]))


def move_elsewhere(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
    return module


def test_elsewhere_refuses_to_mix_devices() -> None:
    there, here = Elsewhere(torch.ones(3)), torch.ones(3)
    with pretended():
        assert there.device.type == "meta"
        assert (there + there).cpu().tolist() == [2.0, 2.0, 2.0]
        assert torch.zeros(2, device=there.device).cpu().tolist() == [0.0, 0.0]
        assert torch.tensor([1, 2], device=there.device).cpu().tolist() == [1, 2]
        assert there[torch.tensor([0, 2])].shape == (2,)
        for mix in (
            lambda: there + here,
            lambda: here[Elsewhere(torch.tensor([0]))],
            lambda: here.add_(there),
        ):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mix()


def test_calibration_does_not_mix_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("noise", weight_bits=4, raised_layers=0.3)
    here, there = tiny_unet(**ONE_BLOCK), tiny_unet(**ONE_BLOCK)
    expected = adpdm.quantize(here, settings, scheduler=DDIMScheduler())
    monkeypatch.setattr(pipeline_checks, "CALIBRATION_DEVICES", ("meta",))
    move_elsewhere(there)
    with pretended():
        report = adpdm.quantize(there, settings, scheduler=DDIMScheduler())
    assert report.trace.rounding  # learned, and
    assert {layer.bits[0] for layer in quant_layers(there).values()} == {4, 8}  # some raised
    observed = [torch.tensor([q["observed"] for q in r.trace.quantizers][0]) for r in (expected, report)]
    torch.testing.assert_close(observed[1], observed[0], rtol=1e-3, atol=1e-3)
    for layer in quant_layers(there).values():
        of_inputs = (t for q in layer.quantizers for t in (q.scale, q.zero_point, q.table))
        tensors = [layer.weight, layer.weight_scale, *of_inputs]
        assert {t.device.type for t in tensors} == {"meta"}


def test_tables_go_where_the_weights_are(tmp_path: Path) -> None:
    here, there, path = tiny_unet(**ONE_BLOCK), tiny_unet(**ONE_BLOCK), tmp_path / "tables"
    settings = config(grouping="uniform", weight_rounding="nearest", weight_bits=4)
    adpdm.quantize(here, settings, scheduler=DDIMScheduler())
    adpdm.save_tables(here, path)
    wanted = here.state_dict()
    move_elsewhere(there)
    with pretended():
        adpdm.load_tables(there, path)
        got = there.state_dict()
        assert {key: value.device.type for key, value in got.items()} == dict.fromkeys(wanted, "meta")
        assert all(torch.equal(value.cpu(), wanted[key]) for key, value in got.items())
        step = there.get_submodule("adpdm_step")
        current = (step.group_index, step.step_index, step.current_correction)
        assert {t.device.type for t in (*current, *step.record[:2])} == {"meta"}


def test_sampler_moves_what_the_denoiser_is_given() -> None:
    call = DenoiserCall(constants={"ids": torch.arange(3), "flags": {"return_dict": True}})
    nested = {"outer": {"inner": torch.arange(4.0)[:, None]}}
    with pretended():
        unet = move_elsewhere(tiny_unet(**ONE_BLOCK))
        sampler = Sampler(unet, HeunDiscreteScheduler(), (1, 8, 8), 3, nested, call)
        given = sampler.conditions(3, 2)["outer"]["inner"]
        assert given.device.type == sampler.call.constants["ids"].device.type == "meta"
        assert given.tolist() == [[3.0], [0.0]]
    assert sampler.call.constants["flags"] == {"return_dict": True}
    assert call.constants["ids"].device.type == "cpu"
