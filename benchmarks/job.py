"""What a worker process is asked to build: the message that travels as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One contestant on one model.

    Args:
        contestant: name in `contestants.REGISTRY`.
        model: name for `unets.find`.
        batch: images per call.
        device: "cpu" or "cuda".
        threads: CPU threads of the process.
        folder: scratch files of the whole run.
    """

    contestant: str
    model: str
    batch: int
    device: str
    threads: int
    folder: str

    @property
    def model_folder(self) -> Path:
        """Files that serve all batch sizes."""
        return Path(self.folder, self.model)

    @property
    def batch_folder(self) -> Path:
        """Files of this batch size."""
        return self.model_folder / f"batch{self.batch}"

    @property
    def calibration_file(self) -> Path:
        """Trajectories that all quantizers calibrate on."""
        return self.model_folder / "calibration.npz"

    @property
    def probe_file(self) -> Path:
        """Inputs, other images at several steps, on which outputs are compared and calls are timed."""
        return self.batch_folder / "probes.npz"

    def outputs_file(self, name: str) -> Path:
        """Where the outputs [K, B, C, H, W] f32 of a contestant on the probes lie."""
        return self.batch_folder / f"outputs-{name}.npy"
