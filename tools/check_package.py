"""Checks the sdist and the wheel of a folder: nothing is missing, they work in an empty environment.

python tools/check_package.py build/dist
python tools/check_package.py build/dist --oldest-torch

The sdist has to hold every tracked file that the build reads, and CMake has to configure what was unpacked.
The wheel is installed with its dependencies into a new environment, where, far from the source tree and
without a GPU in sight, it has to import, describe itself, quantize, save, load and sample a tiny model, and
pass a part of the tests.

With --oldest-torch the sdist alone is looked at: it has to compile, without CUDA, against the oldest torch
that pyproject.toml allows, and to do the same there. For Linux on x86-64 PyPI has that torch with CUDA only:
4.5 GB in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = (
    "adpdm",
    "csrc",
    "cpp_tests",
    "tools",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
)
# Operators, checkpoints and their errors: what a wheel could have lost on the way.
WHEEL_TESTS = (
    "test_ops_quantize.py",
    "test_ops_linear.py",
    "test_ops_conv2d.py",
    "test_ops_norm_quantize.py",
    "test_saving.py",
)
SHARED = ("codes.py", "conftest.py", "thread_counts.py")  # by these tests

SMOKE = """
import sys, torch, adpdm
from adpdm.testing import ONE_BLOCK, tiny_pipeline
from diffusers import DDIMPipeline
assert not torch.cuda.is_available()
pipe = tiny_pipeline(**ONE_BLOCK)
config = adpdm.QuantConfig(num_inference_steps=3, num_groups=2, grouping="dp", histogram_images=2)
print(adpdm.quantize(pipe, config).coverage)
pipe.save_pretrained(sys.argv[1])
loaded = DDIMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
def sample(p):
    p.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return p(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
assert (sample(pipe) == sample(loaded)).all()
"""


class Faulty(Exception):
    """What is wrong with a package, as a sentence."""


def the_one(folder: Path, pattern: str) -> Path:
    """The only file of a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Faulty(f"wanted one {pattern} in {folder}, got {[path.name for path in found]}")
    return found[0]


def missing_from(names: set[str], tracked: list[str]) -> list[str]:
    """Tracked files that an sdist of these member names lacks; members stand in one top folder."""
    inside = {name.partition("/")[2] for name in names}
    return sorted(set(tracked) - inside)


def check_sdist(path: Path, scratch: Path) -> None:
    """Raise unless the sdist is complete and CMake can configure it."""
    tracked = run(["git", "-C", str(ROOT), "ls-files", "--", *BUILT_FROM]).split()
    with tarfile.open(path) as archive:
        if missing := missing_from(set(archive.getnames()), tracked):
            raise Faulty(
                f"{path.name} lacks {len(missing)} tracked files, e.g. {missing[:5]}; see MANIFEST.in"
            )
        # Python 3.11.2, which is Debian's, has no filters; of an archive made a moment ago none is needed.
        archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source, build = the_one(scratch, "adpdm-*"), scratch / "build"
    run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), "-DADPDM_CUDA=0"])
    run(["cmake", "--build", str(build), "--target", "adpdm_libraries", "--", "-n"])  # every source is there
    print(f"{path.name}: {len(tracked)} tracked files, configures")


class Environment:
    """A new one with pip alone, in which commands see neither the source tree nor a GPU.

    Args:
        scratch: empty folder for it, and for the empty one in which its commands run.
        variables: more of the environment's.
    """

    def __init__(self, scratch: Path, variables: dict[str, str] | None = None) -> None:
        self.home, self.empty = scratch / "venv", scratch / "empty"
        self.empty.mkdir()
        venv.create(self.home, with_pip=True)
        # A PYTHONPATH with the source tree would tell pip that adpdm is there already.
        isolated = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        isolated |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.variables = isolated | (variables or {})

    def run(self, program: str, *arguments: str) -> str:
        """Standard output of one of its programs."""
        return run([str(self.home / "bin" / program), *arguments], self.empty, self.variables)

    def install(self, *arguments: str) -> None:
        """Let its pip install something."""
        self.run("python", "-m", "pip", "install", "-q", "--no-compile", *arguments)

    def check_adpdm(self) -> str:
        """What the installed package says of torch and of the tiny model; raise unless all is in order."""
        where = self.run("python", "-c", "import adpdm; print(adpdm.__file__)").strip()
        if not Path(where).is_relative_to(self.home):
            raise Faulty(f"wanted adpdm from {self.home}, got {where}")
        info = json.loads(self.run("adpdm", "info", "--json"))
        doctor = json.loads(self.run("adpdm", "doctor", "--json"))
        if [k["name"] for k in doctor["kernels"] if k["state"] == "used"] != [info["instruction set"]]:
            raise Faulty(f"adpdm doctor and adpdm info disagree on the kernels in use: {doctor['kernels']}")
        coverage = self.run("python", "-c", SMOKE, "saved").strip()
        return f"in an empty environment with torch {info['torch']}: {coverage}"

    def run_tests(self) -> str:
        """The last line of pytest on WHEEL_TESTS, which stand where no source tree can be imported from."""
        tests = self.empty / "python_tests"
        tests.mkdir()
        for name in (*SHARED, *WHEEL_TESTS):
            shutil.copy(ROOT / "python_tests" / name, tests)
        said = self.run("python", "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests), str(tests))
        return said.strip().splitlines()[-1]


def check_wheel(path: Path, scratch: Path, pip_flags: list[str]) -> None:
    """Raise unless the wheel works in an empty environment, and tests of the source tree pass against it."""
    environment = Environment(scratch)
    settings = [*pip_flags, "-c", str(ROOT / "constraints.txt")]
    environment.install(*settings, str(path))
    print(f"{path.name}: {environment.check_adpdm()}")
    environment.install(*settings, "pytest", "hypothesis")
    print(f"{path.name}: {environment.run_tests()}")


def oldest_torch(pyproject: str) -> str:
    """What pip is to install for the oldest torch that a pyproject.toml of this text allows."""
    found = re.search(r'"torch>=(\d+\.\d+)"', pyproject)
    if found is None:
        raise Faulty('wanted a dependency "torch>=MAJOR.MINOR" in pyproject.toml, found none')
    return f"torch=={found.group(1)}.*"


def constraints_without(names: tuple[str, ...]) -> str:
    """constraints.txt without the lines of these packages."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "\n".join(line for line in lines if line.partition("==")[0] not in names)


def check_oldest_torch(path: Path, scratch: Path, pip_flags: list[str]) -> None:
    """Raise unless the sdist compiles against the oldest torch, and works with it."""
    environment, constraints = Environment(scratch, {"ADPDM_CUDA": "0"}), scratch / "constraints.txt"
    constraints.write_text(constraints_without(("torch", "setuptools")))  # that torch wants an older one
    settings = [*pip_flags, "-c", str(constraints)]
    environment.install(*settings, oldest_torch((ROOT / "pyproject.toml").read_text()))
    environment.install(*settings, str(path))
    print(f"{path.name}: compiles; {environment.check_adpdm()}")


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command.

    Raises:
        Faulty: it failed; holds its output.
    """
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if result.returncode:
        raise Faulty(
            f"`{shlex.join(command)}` failed with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds one adpdm-*.tar.gz and one adpdm-*.whl")
    parser.add_argument(
        "--oldest-torch", action="store_true", help="compile the sdist against the oldest one"
    )
    parser.add_argument("--pip-flags", default="", help="more arguments of pip install")
    args = parser.parse_args()
    pip_flags = shlex.split(args.pip_flags)
    try:
        sdist = the_one(args.folder, "adpdm-*.tar.gz").resolve()
        with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory() as environment:
            if args.oldest_torch:
                check_oldest_torch(sdist, Path(environment), pip_flags)
            else:
                check_sdist(sdist, Path(unpacked))
                check_wheel(the_one(args.folder, "adpdm-*.whl").resolve(), Path(environment), pip_flags)
    except Faulty as fault:
        print(f"check_package: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
