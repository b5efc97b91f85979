"""What `make test` runs where pytest is not installed: every case of cases.py on every instruction set.

That is the heart of test_equality.py (outputs and gradients by name, under the one rule of numerics.py), and no more.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import replace

from cases import CORNER, FEATURE, LOW_PRECISION, REGULAR, ZERO, expected, make_data, run_module
from numerics import assert_all_as_good

import fusedrnn
from fusedrnn._dispatch import extension


def main() -> int:
    warnings.simplefilter("ignore", fusedrnn.FallbackWarning)  # known, and the subject of other tests
    sizes = [replace(case, dtype=dtype) for case in REGULAR + CORNER for dtype in ("float32", "float64")]
    options = FEATURE + ZERO + LOW_PRECISION
    passed = failed = 0
    for isa in extension.instruction_sets() if extension else ["reference"]:
        if extension:
            extension.use(isa)
        for case in itertools.chain(sizes, options):
            try:
                ours = run_module(case.module(fusedrnn), case, make_data(case))
                assert_all_as_good(ours, *expected(case), case.torch_dtype)
                passed += 1
            except AssertionError as error:
                failed += 1
                print(f"FAILED {isa} {case}: {error}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
