"""How far results of two backends may differ: one table for all tests.

Differences are measured against the largest number of a tensor, floor 1 (`scan_problems.assert_close`). Results in
float32 and below are compared under given gates, since near a tie a gate may decide otherwise there.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Largest differences of values and of gradients."""

    values: float
    gradients: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-11),  # sums of a few hundred numbers in another order; gradients: thousands
    torch.float32: Tolerance(1e-5, 2e-4),  # up to 120 steps of rounding (6e-8 each) through up to 3 layers
    # Products of operands rounded to 9 and 12 bits, in a recurrence that may amplify. Gradients are not compared.
    torch.bfloat16: Tolerance(0.15, float("inf")),
    torch.float16: Tolerance(0.03, float("inf")),
}
EXACT, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]
LARGE = Tolerance(1e-11, 1e-9)  # float64, where sums are longer: thousands of steps, rows or units
TIE = 1e-4  # |k D - 0.5| in float64 at which float32 states may decide otherwise
