"""Loads the compiled module adpdm._C and tells what it, this CPU and this torch are."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

BUILD_COMMAND = "pip install -e ."


def load_native() -> ModuleType:
    """Imports adpdm._C, whose loading registers torch.ops.adpdm.

    Raises:
        ImportError: it is not built, or was built against another torch; the sentence names the command that mends it.
    """
    try:
        return importlib.import_module("adpdm._C")
    except ModuleNotFoundError as error:
        raise ImportError(f"adpdm._C is not built for this Python: run `{BUILD_COMMAND}` in the repository.") from error
    except ImportError as error:
        raise ImportError(
            f"adpdm._C does not load with torch {torch.__version__}, so it was built against another torch: "
            f"run `{BUILD_COMMAND}` again ({error})."
        ) from error


def build_info() -> dict[str, Any]:
    """Facts about the compiled module, the CPU and the running torch."""
    info: dict[str, Any] = dict(load_native().build_info())
    info["torch_version"] = torch.__version__
    return info


load_native()
