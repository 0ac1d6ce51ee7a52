"""The report says of every layer how it runs and why not faster, as far as the model's record tells."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

import adpdm
from adpdm import QuantConfig, report
from adpdm.layer_runs import read_record, recorded_coverage
from adpdm.nn import FusionInfo, block_around
from adpdm.report import Coverage, LayerRun
from adpdm.testing import ONE_BLOCK, tiny_pipeline

NOT_RECORDED = "Which layers run fused was not recorded when this model was quantized."


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Of a model where one block cannot be fused, because a convolution of it was left out."""
    settings = QuantConfig(
        num_inference_steps=2,
        num_groups=2,
        histogram_images=2,
        grouping="uniform",
        modules_to_not_convert=("mid_block.resnets.0.conv2",),
        input_output_bits=8,
    )
    return adpdm.quantize(tiny_pipeline(**ONE_BLOCK), settings).to_dict()


def page_of(coverage: Coverage) -> str:
    """The section on coverage, as it is in the file but with plain spaces."""
    data = report.ReportData(title="x", command="x", seed=0, coverage=coverage)
    text = report.render(data).replace("\u00a0", " ")
    return text[text.index("<h3>Coverage</h3>") : text.index('id="notes"')]


def tables(page: str) -> dict[str, list[str]]:
    """Cells of the tables behind a line, reasons included, by that line."""
    found = re.findall(r"<details><summary>(.*?)</summary>.*?<tbody>(.*?)</tbody>", page)
    rows = {label: re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", body) for label, body in found}
    return {k: [html.unescape(re.sub("<.*?>", "", cell)) for cell in cells] for k, cells in rows.items()}


def test_sentence_counts_layers_and_blocks(record: dict[str, Any]) -> None:
    coverage = recorded_coverage(record)
    runs = [layer.runs for layer in coverage.layers]
    blocks = sum(info["fused"] for info in record["fusion"])
    assert {runs.count("fused") > 0, runs.count("per layer") > 0, blocks > 0} == {True}
    macs = sum(layer["macs"] for layer in record["layers"] if layer["bits"] is None)
    left = 100 * macs / sum(layer["macs"] for layer in record["layers"])
    page = page_of(coverage)
    assert f"Of {len(runs)} layers, {runs.count('fused')} run fused in {blocks} blocks (" in page
    assert f"{runs.count('float')} in full precision ({left:.1f} %)." in page
    assert NOT_RECORDED not in page


def test_layers_that_are_not_fused_stand_with_their_reasons(record: dict[str, Any]) -> None:
    shown = tables(page_of(recorded_coverage(record)))
    alone, kept = (next(cells for k, cells in shown.items() if words in k) for words in ("by layer", "full"))
    found = next(i for i, cell in enumerate(alone) if cell.startswith("conv2 is not quantized: "))
    assert alone[found + 1 : found + 3] == [
        "mid_block.resnets.0.conv1",
        "mid_block.resnets.0 (ResnetBlock2D)",
    ]
    assert any(cell.startswith("no known block around it: 2 layers") for cell in alone)
    assert alone[alone.index("conv_in") + 1] == "–"
    assert any(cell.startswith("excluded by modules_to_not_convert: 1 layer,") for cell in kept)
    assert kept.index("time_embedding.linear_1") < kept.index("time_embedding.linear_2")
    assert "down_blocks.0.resnets.0.conv1" not in alone + kept


def test_record_without_fusion_is_said_to_lack_it(record: dict[str, Any]) -> None:
    before = {key: value for key, value in record.items() if key != "fusion"}
    page = page_of(recorded_coverage(before))
    chosen = sum(layer["bits"] is not None for layer in record["layers"])
    assert f"{chosen} run in integers (" in page
    assert NOT_RECORDED in page
    assert "fused in" not in page
    assert [label for label in tables(page) if "by layer" in label] == []


def test_reasons_with_most_work_come_first() -> None:
    layers = (
        LayerRun("a", "per layer", "small", macs_share=0.1),
        LayerRun("b", "per layer", "large", macs_share=0.2),
        LayerRun("c", "per layer", "small", macs_share=0.05),
    )
    (cells,) = tables(page_of(Coverage(1.0, 1.0, layers, 0))).values()
    small = ["small: 2 layers, 15.0 %", "a", "10.0 %", "c", "5.0 %"]
    assert cells == ["large: 1 layer, 20.0 %", "b", "20.0 %", *small]


def test_shares_are_left_out_where_they_are_unknown() -> None:
    layers = (LayerRun("a", "fused"), LayerRun("b", "float", "embedding path"))
    page = page_of(Coverage(1.0, 1.0, layers, 1))
    assert "Of 2 layers, 1 run fused in 1 block, 0 layer by layer, 1 in full precision." in page
    assert tables(page) == {"In full precision (1), with reasons": ["embedding path: 1 layer", "b"]}


def test_innermost_block_says_how_a_layer_runs() -> None:
    infos = [FusionInfo(name, "Block", True, "") for name in ("", "up.1", "up.1.resnets.0", "up.10")]
    wanted = {"up.1.resnets.0.conv1": "up.1.resnets.0", "up.1.conv": "up.1", "up.10.conv": "up.10", "out": ""}
    assert {layer: block_around(layer, infos).name for layer in wanted} == wanted


def test_record_of_a_later_version_is_read() -> None:
    info = FusionInfo("up.1", "Block", True, "")
    assert FusionInfo.from_dict({**info.to_dict(), "told_later": 1}) == info


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": [{}]},
        {"layers": 3},
        {"coverage": {}},
        {"fusion": [{}]},
        {"layers": [{"name": "a", "macs": 1, "bits": [8, 8], "reason": ""}], "fusion": []},
    ],
    ids=str,
)
def test_record_that_is_damaged_is_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    whole = {"config": {}, "trace": {}, "layers": [], "coverage": {"macs": 1.0, "parameters": 1.0}}
    (tmp_path / "r.json").write_text(json.dumps(whole))
    read_record(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps({**whole, **damage}))
    with pytest.raises(ValueError, match=r"r.json must be the record that .*, got one with damaged layers"):
        read_record(tmp_path / "r.json")
