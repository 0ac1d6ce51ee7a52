"""The documentation does what it says: Python blocks and `adpdm` commands run, on a tiny model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adpdm import cli
from adpdm.testing import ONE_BLOCK, tiny_pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MODEL = "models/ddpm-fashion-mnist-32"
BLOCK = re.compile(
    r"^(<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    why_not: str  # empty for what runs


def blocks_of(page: str) -> list[Block]:
    return [Block(m["language"], m["text"], m["why"] or "") for m in BLOCK.finditer(page)]


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a tiny model where pages have the demo's; no network, no extractors."""
    pipe: Any = tiny_pipeline(**ONE_BLOCK)
    pipe.save_pretrained(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("load_lite0", "load_lpips"):
        monkeypatch.setattr(f"adpdm.evaluate.comparison.{name}", lambda *_: None)


def run_blocks(blocks: list[Block], page: str) -> int:
    """Run what can run, in order and in one namespace; returns how many did."""
    names: dict[str, Any] = {"__name__": "__docs__"}
    ran = 0
    for block in blocks:
        if block.why_not:
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        else:
            for program, *arguments in commands_of(block.text):
                assert program == "adpdm", f"{page}: mark the block of `{program}` as not run, with a reason"
                assert cli.main(arguments) == 0, f"{page}: adpdm {shlex.join(arguments)}"
        ran += 1
    return ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, elsewhere: None) -> None:
    blocks = blocks_of(page.read_text())
    assert {block.language for block in blocks} <= {"python", "sh"}, "wanted ```python or ```sh"
    assert page.read_text().count("```") == 2 * len(blocks), "a fence that the test does not see"
    assert run_blocks(blocks, page.name) == sum(not block.why_not for block in blocks)


def test_task_pages_have_something_to_run() -> None:
    for name in ("index", "quantize", "evaluate", "choose_bits", "deploy_cpu", "deploy_gpu", "new_operator"):
        blocks = blocks_of((ROOT / "docs" / f"{name}.md").read_text())
        assert any(not block.why_not for block in blocks), name


def test_python_of_the_readme_runs(elsewhere: None) -> None:
    blocks = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.language == "python"]
    assert len(blocks) == 2  # the ten lines, and quantizing while loading
    assert run_blocks(blocks, "README.md") == 2
    assert Path("fashion-w8a8/model_index.json").is_file()


def test_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_block_that_fails_is_found(elsewhere: None) -> None:
    page = "```python\nimport adpdm\nadpdm.QuantConfig(weight_bits=9)\n```\n"
    with pytest.raises(ValueError, match="weight_bits must be in"):
        run_blocks(blocks_of(page), "page.md")
    with pytest.raises(AssertionError, match="adpdm sample nowhere"):
        run_blocks(blocks_of("```sh\nadpdm sample nowhere\n```\n"), "page.md")
    with pytest.raises(AssertionError, match="mark the block of `make`"):
        run_blocks(blocks_of("```sh\nmake test\n```\n"), "page.md")


def test_marked_block_is_left_out() -> None:
    (block,) = blocks_of("<!-- not run: needs a GPU -->\n```sh\nmake gpu  # all\n```\n")
    assert block.why_not == "needs a GPU"
    assert list(commands_of("adpdm x \\\n  y  # z\n\n# only a comment\n")) == [["adpdm", "x", "y"]]
