"""Attention in float64, exact and as the int8 kernels define it: part of `reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 64  # tokens whose weights share a scale
MAX_CODE, MAX_WEIGHT = 127.0, 255.0
LOG2_MAX_WEIGHT = 7.99435344
MIN_EXPONENT = -64.0  # of weights
MIN_VALUE = 2.0**-23  # as a share of the largest of its channel; below, step sizes shrink no further
MIN_CHANNEL = 2.0**-126  # channels below count as zeros: 1 / x is infinite for denormal numbers
LOG2_RISE = 0.0860714  # log2(1 + f) - f at its largest
EXP2_CUBIC = (0.999928074, 0.693260985, 0.242611122, 0.0551716691)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, int8: bool) -> Tensor:
    """softmax(query key^T / sqrt(D)) value per head, [N, L, C] f64; key, value [N, M, C]."""
    q, k, v = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if int8:
        attended = _attend_int8(q, k, v)
    else:
        scores = q.double() @ k.double().transpose(2, 3) / math.sqrt(q.shape[3])
        attended = torch.softmax(scores, 3) @ v.double()
    return attended.transpose(1, 2).flatten(2)


def _attend_int8(
    q: Tensor,  # [N, heads, L, D] f32
    k: Tensor,  # [N, heads, M, D] f32
    v: Tensor,  # [N, heads, M, D] f32
) -> Tensor:
    """Codes of 8 bits in both products; docs/numerics.md, "Attention".

    Codes come from float32, in which a tie is a tie for the kernels too; all else is float64.
    """
    query_codes, query_scale = _codes_by_token(q)
    key_codes, key_scale = _codes_by_token(k - k.double().mean(2, keepdim=True).float())
    value_codes, value_exponent, channel_scale = _value_codes(v)
    products = query_codes @ key_codes.transpose(2, 3) * key_scale.transpose(2, 3)
    exponents = products * query_scale * (math.log2(math.e) / math.sqrt(q.shape[3]))
    exponents = exponents + value_exponent
    inverse = exp2_coarse(-value_exponent)  # [N, heads, 1, M]
    weighted, weight_sum = torch.zeros_like(q, dtype=torch.float64), torch.zeros_like(query_scale)
    largest = torch.full_like(query_scale, -math.inf)
    for first in range(0, k.shape[2], BLOCK):
        tokens = slice(first, first + BLOCK)
        here = exponents[..., tokens].amax(3, keepdim=True)
        both = torch.maximum(largest, here)
        keep, take = (exp2_coarse((x - both).clamp(min=MIN_EXPONENT)) for x in (largest, here))
        relative = exponents[..., tokens] - (here - LOG2_MAX_WEIGHT)
        weights = exp2_coarse(relative.clamp(min=MIN_EXPONENT))
        weighted = weighted * keep + weights.round() @ value_codes[:, :, tokens] * take
        weight_sum = weight_sum * keep + (weights * inverse[..., tokens]).sum(3, keepdim=True) * take
        largest = both
    return weighted / weight_sum * channel_scale


def _codes_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in [-127, 127] and step sizes [..., 1]; 0 for a row of zeros."""
    peak = x.abs().amax(-1, keepdim=True)
    codes = (x * (MAX_CODE / peak).where(peak > 0, 0.0)).round()
    return codes.double(), peak.double() / MAX_CODE


def _value_codes(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.., M, D], log2 of the tokens' step sizes [.., 1, M], scales of channels [.., 1, D]."""
    channel_scale = v.abs().amax(2, keepdim=True)
    channel_scale = channel_scale.where(~(channel_scale < MIN_CHANNEL), 1.0)  # NaN stays
    relative = v * (1.0 / channel_scale)
    step = relative.abs().amax(3).clamp(min=MIN_VALUE).double() * (1.0 / MAX_CODE)
    # log2 by the straight lines between powers of two, raised so that it is nowhere too small.
    mantissa, power = torch.frexp(step)
    exponent = power - 1 + (2 * mantissa - 1) + LOG2_RISE
    codes = (relative * exp2_coarse(-exponent)[..., None]).round()
    return codes, exponent[:, :, None], channel_scale.double()


def exp2_coarse(x: Tensor) -> Tensor:
    """2^x by the kernels' cubic, relative error below 7.5e-5."""
    n = x.round()
    r, p = x - n, torch.zeros_like(x)
    for coefficient in reversed(EXP2_CUBIC):
        p = p * r + coefficient
    return torch.ldexp(p, n)


__all__ = ["attend", "exp2_coarse"]
