"""The trained models that accuracy is measured on."""

from __future__ import annotations

from pathlib import Path

from adpdm.model_folder import ModelFolder

MODELS = Path(__file__).resolve().parents[1] / "models"


def find_subject(name: str) -> ModelFolder:
    """A model of `models/` by its name, or any folder.

    Raises:
        ValueError: for a folder without a denoiser and a scheduler.
    """
    folder = MODELS / name
    return ModelFolder.open(folder if folder.is_dir() else Path(name))
