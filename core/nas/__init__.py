"""Architecture search: a description of what can be chosen, and searchers whose studies survive a crash."""

from core.nas.samplers import DIFFERENTIAL, EVOLUTION, PARETO, RANDOM, SEARCHERS
from core.nas.search import Found, Goal, Trial, as_json, candidate_of, pareto, search, weighted, with_control
from core.nas.space import Bound, Candidate, Choice, OneOf, Rule, Space, Span, Steps, joined, part_of

__all__ = [
    "DIFFERENTIAL", "EVOLUTION", "PARETO", "RANDOM", "SEARCHERS",
    "Bound", "Candidate", "Choice", "Found", "Goal", "OneOf", "Rule", "Space", "Span", "Steps", "Trial",
    "as_json", "candidate_of", "joined", "pareto", "part_of", "search", "weighted", "with_control",
]  # fmt: skip
