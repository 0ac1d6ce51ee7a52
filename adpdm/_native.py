"""Loads the compiled extension, which registers `torch.ops.adpdm`, or says in one sentence why it cannot."""

from __future__ import annotations

import torch

try:
    from . import _C
except ImportError as error:
    built = "undefined symbol" not in str(error)
    raise ImportError(
        f"adpdm: the native extension is missing ({error}); build it with `pip install -e .`"
        if built
        else f"adpdm: the native extension was built against another torch than the installed {torch.__version__}; "
        f"rebuild it with `pip install -e .` ({error})"
    ) from error

build_info = _C.build_info
