"""`python -m adpdm.evaluate --fetch-extractors`: downloads the LPIPS weights once and says where they lie."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .extractors import fetch_extractors


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a failure is one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m adpdm.evaluate", description=__doc__)
    parser.add_argument("--fetch-extractors", action="store_true", required=True)
    parser.add_argument("--cache-dir", type=Path, default=None, help="default: the cache folder of the user")
    options = parser.parse_args(arguments)
    try:
        print(fetch_extractors(options.cache_dir))
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
