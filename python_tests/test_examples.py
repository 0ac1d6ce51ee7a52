"""The examples run: the README's ten lines as a script, on a tiny saved pipeline."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDIMPipeline
from PIL import Image

from adpdm.nn import quant_layers
from adpdm.testing import tiny_pipeline

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quantize_and_sample.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def run_example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run quantize_and_sample.py as a user does, without the network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_quantize_and_sample_writes_a_pipeline_that_loads(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "w8a8"
    result = run_example("--quick", "--model", model, "--out", out, "--images", "4")
    assert result.returncode == 0, result.stderr
    assert "loaded again, it samples the same 4 images" in result.stdout
    assert Image.open(out / "samples.png").size == (4 * 8, 8)
    layers = quant_layers(DDIMPipeline.from_pretrained(out, local_files_only=True).unet)
    assert layers
    assert all(layer.is_frozen for layer in layers.values())


def test_quantize_and_sample_keeps_an_existing_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--model", str(model), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "--out must name a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
