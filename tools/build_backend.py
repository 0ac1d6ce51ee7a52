"""setuptools' build backend, made to see the torch that is already installed in the target environment.

pip builds in an isolated environment; naming torch there would download a second one: gigabytes, another ABI.
"""

from __future__ import annotations

import site
import sys
import sysconfig

for _path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()):
    if _path not in sys.path:
        sys.path.append(_path)  # last, so that the isolated setuptools wins

from setuptools.build_meta import *  # noqa: E402,F403
