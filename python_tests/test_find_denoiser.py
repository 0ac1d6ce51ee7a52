"""`find_denoiser`: the module itself, a pipeline's network, or a sentence."""

from __future__ import annotations

import pytest

import adpdm
from adpdm.denoisers import find_denoiser
from adpdm.testing import tiny_pipeline, tiny_unet


def test_denoiser_of_a_pipeline_is_its_unet() -> None:
    pipe = tiny_pipeline()
    assert find_denoiser(pipe) is pipe.unet


def test_module_is_its_own_denoiser() -> None:
    unet = tiny_unet()
    assert find_denoiser(unet) is unet


def test_object_without_denoiser_is_refused() -> None:
    message = "wanted a diffusers pipeline with a unet or transformer, or a denoiser module, .*; got dict"
    with pytest.raises(TypeError, match=message):
        adpdm.quantize({})
