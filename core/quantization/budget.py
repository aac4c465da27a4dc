"""Bits for each layer, so that all of them fit into a number of bytes with the least total error.

A knapsack in which every layer takes one of its widths, solved exactly as an integer program (SciPy's HiGHS). Errors
of layers are taken to add up, which holds well while each is small.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from core.kit import InputError

_SECONDS = 60.0


def choose_bits(
    sizes: Mapping[str, Mapping[int, int]], errors: Mapping[str, Mapping[int, float]], limit: int
) -> dict[str, int]:
    """{layer: bits} of least summed error whose sizes in bytes sum to at most `limit`.

    `sizes` and `errors` are {layer: {bits: value}} with the same layers and widths. Raises InputError, with the least
    size that can be reached, where `limit` is below it.
    """
    least = sum(min(row.values()) for row in sizes.values())
    if least > limit:
        raise InputError(
            f"budget: {limit:,} bytes for the layers, but the least that their widths reach is {least:,}; "
            "raise the budget or allow fewer bits"
        )
    options = [(name, bits) for name, row in sizes.items() for bits in row]
    if not options:
        return {}
    finite = [e for name, bits in options if np.isfinite(e := errors[name][bits])]
    largest = max([*finite, 0.0]) or 1.0
    # HiGHS stops at an absolute gap of 1e-6: costs are scaled so that this is 1e-10 of the largest error. A width that
    # broke the model costs more than all others together.
    broken = 2e4 * (1 + len(sizes))
    cost = np.array([errors[n][b] / largest * 1e4 if np.isfinite(errors[n][b]) else broken for n, b in options])
    size = np.array([sizes[n][b] for n, b in options], dtype=float)
    rows = {name: row for row, name in enumerate(sizes)}
    from scipy.optimize import Bounds, LinearConstraint, milp  # 40 MB that running an artifact has no use for
    from scipy.sparse import lil_array

    one_each = lil_array((len(rows), len(options)))
    for column, (name, _) in enumerate(options):
        one_each[rows[name], column] = 1
    room = limit
    while True:
        found = milp(
            cost,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.tocsr(), 1, 1),
                LinearConstraint(size[None] / limit, ub=room / limit),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
        if found.x is None:
            raise InputError(f"budget: no choice of bits found ({found.message}); raise the budget a little")
        chosen = {name: bits for (name, bits), x in zip(options, found.x) if x > 0.5}
        over = sum(sizes[name][bits] for name, bits in chosen.items()) - limit
        if over <= 0:
            return chosen
        room -= over  # the solver's tolerance let some bytes through
