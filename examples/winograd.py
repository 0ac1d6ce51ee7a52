"""3x3 convolutions of maps of 4x4 and 8x8 as F(4x4, 3x3) of Winograd, for training in float32 on CPUs.

It takes a quarter of the products: 36 values stand for each tile of 4x4 results, and forward and both
gradients become 36 products of matrices (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", CVPR 2016, with the points 0, 1, -1, 2, -2 and infinity). oneDNN has no such form for AVX2.
Results differ from the direct sum by some 1e-5 of the largest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TILE, POINTS = 4, 6  # results, and values that stand for them, along one axis
MIN_CHANNELS = 64  # with fewer there is little to win: few products, and changing forms costs as much

# d [6] -> BT d, g [3] -> G g, and AT of their product is the correlation [4] of both.
BT = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
AT = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)


def in_two_axes(matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """[m n, p q] f32 of a matrix [m, p] with itself [n, q]: the same along both axes of an image."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one).float()


WEIGHTS = in_two_axes(G)  # [36, 9]
RESULTS = in_two_axes(AT)  # [16, 36]


def image_transform(height: int, width: int) -> Tensor:
    """[tiles * 36, height * width] f32: the values of all tiles, from an image that zeros surround."""
    bt = torch.tensor(BT, dtype=torch.float64)
    axes = []
    for size in (height, width):
        axis = torch.zeros(size // TILE, POINTS, size + 2, dtype=torch.float64)
        for tile in range(size // TILE):
            axis[tile, :, tile * TILE : tile * TILE + POINTS] = bt
        axes.append(axis[:, :, 1:-1])
    both = torch.einsum("ipy,jqx->ijpqyx", *axes)
    return both.reshape(-1, height * width).float()


# One product with a matrix of all pixels: on larger maps more than a tile needs.
IMAGES = {(h, w): image_transform(h, w) for h in (4, 8) for w in (4, 8)}


class Winograd(torch.autograd.Function):
    """Convolution of images [N, C, H, W] with weights [K, C, 3, 3], stride 1, padding 1, f32, channels_last.

    H and W are 4 or 8. Below, R = N * tiles is the number of tiles.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor) -> Tensor:
        """[N, K, H, W]."""
        (n, c, h, w), k = image.shape, len(weight)
        rows, columns = h // TILE, w // TILE
        pixels = image.permute(0, 2, 3, 1).reshape(n, h * w, c)
        # Views [36, R, C] and [36, K, C]; matrix products take the strides.
        values = (IMAGES[h, w] @ pixels).view(-1, POINTS * POINTS, c).transpose(0, 1)
        factors = (WEIGHTS @ weight.permute(0, 2, 3, 1).reshape(k, 9, c)).transpose(0, 1)
        ctx.save_for_backward(values, factors)
        ctx.image_shape = image.shape
        products = torch.bmm(values, factors.transpose(1, 2))  # [36, R, K]
        result = RESULTS @ products.view(POINTS * POINTS, -1)  # [16, R * K]
        result = result.view(TILE, TILE, n, rows, columns, k).permute(2, 3, 0, 4, 1, 5)
        return result.reshape(n, h, w, k).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Of image and weight."""
        values, factors = ctx.saved_tensors
        (n, c, h, w), k = ctx.image_shape, factors.shape[1]
        rows, columns = h // TILE, w // TILE
        gradient = gradients[0].permute(0, 2, 3, 1).reshape(n, rows, TILE, columns, TILE, k)
        gradient = gradient.permute(2, 4, 0, 1, 3, 5).reshape(TILE * TILE, -1)
        products = (RESULTS.t() @ gradient).view(POINTS * POINTS, -1, k)  # [36, R, K]
        of_factors = torch.bmm(products.transpose(1, 2), values).view(POINTS * POINTS, -1)
        of_weight = (WEIGHTS.t() @ of_factors).view(3, 3, k, c).permute(2, 3, 0, 1)
        of_values = torch.bmm(products, factors)  # [36, R, C]
        back = IMAGES[h, w].t()
        if rows * columns == 1:  # no copy of the values: the smaller image is what changes its layout
            of_image = (back @ of_values.view(POINTS * POINTS, -1)).view(h, w, n, c).permute(2, 3, 0, 1)
        else:
            of_image = back @ of_values.transpose(0, 1).reshape(n, -1, c)
            of_image = of_image.view(n, h, w, c).permute(0, 3, 1, 2)
        return of_image, of_weight


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d in this form where maps allow it; parameters and their names stay."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, K, H, W] of [N, C, H, W]."""
        if tuple(input.shape[2:]) not in IMAGES:
            return super().forward(input)
        result = Winograd.apply(input, self.weight)
        return result if self.bias is None else result + self.bias.view(1, -1, 1, 1)


def use_winograd(model: nn.Module) -> int:
    """Turn the wide 3x3 convolutions of a model into WinogradConv2d in place; how many those are."""
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Conv2d
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
        and min(module.in_channels, module.out_channels) >= MIN_CHANNELS
    ]
    for module in found:
        module.__class__ = WinogradConv2d
    return len(found)
