"""The file in which a search saves itself after every round, and from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing

# 1 generated images in batches of another size, 2 belonged to less than it depends on, 3 guided variances and
# left TCD its eta, 4 did not tell schedules of tensors apart and probed all steps of calls with a shift, 5
# did not say what it started from, to which all that it learned is relative, 6 hardened rows at a rate that
# the weight of the entropy did not change.
STATE_VERSION = 7


@dataclass(frozen=True)
class SearchState:
    """A search between two rounds.

    Args:
        tensors: of `GroupSearch.state`.
        rounds_done, steps_done: rounds and optimizer steps.
        rounds, visits: of the selector.
        losses: of all optimizer steps.
        start: of `GroupSearch.start_facts`.
    """

    tensors: dict[str, Tensor]
    rounds_done: int
    steps_done: int
    rounds: list[dict[str, Any]]
    visits: list[int]
    losses: list[float]
    start: dict[str, str]

    def save(self, file: Path, fingerprint: str) -> None:
        """Replace the file in one go; `fingerprint` says what the state belongs to.

        Raises:
            OSError: it cannot be written.
        """
        header = {
            "version": str(STATE_VERSION),
            "fingerprint": fingerprint,
            "progress": json.dumps([self.rounds_done, self.steps_done]),
            "trace": json.dumps([self.rounds, self.visits, self.losses]),
            "start": json.dumps([self.start]),
        }
        is_new = not file.parent.exists()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                save_file(self.tensors, temporary, metadata=header)
        finally:
            if is_new:
                with suppress(OSError):  # it holds the file
                    file.parent.rmdir()

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
        others = _differences(header, {"version": str(STATE_VERSION), "fingerprint": fingerprint})
        if others:
            raise ValueError(
                f"{file} belongs to another model, configuration or version ({'; '.join(others)}); "
                "quantize into another folder, or remove the file to start anew"
            )
        return cls(tensors, *(x for key in ("progress", "trace", "start") for x in json.loads(header[key])))

    def check_start(self, wanted: Mapping[str, str]) -> None:
        """Refuse to go on from another partition than this one started from.

        Raises:
            ValueError: names in what they differ.
        """
        words = [
            f"{name}: wanted {wanted[name]:.8}, got {self.start.get(name)!s:.8}"
            for name in wanted
            if self.start.get(name) != wanted[name]
        ]
        if words:
            raise ValueError(
                "quantize: the saved search started from another partition than this calibration made, as "
                f"another machine or version of a library makes it ({'; '.join(words)}); "
                "quantize into another folder, or remove the state file to start anew"
            )


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """In what the header of a state is not the wanted one, in words."""
    if found.get("version") != wanted["version"]:
        return [f"wanted version {wanted['version']}, got {found.get('version')}"]
    if found.get("fingerprint") == wanted["fingerprint"]:
        return []
    got, want = (_facts(header.get("fingerprint", "")) for header in (found, wanted))
    words = []
    for name in sorted(name for name in {**got, **want} if got.get(name) != want.get(name)):
        setting = name.removeprefix("setting ")
        shown = [f"{facts.get(name)!s:.80}" for facts in (want, got)]
        is_told = setting != name and shown[0] != shown[1]
        words.append(f"{setting}: wanted {shown[0]}, got {shown[1]}" if is_told else f"other {setting}")
    return words or ["other fingerprint"]


def _facts(fingerprint: str) -> dict[str, Any]:
    """What a fingerprint of `adpdm.facts` says, by name; empty for another."""
    try:
        facts = json.loads(fingerprint)
    except json.JSONDecodeError:
        return {}
    return facts if isinstance(facts, dict) else {}
