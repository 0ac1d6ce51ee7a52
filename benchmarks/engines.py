"""What a built contestant offers to the clock, and the forms of it that run in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
import unets
from job import Job
from torch import Tensor, nn

GRAPH_WARMUP_CALLS = 3


class Engine(Protocol):
    """A denoiser that is ready to be called."""

    notes: dict[str, str]  # what the reader of a time should know, such as the precision really used

    def bind(self, inputs: unets.Arrays) -> Callable[[], Any]:
        """The call to time, with its inputs already where the engine wants them."""

    def fetch(self, output: Any) -> np.ndarray:
        """What a call returned, as [B, C, H, W] f32."""

    def synchronize(self) -> None:
        """Wait until all calls have finished."""


class Denoiser(nn.Module):
    """A diffusers denoiser as a function of tensors alone: what exporters can trace."""

    def __init__(self, model: nn.Module, conditioning: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(conditioning)

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        named = dict(zip(self.names, conditioning, strict=True))
        output: Tensor = self.model(sample, timestep, **named, return_dict=False)[0]
        return output


def to_tensors(inputs: unets.Arrays, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs in the order of their keys; floats as `dtype`, images in channels_last."""
    tensors = []
    for value in inputs.values():
        tensor = torch.from_numpy(value).to(device)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensors.append(tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor)
    return tensors


def probes(job: Job) -> list[unets.Arrays]:
    """Inputs of the probes, one batch each; the middle one is what is timed."""
    return unets.load_batches(job.probe_file, job.batch)


def example_tensors(job: Job, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors to trace or compile with."""
    return to_tensors(probes(job)[0], dtype, job.device)


class TorchEngine:
    """A function of tensors on a torch device."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        dtype: torch.dtype,
        device: str,
        notes: dict[str, str] | None = None,
    ) -> None:
        self.call, self.dtype, self.device, self.notes = call, dtype, device, notes or {}

    def bind(self, inputs: unets.Arrays) -> Callable[[], Tensor]:
        tensors = to_tensors(inputs, self.dtype, self.device)
        return lambda: self.call(*tensors)

    def fetch(self, output: Tensor) -> np.ndarray:
        return output.float().cpu().contiguous().numpy()

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compiled(call: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """torch.compile; on the CPU with freezing, without which inductor does not reorder weights for oneDNN."""
    if device == "cpu":
        import torch._inductor.config as inductor

        inductor.freezing = True
    return torch.compile(call)


def cuda_graph(call: Callable[..., Tensor], example: list[Tensor]) -> Callable[..., Tensor]:
    """One CUDA graph of a call; inputs are copied into its own at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUP_CALLS):
            call(*example)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(*example)

    def replay(*inputs: Tensor) -> Tensor:
        for static, given in zip(example, inputs, strict=True):
            static.copy_(given)
        graph.replay()
        return output

    return replay
