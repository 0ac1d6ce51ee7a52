"""Large sets of samples: resuming, processes that share the work, growth, what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

import adpdm
from adpdm import AdpdmConfig, DenoiserCall, QuantConfig
from adpdm.evaluate import GuidedDenoiser, SampleSet, SampleSettings, generate, sample_set
from adpdm.evaluate.sampling import to_uint8
from adpdm.nn.fusion import describe_fusion, fuse_blocks
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_unet

SETTINGS = SampleSettings(num_images=7, num_inference_steps=2, seed=5, chunk_size=3)
# What torchrun does for two processes, without its half minute of start-up.
SHARE = """
import sys
from pathlib import Path
from adpdm.evaluate import SampleSettings, sample_set
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet
settings = SampleSettings(num_images=7, num_inference_steps=2, seed=5, chunk_size=3)
sample_set(tiny_unet(**ONE_BLOCK), ddim_scheduler(), Path(sys.argv[1]), settings)
"""


def make(folder: Path, settings: SampleSettings = SETTINGS, seed: int = 0, **options: Any) -> SampleSet:
    return sample_set(tiny_unet(seed, **ONE_BLOCK), ddim_scheduler(), folder, settings, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_set_holds_the_images_of_generate(tmp_path: Path) -> None:
    found = make(tmp_path / "set")
    wanted = generate(tiny_unet(**ONE_BLOCK), ddim_scheduler(), 7, 2, seed=5, batch_size=3).samples
    assert np.array_equal(found.images(), to_uint8(wanted))
    assert sorted(contents(tmp_path / "set")) == [
        "images-000000.npy",
        "images-000001.npy",
        "images-000002.npy",
        "samples.json",
    ]


def test_an_interrupted_set_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "whole")

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", progress=stop)
    begun = SampleSet.open(tmp_path / "parts")
    assert begun.missing() == [1, 2]
    with pytest.raises(ValueError, match="2 of its 3 files are missing"):
        begun.images()
    calls: list[tuple[int, int]] = []
    make(tmp_path / "parts", progress=lambda phase, done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_two_processes_fill_one_set_with_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "alone")
    shared = tmp_path / "shared"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, str(shared)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert contents(shared) == contents(tmp_path / "alone")


def test_each_process_makes_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert make(tmp_path / "set").missing() == [0, 2]


def test_a_set_grows_and_keeps_its_full_files(tmp_path: Path) -> None:
    make(tmp_path / "set")
    before = contents(tmp_path / "set")
    larger = SampleSettings(num_images=10, num_inference_steps=2, seed=5, chunk_size=3)
    images = make(tmp_path / "set", larger).images()
    after = contents(tmp_path / "set")
    assert all(after[f"images-00000{n}.npy"] == before[f"images-00000{n}.npy"] for n in (0, 1))
    wanted = generate(tiny_unet(**ONE_BLOCK), ddim_scheduler(), 10, 2, seed=5, batch_size=3).samples
    assert np.array_equal(images, to_uint8(wanted))
    assert np.array_equal(make(tmp_path / "set").images(), images[:7])  # a smaller wish changes nothing
    assert contents(tmp_path / "set") == after


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        (SampleSettings(num_images=7, num_inference_steps=3, seed=5, chunk_size=3), 0),
        (SampleSettings(num_images=7, num_inference_steps=2, seed=6, chunk_size=3), 0),
        (SampleSettings(num_images=7, num_inference_steps=2, seed=5, chunk_size=4), 0),
        (SETTINGS, 1),
    ],
)
def test_samples_of_another_model_or_setting_are_left_alone(
    tmp_path: Path, settings: SampleSettings, seed: int
) -> None:
    make(tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(
        ValueError,
        match="holds samples of another model, decoder, scheduler, .* guidance or setting",
    ):
        make(tmp_path / "set", settings, seed)
    assert contents(tmp_path / "set") == before


def three_channels(latents: torch.Tensor) -> torch.Tensor:
    """Stands for a decoder: images [B, 3, h, w] of latents [B, 4, h, w]."""
    return latents[:, :3]


def test_conditioning_rows_go_to_images_in_turn(tmp_path: Path) -> None:
    unet, texts = tiny_conditional_unet(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    given = {"encoder_hidden_states": texts}
    found = sample_set(
        unet, ddim_scheduler(), tmp_path, SETTINGS, conditioning=given, decode=three_channels
    ).images()
    rows = texts[torch.arange(7) % 2]
    wanted = generate(
        unet, ddim_scheduler(), 7, 2, seed=5, batch_size=3, conditioning={"encoder_hidden_states": rows}
    ).samples
    assert np.array_equal(found, to_uint8(three_channels(wanted)))


def test_a_conditional_set_grows(tmp_path: Path) -> None:
    unet, texts = tiny_conditional_unet(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "conditioning": {"encoder_hidden_states": texts},
        "decode": three_channels,
    }
    for count in (3, 7):
        settings = replace(SETTINGS, num_images=count)
        found = sample_set(unet, ddim_scheduler(), tmp_path / "grown", settings, **options)
    whole = sample_set(unet, ddim_scheduler(), tmp_path / "whole", SETTINGS, **options)
    assert np.array_equal(found.images(), whole.images())
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


def test_latents_without_a_decoder_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    given = {"encoder_hidden_states": torch.zeros(1, 3, 8)}
    with pytest.raises(
        ValueError, match=r"sample_set: samples of shape \(4, .* are no images .* decode= must"
    ):
        sample_set(tiny_conditional_unet(), ddim_scheduler(), tmp_path / "set", SETTINGS, conditioning=given)
    assert not (tmp_path / "set").exists()


def conditions_of(folder: Path, unet: nn.Module, scheduler: Any = None, **options: Any) -> str:
    """What the manifest of one image says of its condition, and not of its model."""
    settings = SampleSettings(num_images=1, num_inference_steps=1)
    found = sample_set(
        unet, scheduler or ddim_scheduler(), folder, settings, decode=three_channels, **options
    )
    return str(found.manifest["conditions"])


def test_two_models_have_their_conditions_in_common_and_other_conditions_do_not(tmp_path: Path) -> None:
    text, unet = torch.ones(1, 3, 8), tiny_conditional_unet()
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    given = {"conditioning": {"encoder_hidden_states": text}}
    base = conditions_of(tmp_path / "base", unet, **given)
    assert conditions_of(tmp_path / "model", other, **given) == base
    found = {
        base,
        conditions_of(tmp_path / "text", unet, conditioning={"encoder_hidden_states": 2 * text}),
        conditions_of(tmp_path / "call", unet, call=DenoiserCall(timestep_factor=0.5), **given),
        conditions_of(tmp_path / "scheduler", unet, DDPMScheduler(), **given),
    }
    for scale, null in ((2.0, 0.0), (3.0, 0.0), (2.0, 1.0)):
        guided = GuidedDenoiser(unet, scale, null_text=torch.full((1, 3, 8), null))
        found.add(conditions_of(tmp_path / f"guided{scale}{null}", guided, **given))
    assert len(found) == 7


class Brighter(torch.nn.Module):
    """A decoder with a parameter, which says whether gradients would be kept."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(by))
        self.kept_gradients = False

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        result = samples + self.by
        self.kept_gradients |= result.requires_grad
        return result


@pytest.mark.parametrize(
    "other",
    [
        {"decode": Brighter(0.2)},
        {"decode": None},
        {"call": DenoiserCall(timestep_factor=0.5)},
        {"call": DenoiserCall(schedule={"timesteps": [9, 1]})},
        {"call": DenoiserCall(constants={"class_labels": torch.ones(1)})},
        {"call": DenoiserCall(constants={"return_dict": False})},
    ],
)
def test_samples_of_another_call_or_decoder_are_left_alone(tmp_path: Path, other: dict[str, Any]) -> None:
    decoder = Brighter(0.1)
    make(tmp_path / "set", decode=decoder)
    assert not decoder.kept_gradients
    make(tmp_path / "set", decode=Brighter(0.1), call=DenoiserCall())
    with pytest.raises(ValueError, match="holds samples of another model"):
        make(tmp_path / "set", **{"decode": decoder, **other})


def test_samples_of_another_schedule_in_tensors_are_left_alone(tmp_path: Path) -> None:
    def fill(last: float) -> None:
        call = DenoiserCall(schedule={"sigmas": torch.tensor([1.0, last])})
        sample_set(
            tiny_unet(**ONE_BLOCK), FlowMatchEulerDiscreteScheduler(), tmp_path / "set", SETTINGS, call=call
        )

    fill(0.5)
    fill(0.5)
    with pytest.raises(ValueError, match="holds samples of another model"):
        fill(0.9)


def test_samples_of_other_arithmetic_on_the_same_tensors_are_left_alone(tmp_path: Path) -> None:
    tiny_unet(**ONE_BLOCK).save_pretrained(tmp_path / "unet")

    def fill(folder: str, **settings: Any) -> nn.Module:
        config = AdpdmConfig(weight_bits=8, **settings)
        unet = UNet2DModel.from_pretrained(tmp_path / "unet", quantization_config=config)
        sample_set(unet, ddim_scheduler(), tmp_path / folder, SETTINGS)
        return unet

    fill("bits")
    fill("bits")
    with pytest.raises(ValueError, match="holds samples of another model"):
        fill("bits", activation_bits=8)
    unet = fill("attention", activation_bits=8)
    assert not any(info.attention for info in describe_fusion(unet))


def test_samples_of_other_attention_are_left_alone(tmp_path: Path) -> None:
    unet = tiny_unet()
    settings = {"num_groups": 1, "num_inference_steps": 2, "histogram_images": 2}
    config = QuantConfig(grouping="shared", attention="float", **settings)  # type: ignore[arg-type]
    adpdm.quantize(unet, config, scheduler=ddim_scheduler())
    sample_set(unet, ddim_scheduler(), tmp_path / "set", SETTINGS)
    fuse_blocks(unet, "int8")
    with pytest.raises(ValueError, match="holds samples of another model"):
        sample_set(unet, ddim_scheduler(), tmp_path / "set", SETTINGS)
    fuse_blocks(unet, "float")
    sample_set(unet, ddim_scheduler(), tmp_path / "set", SETTINGS)


def test_an_error_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "set")
    before = contents(tmp_path / "set")

    def broken(out: Any, images: np.ndarray) -> None:
        out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", replace(SETTINGS, num_images=10))
    after = contents(tmp_path / "set")
    assert after.pop("samples.json") != before.pop("samples.json")  # it wants more images now
    assert after == before


def test_folders_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder that `adpdm dataset` wrote"):
        SampleSet.open(tmp_path)
    (tmp_path / "images-000000.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="got images without"):
        make(tmp_path)
    (tmp_path / "samples.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must have format 4"):
        make(tmp_path)
    (tmp_path / "samples.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be a folder that `adpdm dataset` wrote"):
        SampleSet.open(tmp_path)


@pytest.mark.parametrize(
    "other", [{"settings": None}, {"settings": {"num_images": 0}}, {"settings": {"a": 1}}, {"conditions": 3}]
)
def test_manifests_that_lack_something_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    make(tmp_path)
    file = tmp_path / "samples.json"
    for manifest in ({**json.loads(file.read_text()), **other}, {"format": 4}):
        file.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="must hold the settings, fingerprint and conditions of a set"):
            SampleSet.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_damaged_files_are_made_again(tmp_path: Path, content: bytes) -> None:
    make(tmp_path / "set")
    before = contents(tmp_path / "set")
    (tmp_path / "set" / "images-000001.npy").write_bytes(content)
    assert SampleSet.open(str(tmp_path / "set")).missing() == [1]
    sample_set(tiny_unet(**ONE_BLOCK), ddim_scheduler(), str(tmp_path / "set"), SETTINGS)
    assert contents(tmp_path / "set") == before
