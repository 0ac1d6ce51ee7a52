"""Figures of merit as a person reads them."""

from __future__ import annotations

from .comparison import FRECHET_NAME, KERNEL_NAME, EvaluationResult
from .distance import SetDistance
from .frechet import FrechetResult
from .kernel import KernelResult


def evaluation_rows(result: EvaluationResult) -> dict[str, str]:
    """What a person wants to know of an evaluation, label to text."""
    rows = {
        "PSNR of samples": f"{result.psnr_db:.2f} dB",
        "SQNR of samples": f"{result.sqnr_db:.2f} dB",
        "LPIPS (AlexNet)": "-" if result.lpips is None else f"{result.lpips:.4f}",
    }
    if result.frechet is not None:
        rows[FRECHET_NAME] = frechet_words(result.frechet)
    if result.kernel is not None:
        rows[KERNEL_NAME] = kernel_words(result.kernel)
    for timing in result.timings:
        rows[f"time per step, batch {timing.batch_size}"] = (
            f"{timing.quantized_seconds * 1e3:.1f} ms against {timing.reference_seconds * 1e3:.1f} ms, "
            f"{timing.speedup:.2f}x (quartiles {timing.speedup_low:.2f} to {timing.speedup_high:.2f})"
        )
    if result.reference_bytes and result.quantized_bytes:
        share = result.quantized_bytes / result.reference_bytes
        rows["weights"] = f"{result.quantized_bytes / 1e6:.2f} MB, {share:.1%} of the original"
    for sentence in result.missing:
        rows.setdefault("not measured", "")
        rows["not measured"] += sentence + " "
    return rows


def distance_rows(found: SetDistance) -> dict[str, str]:
    """What a person wants to know of two sets of images, label to text."""
    rows = {FRECHET_NAME: frechet_words(found.frechet)}
    if found.kernel is not None:
        rows[KERNEL_NAME] = kernel_words(found.kernel)
    if found.fid is not None:
        rows["FID"] = f"{found.fid:.3f}, {found.num_images[0]} and {found.num_images[1]} images"
    if found.kid is not None:
        rows["KID"] = kernel_words(found.kid)
    if found.psnr_db is None:
        rows["image by image"] = f"not compared: {found.unpaired}"
    else:
        first = "" if found.num_pairs == max(found.num_images) else f", the first {found.num_pairs} images"
        rows["mean PSNR of images of one seed"] = f"{found.psnr_db:.2f} dB{first}"
    if found.lpips is not None:
        rows["LPIPS (AlexNet)"] = f"{found.lpips:.4f}"
    return rows


def frechet_words(f: FrechetResult) -> str:
    """The distance with the spread of resampling, and of what."""
    return (
        f"{f.distance:.2f} [{f.low:.2f}, {f.high:.2f}], {f.num_images[0]} images, {f.dimensions} dimensions"
    )


def kernel_words(k: KernelResult) -> str:
    """The distance with its standard error, and of what."""
    error = k.deviation / k.subsets**0.5
    of = f"{k.num_images[0]} and {k.num_images[1]} images"
    if k.subsets > 1:
        of += f", {k.subsets} subsets of {k.subset_size[0]} with standard deviation {k.deviation:.2g}"
    return f"{k.distance:.5f} with standard error {error:.2g}, {of}"
