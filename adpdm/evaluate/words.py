"""Figures of merit as a person reads them."""

from __future__ import annotations

from adpdm.evaluate.comparison import FRECHET_NAME, EvaluationResult
from adpdm.evaluate.frechet import FrechetResult


def evaluation_rows(result: EvaluationResult) -> dict[str, str]:
    """What a person wants to know of an evaluation, label to text."""
    rows = {
        "PSNR of samples": f"{result.psnr_db:.2f} dB",
        "SQNR of samples": f"{result.sqnr_db:.2f} dB",
        "LPIPS (AlexNet)": "-" if result.lpips is None else f"{result.lpips:.4f}",
    }
    if result.frechet is not None:
        rows[FRECHET_NAME] = frechet_words(result.frechet)
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


def frechet_words(f: FrechetResult) -> str:
    """The distance with its interval, and of what."""
    return (
        f"{f.distance:.2f} [{f.low:.2f}, {f.high:.2f}], {f.num_images[0]} images, {f.dimensions} dimensions"
    )
