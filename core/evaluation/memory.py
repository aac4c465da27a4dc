"""`python -m core.evaluation.memory FOLDER`: load an artifact, run it, and print the peak of the resident set.

It is a process of its own because the peak of a process never falls again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from core.evaluation.measure import example_inputs, runtime_title
from core.export import Artifact
from core.kit import InputError

RUNS = 3


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB (1e6 bytes); raises InputError where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise InputError("peak memory is read from /proc/self/status, which this system lacks; measure it on Linux")
    line = next(row for row in status.read_text().splitlines() if row.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def main(arguments: list[str]) -> int:
    """Print {"peak", "before"} as JSON."""
    parser = argparse.ArgumentParser(prog="core.evaluation.memory", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        artifact = Artifact.open(options.folder)
        variant = artifact.variant(options.variant)
        runtime_title(artifact, variant.name)  # imports the runtime, which is not the model's memory
        before = resident("VmRSS")
        modules = {g: artifact.as_module(variant.name, options.threads, g) for g in variant.files}
        for graph, module in modules.items():
            inputs = example_inputs(artifact, graph)
            for _ in range(RUNS):
                module(*inputs)
        print(json.dumps({"peak": resident("VmHWM"), "before": before}))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
