"""Tests of the list of planted faults (tools/mutants.txt): it must keep up with the sources; builds none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_tool() -> ModuleType:
    """tools/ is no package."""
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutate = load_tool()
MUTANTS = mutate.parse_list(mutate.LIST.read_text())


def test_list_is_parsed_by_file_name_and_lines() -> None:
    text = "Words.\n\n[a.cu Test*:Other*]\nfirst\n-one\n-  two\n+three\n\nsecond\n-four\n\n"
    text += "[b.cu All]\nthird\n-x\n+y\n+z\n"
    first, second, third = mutate.parse_list(text)
    assert first == mutate.Mutant("first", "a.cu", "Test*:Other*", "one\n  two", "three")
    assert second == mutate.Mutant("second", "a.cu", "Test*:Other*", "four", "")
    assert third == mutate.Mutant("third", "b.cu", "All", "x", "y\nz")


def test_filter_that_matches_no_test_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "adpdm_simt_tests").write_text("")
    (tmp_path / "adpdm_tests").write_text("")
    monkeypatch.setattr(mutate, "BUILD", tmp_path)
    monkeypatch.setattr(mutate, "copy_tree", lambda: None)
    said = "Note: Google Test filter = Nothing*\n[==========] Running 0 tests from 0 test suites.\n"
    done = subprocess.CompletedProcess(["a program"], 0, said)
    monkeypatch.setattr(mutate, "run", lambda *rest: done)
    monkeypatch.setattr(sys, "argv", ["mutate.py", "--only", MUTANTS[0].name])
    assert mutate.main() == 2
    assert capsys.readouterr().out == f"mutate: no test matches {MUTANTS[0].tests}\n"


def test_names_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fault_can_be_planted(mutant: mutate.Mutant) -> None:
    assert mutant.old != mutant.new
    assert (ROOT / mutant.path).read_text().count(mutant.old) == 1
