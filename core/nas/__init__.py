"""Architecture search: what can be chosen, searchers whose studies survive a crash, and supernets."""

from core.nas.elastic import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear, ElasticStage, extract
from core.nas.ranking import RankCorrelation, kendall
from core.nas.samplers import DIFFERENTIAL, EVOLUTION, PARETO, RANDOM, SEARCHERS
from core.nas.search import Found, Goal, SearchPlan, Trial, as_json, pareto, search, weighted, with_control
from core.nas.space import Bound, Candidate, Choice, OneOf, Rule, Space, Span, Steps, joined, part_of
from core.nas.supernet import Phase, Supernet, cut, from_scratch, largest, recalibrate, smallest, train_supernet

__all__ = [
    "DIFFERENTIAL", "EVOLUTION", "PARETO", "RANDOM", "SEARCHERS",
    "Bound", "Candidate", "Choice", "ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear", "ElasticStage", "Found",
    "Goal", "OneOf", "Phase", "RankCorrelation", "Rule", "SearchPlan", "Space", "Span", "Steps", "Supernet", "Trial",
    "as_json", "cut", "extract", "from_scratch", "joined", "kendall", "largest", "pareto", "part_of", "recalibrate",
    "search", "smallest", "train_supernet", "weighted", "with_control",
]  # fmt: skip
