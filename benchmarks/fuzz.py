"""Inputs that nobody thought of, by the thousand: each is to end in a right result or in an InputError.

The property-based tests of tests/test_fuzz*.py with more inputs than in the suite. The first input that
fails is made as small as it can be and shown.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

from patchscore.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "tests"


class Fuzz:
    """The study that ``python -m benchmarks fuzz`` runs."""

    about = __doc__ or ""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options."""
        parser.add_argument("--inputs", type=int, default=10_000, help="in all (default: %(default)s)")
        parser.add_argument("--only", default="", help="tests whose names contain this word")

    def run(self, options: argparse.Namespace) -> int:
        """Run the tests, each with its share of the inputs; 0 if none has failed."""
        files = sorted(FOLDER.glob("test_fuzz*.py"))
        tests = sum(path.read_text().count("\n@given(") for path in files)
        if options.inputs < 1 or not tests:
            raise InputError(
                f"--inputs is {options.inputs} for {tests} tests of {FOLDER}; expected some."
            )
        each = math.ceil(options.inputs / tests)
        print(f"{each} inputs for each of {tests} tests")
        command = [sys.executable, "-m", "pytest", "-q", *map(str, files), "-k", options.only or "test"]
        environment = {**os.environ, "PATCHSCORE_FUZZ": str(each)}
        return subprocess.run(command, env=environment, cwd=FOLDER.parent, check=False).returncode


STUDY = Fuzz()
