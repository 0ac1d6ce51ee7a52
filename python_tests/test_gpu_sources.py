"""tools/gpu_sources.py and what gpu_run.py says to be missing: what makes outcomes of `make gpu` stale."""

from __future__ import annotations

from pathlib import Path

import gpu_run
import gpu_sources
import gpu_stages
import pytest
import torch

FACTS = dict.fromkeys(gpu_sources.TOOLCHAIN, "some")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with few sources, and a place for programs that were built elsewhere."""
    for name in (
        "CMakeLists.txt",
        "setup.py",
        "csrc/a.cu",
        "benchmarks/a.py",
        "benchmarks/results/card.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(gpu_stages, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(gpu_stages, "GOOGLETEST", tmp_path / "googletest")
    return tmp_path


def add_programs(tree: Path) -> None:
    (tree / "prebuilt").mkdir()
    for path in gpu_stages.prebuilt_programs():
        path.write_text("program")


@pytest.mark.parametrize(
    ("name", "is_source", "is_of_programs"),
    [
        ("csrc/a.cu", True, True),
        ("CMakeLists.txt", True, True),
        ("setup.py", True, False),
        ("benchmarks/b.py", True, False),
        ("benchmarks/results/card.json", False, False),
    ],
)
def test_hash_changes_with_a_source(tree: Path, name: str, is_source: bool, is_of_programs: bool) -> None:
    def hashes() -> list[str]:
        names = (gpu_sources.SOURCES, gpu_sources.PROGRAM_SOURCES)
        return [gpu_sources.hash_files(tree, chosen) for chosen in names]

    before = hashes()
    assert hashes() == before
    (tree / name).write_text("changed")
    changed = [new != old for new, old in zip(hashes(), before, strict=True)]
    assert changed == [is_source, is_of_programs]


def test_state_is_of_sources_programs_card_and_toolchain(tree: Path) -> None:
    found = gpu_sources.made_of(tree, FACTS)
    assert set(found) == {"sources", "programs", "device", "python", "torch", "cuda", "nvcc", "g++"}
    for name in FACTS:
        assert gpu_sources.made_of(tree, {**FACTS, name: "other"})[name] != found[name]
    add_programs(tree)
    first = gpu_sources.made_of(tree, FACTS)["programs"]
    assert first != found["programs"]
    (tree / "prebuilt" / "adpdm_gpu_peaks").write_text("another")
    assert gpu_sources.made_of(tree, FACTS)["programs"] != first


def test_facts_of_a_run_name_the_toolchain(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_name": "card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    facts = gpu_run.gather_facts()
    assert gpu_sources.made_of(tree, facts)["device"] == "card"
    assert (facts["arch"], facts["torch"]) == ("90a", torch.__version__)


def test_programs_of_other_or_unknown_sources_are_refused(tree: Path) -> None:
    gpu_sources.check_prebuilt(tree)
    add_programs(tree)
    with pytest.raises(SystemExit, match=r"wanted programs of these sources .*, found no such file: build"):
        gpu_sources.check_prebuilt(tree)
    note = tree / "prebuilt" / "sources.txt"
    note.write_text(gpu_sources.hash_files(tree, gpu_sources.PROGRAM_SOURCES) + "\n")
    gpu_sources.check_prebuilt(tree)
    (tree / "csrc" / "a.cu").write_text("changed")
    with pytest.raises(SystemExit, match=rf"found {note.read_text()[:12]}: build them anew"):
        gpu_sources.check_prebuilt(tree)


def test_missing_names_numpy_and_googletest(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = gpu_run.importlib.util.find_spec
    monkeypatch.setattr(gpu_stages, "INCLUDES", (tree / "include",))
    monkeypatch.setattr(
        gpu_run.importlib.util, "find_spec", lambda name: None if name == "numpy" else find_spec(name)
    )
    assert {"numpy", "googletest"} <= set(gpu_run.missing())
    (tree / "include" / "gtest").mkdir(parents=True)
    (tree / "include" / "gtest" / "gtest.h").write_text("")
    assert "googletest" not in gpu_run.missing()


def test_programs_that_are_there_need_no_googletest(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "INCLUDES", ())
    assert "googletest" in gpu_run.missing()
    (tree / "googletest").mkdir()
    assert "googletest" not in gpu_run.missing()
    (tree / "googletest").rmdir()
    add_programs(tree)
    assert "googletest" not in gpu_run.missing()
