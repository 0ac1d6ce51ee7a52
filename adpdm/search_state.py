"""The file in which a search saves itself after every round, and from which it goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing

STATE_VERSION = 3  # 1 generated images in batches of another size, 2 belonged to less than it depends on


@dataclass(frozen=True)
class SearchState:
    """A search between two rounds.

    Args:
        tensors: of `GroupSearch.state`.
        rounds_done, steps_done: rounds and optimizer steps.
        rounds, visits: of the selector.
        losses: of all optimizer steps.
    """

    tensors: dict[str, Tensor]
    rounds_done: int
    steps_done: int
    rounds: list[dict[str, Any]]
    visits: list[int]
    losses: list[float]

    def save(self, file: Path, fingerprint: str) -> None:
        """Replace the file in one go; `fingerprint` says what the state belongs to."""
        header = {
            "version": str(STATE_VERSION),
            "fingerprint": fingerprint,
            "progress": json.dumps([self.rounds_done, self.steps_done]),
            "trace": json.dumps([self.rounds, self.visits, self.losses]),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file(self.tensors, temporary, metadata=header)

    @classmethod
    def read(cls, file: Path, fingerprint: str) -> SearchState:
        """The state in a file.

        Raises:
            ValueError: for a file that is none, or that belongs to something else.
        """
        try:
            with safe_open(file, "pt") as stored:
                header = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is no search state ({error}); remove it to start anew") from None
        if header.get("version") != str(STATE_VERSION) or header.get("fingerprint") != fingerprint:
            raise ValueError(
                f"{file} belongs to another model, configuration or version; "
                "quantize into another folder, or remove the file to start anew"
            )
        return cls(tensors, *json.loads(header["progress"]), *json.loads(header["trace"]))
