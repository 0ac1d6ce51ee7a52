"""The layers that GPU kernels are measured on: the shapes that whole U-Nets spend their time in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """A square convolution with padding kernel // 2 on a square map."""

    batch: int
    channels: int
    size: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        kind = "conv" if self.groups == 1 else "depthwise" if self.groups == self.channels else "grouped"
        return (
            f"{kind}{self.kernel}x{self.kernel}/{self.stride} "
            f"{self.batch}x{self.channels}->{self.outputs}@{self.size}"
        )

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pixels = self.batch * (self.size // self.stride) ** 2
        return 2 * pixels * self.channels // self.groups * self.outputs * self.kernel**2


@dataclass(frozen=True)
class Linear:
    """A linear layer on `rows` tokens."""

    rows: int
    channels: int
    outputs: int

    @property
    def name(self) -> str:
        return f"linear {self.rows}x{self.channels}->{self.outputs}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.channels * self.outputs


def depthwise(batch: int, channels: int, size: int) -> Conv:
    """A 3x3 convolution of every channel by itself."""
    return Conv(batch, channels, size, channels, groups=channels)


Layer = Conv | Linear

# google/ddpm-cifar10-32 at batch 1, 8, 128; SD 1.5 at 512 and SDXL at 1024 pixels, both at batch 2: one image
# with classifier-free guidance. Depthwise: several widths, the last of SANA 1.6B's feed-forward net at 1024
# pixels.
LAYERS: dict[str, list[Layer]] = {
    "cifar10": [
        Conv(1, 128, 32, 128),
        Conv(1, 256, 16, 256),
        Conv(1, 512, 8, 256),
        Conv(1, 256, 4, 256),
        Conv(8, 128, 32, 128),
        Conv(8, 256, 16, 256),
        Conv(128, 128, 32, 128),
        Conv(128, 256, 16, 256),
        Conv(128, 512, 16, 256, 1),
    ],
    "depthwise": [
        depthwise(8, 256, 64),
        depthwise(2, 1152, 64),
        depthwise(2, 11200, 32),
        Conv(8, 384, 32, 384, 7, groups=384),
    ],
    "sd15": [
        Conv(2, 320, 64, 320),
        Conv(2, 320, 64, 320, 3, 2),
        Conv(2, 640, 32, 640),
        Conv(2, 1280, 16, 1280),
        Conv(2, 1280, 8, 1280),
        Conv(2, 2560, 16, 1280),
        Conv(2, 960, 64, 320, 1),
        Linear(8192, 320, 320),
        Linear(8192, 320, 2560),
        Linear(8192, 1280, 320),
        Linear(2048, 640, 5120),
        Linear(512, 1280, 10240),
    ],
    "sdxl": [
        Conv(2, 320, 128, 320),
        Conv(2, 640, 64, 640),
        Conv(2, 1280, 32, 1280),
        Linear(8192, 640, 640),
        Linear(8192, 640, 5120),
        Linear(2048, 1280, 1280),
        Linear(2048, 1280, 10240),
        Linear(2048, 5120, 1280),
    ],
}

# Maps [batch, channels, size, size] that are normalised and quantized. The last one has the rate of the
# memory: its 168 MB in bfloat16 do not fit into the 50 MB of an H200's L2 cache.
MAPS: list[tuple[int, int, int]] = [
    (8, 128, 32),
    (128, 256, 16),
    (2, 320, 64),
    (2, 640, 64),
    (2, 320, 128),
    (16, 320, 128),
]
