"""Evaluation on this machine: interleaved timing, peak memory, and the measured figures of an artifact."""

from core.evaluation.bench import Bench as Bench
from core.evaluation.bench import Ratio as Ratio
from core.evaluation.bench import Timing as Timing
from core.evaluation.bench import bench as bench
from core.evaluation.bench import pinned as pinned
from core.evaluation.measure import example_inputs as example_inputs
from core.evaluation.measure import measure as measure
from core.evaluation.measure import peak_memory as peak_memory
