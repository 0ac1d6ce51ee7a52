"""Builds the torch-free libraries with CMake, then the extension adpdm._C against the installed torch.

Environment: MAX_JOBS (parallel compilations), ADPDM_CUDA (auto, 0, 1), ADPDM_CUDA_ARCHS, ADPDM_WERROR (0, 1).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    raise SystemExit(
        f"adpdm is compiled against the torch of this Python ({sys.executable}), which has none: "
        f"run `pip install 'torch>=2.11'` first, then install adpdm again ({error})."
    ) from None

ROOT = Path(__file__).resolve().parent
CORE_BUILD = Path("build", "core")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
# An environment that is used without being activated still lends its cmake and ninja.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def read_version() -> str:
    """The version, whose one home is adpdm/__init__.py."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "adpdm" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "adpdm/__init__.py holds no line __version__ = ..."
    return found.group(1)


def find_tool(name: str) -> str:
    """The path of cmake or ninja, from this environment or the system."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"adpdm's C++ core is built with {name}, found none: run `pip install {name}`.")
    return path


def build_core() -> dict[str, str]:
    """Configures and builds the libraries; returns what CMake wrote about them (core_config.txt)."""
    cmake = find_tool("cmake")
    options = {
        # Named on every run, because an isolated build has another ninja each time and CMake caches the path.
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "ADPDM_WERROR": os.environ.get("ADPDM_WERROR", "0"),
    }
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(ROOT / CORE_BUILD)]
    for name in ("ADPDM_CUDA", "ADPDM_CUDA_ARCHS"):
        # -U: what another build was told stays in CMake's cache, and would hold in place of the default.
        configure.append(f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}")
    build = [cmake, "--build", str(ROOT / CORE_BUILD), "--target", "adpdm_libraries"]
    build += ["-j", os.environ["MAX_JOBS"]]
    for command in (configure + [f"-D{name}={value}" for name, value in options.items()], build):
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"Building adpdm's C++ core failed at: {' '.join(command)}")
    lines = (ROOT / CORE_BUILD / "core_config.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def extension() -> CppExtension:
    """adpdm._C, as yet without the libraries that build_core() makes."""
    # Only checks and calls live here; Python's -O3 -g takes twice as long (igemm_prepare.cpp: 25 s, not 12).
    flags = ["-O2", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += [f"-isystem{path}" for path in include_paths()]  # no warnings from torch's own headers
    if os.environ.get("ADPDM_WERROR", "0") == "1":
        flags.append("-Werror")
    if torch.backends.openmp.is_available():
        # Compiled, not linked: at::parallel_for needs the pragmas; linking could load a second OpenMP.
        flags.append("-fopenmp")
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True))
    return CppExtension(
        "adpdm._C",
        sorted(glob.glob("csrc/bindings/*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("ADPDM_VERSION", f'"{read_version()}"')],
        depends=["setup.py", "adpdm/__init__.py", *headers],
        extra_compile_args={"cxx": flags},
    )


class BuildAdpdm(BuildExtension):
    """torch's build_ext, with the core built before it and objects kept between editable installs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip's editable build would put the objects in a new temporary folder and compile everything again.
        environment = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(Path("build", f"bindings-{environment}"))

    def run(self) -> None:
        core = build_core()
        libraries = [str(CORE_BUILD / name) for name in core["libraries"].split(";")]
        for module in self.extensions:
            module.depends += libraries
            module.extra_link_args += libraries
            if core["cuda_archs"]:
                archs = f'"{core["cuda_archs"]}"'
                module.define_macros += [("ADPDM_WITH_CUDA", None), ("ADPDM_CUDA_ARCHS", archs)]
                module.extra_link_args += [*core["cuda_libraries"].split(";"), "-lrt", "-ldl", "-lpthread"]
        super().run()


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildAdpdm})
