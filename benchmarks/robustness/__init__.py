"""What denoisers lose when content, scanner, gain, geometry or noise change."""

from benchmarks.robustness.study import STUDY as STUDY
