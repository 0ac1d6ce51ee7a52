"""What `adpdm quantize` tells at its end: every row of its table in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from adpdm import QuantConfig, cli
from adpdm.calibrate import CalibrationTrace
from adpdm.nn import Coverage
from adpdm.pipeline import QuantizationReport
from adpdm.search import SearchOutcome

TRACE = {
    "histogram_bytes": 3 * 2**20,
    "trajectory_bytes": 2**19,
    "seconds": {"histograms": 1.2, "search": 30.6},
    "group_gain": {
        "a": {"gain_db": 1.0, "limit_db": 4.0},
        "b": {"gain_db": 2.5, "limit_db": 5.0},
        "c": {"gain_db": 7.25, "limit_db": 9.0},
    },
}
OUTCOME = {
    "start_loss": 0.02,
    "soft_loss": 0.001,
    "hard_loss": 0.01,
    "start_error": 1.0,
    "hard_error": 0.5,
    "max_importance": 0.75,
    "moved": 0.25,
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of the table that is told, with its title."""
    told: dict[str, str] = {}
    monkeypatch.setattr(cli, "_table", lambda title, rows: told.update(title=title, **rows))
    return told


def tell(**trace: object) -> None:
    coverage = Coverage(layers=3, total_layers=4, macs=0.75, parameters=0.5)
    report = QuantizationReport(QuantConfig(), [], coverage, CalibrationTrace(**TRACE, **trace), [], [])
    cli._tell_quantized(report, Path("q"))


def test_rows_of_every_run(rows: dict[str, str]) -> None:
    tell()
    assert rows == {
        "title": "quantized into q",
        "covered": "3 of 4 layers, 75.0% of the multiply-accumulates, 50.0% of the layer parameters",
        "fused": "0 of 0 blocks",
        "histograms": "3.0 MiB, cached inputs 0.5 MiB",
        "seconds": "histograms 1, search 31",
        "groups": "input error 2.50 dB below one range for all steps (median), 7.25 at most; "
        "a range for every step: 5.00 dB",
    }


@pytest.mark.parametrize(("is_kept", "end"), [(True, "kept"), (False, "put back")])
def test_search_is_told_with_what_became_of_it(rows: dict[str, str], is_kept: bool, end: str) -> None:
    tell(outcome=SearchOutcome(**OUTCOME, is_kept=is_kept))
    assert rows["search"] == (
        "soft/hard gap +10.00 dB, max importance 0.75, groups moved 25.0%, "
        f"+3.01 dB on held-out samples, {end}"
    )


def test_correction_is_told_with_its_best_step(rows: dict[str, str]) -> None:
    tell(correction={"energy_left": [1.0, 0.5, 0.25, 1.0]})
    assert rows["corrected"] == "predictions of 2 of 4 steps, squared error down to 25% at best"


@pytest.mark.parametrize("energy_left", [[], [1.0, 1.0]])
def test_correction_of_nothing_is_not_told(rows: dict[str, str], energy_left: list[float]) -> None:
    tell(correction={"energy_left": energy_left})
    assert "corrected" not in rows


def test_warnings_of_calibration_are_told(rows: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tell(warnings=["the search ended undecided"])
    assert "search" not in rows
    assert "warning: the search ended undecided" in capsys.readouterr().err
