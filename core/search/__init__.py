"""What a search is led by and held to: costs of candidates, and the time that they take on this machine."""

from core.search.cost import Cost, Costs, cost, estimated_latency
from core.search.latency import Checked, LatencyTable, Operator, fitted_table, operators, table
from core.search.prices import UNITS, Prices, estimated
from core.search.task import Searched, Task

__all__ = [
    "UNITS", "Checked", "Cost", "Costs", "LatencyTable", "Operator", "Prices", "Searched", "Task", "cost", "estimated",
    "estimated_latency", "fitted_table", "operators", "table",
]  # fmt: skip
