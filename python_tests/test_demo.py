"""Parts of the demo: its settings, timings of captured models, grids of images.

The command as a whole: test_cli.py; what its report says: test_demo_figures.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adpdm import QuantConfig, demo, graph
from adpdm.demo import Scale, captured_timings, save_image_grid
from adpdm.evaluate import EvaluationConfig
from adpdm.testing import ONE_BLOCK, tiny_unet


def test_full_demo_calibrates_and_times_as_by_default() -> None:
    assert demo._config((8, 8), "search", 0, Scale()) == QuantConfig()
    assert Scale().timing_pairs == EvaluationConfig().timing_pairs == 20


def test_captured_models_are_timed_whose_samples_are_not_square() -> None:
    reference, other = (tiny_unet(sample_size=(8, 4), **ONE_BLOCK) for _ in range(2))
    config = EvaluationConfig(timing_batch_sizes=(1, 2), timing_pairs=1)
    assert [timing.batch_size for timing in captured_timings(reference, other, config)] == [1, 2]
    assert not graph.is_captured(other)


def test_grids_are_written_of_samples_in_any_dtype_on_any_device(
    tmp_path: Path, device: torch.device
) -> None:
    samples = torch.full((1, 3, 2, 2), 0.3, dtype=torch.bfloat16, device=device)  # 0.30078125
    save_image_grid(samples, tmp_path / "grid.png", enlarge=1)
    with Image.open(tmp_path / "grid.png") as image:
        assert np.unique(np.asarray(image)).tolist() == [166]  # 1.30078125 * 127.5 = 165.8
