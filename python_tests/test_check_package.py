"""tools/check_package.py finds what is missing from a package."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_tool() -> ModuleType:
    """tools/ is no package."""
    spec = importlib.util.spec_from_file_location("check_package", ROOT / "tools" / "check_package.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_package = load_tool()


def test_missing_files_are_those_that_no_member_is() -> None:
    names = {"adpdm-0.1", "adpdm-0.1/setup.py", "adpdm-0.1/csrc/a.cpp"}
    assert check_package.missing_from(names, ["setup.py", "csrc/a.cpp", "csrc/b.h"]) == ["csrc/b.h"]
    assert check_package.missing_from(names, ["setup.py"]) == []


def test_sdist_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = tmp_path / "adpdm-0.1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(ROOT / "setup.py", "adpdm-0.1/setup.py")
    monkeypatch.setattr(check_package, "run", lambda *_: "setup.py csrc/cpu/igemm.cpp")
    with pytest.raises(check_package.Faulty, match=r"lacks 1 tracked files, e.g. \['csrc/cpu/igemm.cpp'\]"):
        check_package.check_sdist(sdist, tmp_path)


def test_folder_with_two_wheels_is_refused(tmp_path: Path) -> None:
    for name in ("adpdm-1.whl", "adpdm-2.whl"):
        (tmp_path / name).touch()
    with pytest.raises(
        check_package.Faulty, match=r"wanted one adpdm-\*\.whl .*'adpdm-1.whl', 'adpdm-2.whl'"
    ):
        check_package.the_one(tmp_path, "adpdm-*.whl")


def test_failing_command_is_named_with_its_output() -> None:
    with pytest.raises(check_package.Faulty, match=r"`sh -c 'echo why >&2; exit 3'` failed with 3:\nwhy"):
        check_package.run(["sh", "-c", "echo why >&2; exit 3"])


def test_oldest_torch_is_the_one_that_the_package_asks_for() -> None:
    assert check_package.oldest_torch('dependencies = [\n  "torch>=2.11",\n]') == "torch==2.11.*"
    assert check_package.oldest_torch((ROOT / "pyproject.toml").read_text()).startswith("torch==2.")
    with pytest.raises(check_package.Faulty, match="wanted a dependency"):
        check_package.oldest_torch('dependencies = ["numpy>=1.26"]')


def test_constraints_lose_the_lines_of_named_packages() -> None:
    lines = check_package.constraints_without(("torch", "setuptools")).splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert {"diffusers", "efficientnet-lite-pytorch"} <= names
    assert names.isdisjoint({"torch", "setuptools"})
