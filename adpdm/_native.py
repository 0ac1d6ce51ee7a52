"""Loads the compiled extension, which registers `torch.ops.adpdm`, or says in one sentence why it cannot."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

BUILD_COMMAND = "pip install -e ."


def same_minor_version(built: str, running: str) -> bool:
    """Whether an extension compiled against torch `built` may run with `running`; minors share no ABI."""
    return built.split(".")[:2] == running.split(".")[:2]


def load_extension() -> ModuleType:
    """Import `adpdm._C`.

    Raises:
        ImportError: it is not built, or was built against another torch; names the command that mends it.
    """
    try:
        extension = importlib.import_module("adpdm._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "adpdm: the native extension is not built for this Python; "
            f"build it with `{BUILD_COMMAND}` ({error})"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"adpdm: the native extension does not load with torch {torch.__version__}, as happens when it "
            f"was built against another torch; rebuild it with `{BUILD_COMMAND}` ({error})"
        ) from error
    built = extension.build_info()["torch_version_built"]
    if not same_minor_version(built, torch.__version__):
        raise ImportError(
            f"adpdm: the native extension was built against torch {built}, but torch {torch.__version__} is "
            f"installed; rebuild it with `{BUILD_COMMAND}`"
        )
    return extension


_extension = load_extension()
build_info = _extension.build_info
worker_threads = _extension.worker_threads
Children = _extension.Children
Tape = _extension.Tape
