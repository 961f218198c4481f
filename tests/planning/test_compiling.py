"""What is made of the compiler's words."""

import pytest

from jaxdiff.parallel.chips import GIB
from jaxdiff.planning.compiling import parse_oom_message

EARLY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (20.00G) exceeds available HBM (15.75G). HLO module: jit__lambda."
)
LATE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 16.22G of 15.75G hbm. Exceeded hbm capacity by 488.94M.\n\n"
    "Total hbm usage >= 16.48G:\n    reserved        258.12M \n    program          15.45G \n"
)


def test_what_does_not_fit_is_said_before_and_after_it_is_laid_out():
    assert parse_oom_message(EARLY) == 20 * GIB
    assert parse_oom_message(LATE) == pytest.approx(16.22 * GIB)
    assert parse_oom_message("INVALID_ARGUMENT: got 20G, expected another grid") is None
