"""Figures with the basis they stand on, and the gates that judge them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

Stage = Literal["original", "compressed"]
Verdict = Literal["PASS", "FAIL", "UNPROVEN"]


def today() -> str:
    """Today's date in UTC, ISO 8601."""
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True)
class Measured:
    """A number read from a run: where it ran, how often, and how much it varied.

    `device` is the name of the machine that ran ("this-host: AMD EPYC, 2 cores"), `runtime` the
    software ("OpenVINO 2026.4.1 INT8"), `runs` the number of repetitions or samples, `spread` the
    half-width of the interval around the value in the figure's unit (None where not known),
    `artifact` the sha256 of what ran (empty for a plain torch module).
    """

    kind: ClassVar[str] = "measured"
    device: str
    runtime: str
    runs: int
    spread: float | None = None
    artifact: str = ""
    date: str = field(default_factory=today)
    note: str = ""


@dataclass(frozen=True)
class Estimated:
    """A number worked out from a model of the device; `error_band` is relative (0.5 = +-50 %)."""

    kind: ClassVar[str] = "estimated"
    method: str
    assumptions: tuple[str, ...] = ()
    error_band: float | None = None


@dataclass(frozen=True)
class Quoted:
    """A number that somebody else published."""

    kind: ClassVar[str] = "quoted"
    source: str


Basis = Measured | Estimated | Quoted
_BASES: dict[str, type[Basis]] = {c.kind: c for c in (Measured, Estimated, Quoted)}


@dataclass(frozen=True)
class Figure:
    """One number: its name, value, unit and basis; `stage` tells before from after compression."""

    name: str
    value: float
    unit: str
    basis: Basis
    stage: Stage = "compressed"

    @property
    def key(self) -> tuple[str, str, str]:
        """The identity (name, stage, kind of basis): an estimate never replaces a measurement."""
        return self.name, self.stage, self.basis.kind

    def __str__(self) -> str:
        sign = "~" if self.basis.kind == "estimated" else ""
        # five digits, so that a value beside its bound shows on which side it lies; counts in full
        text = (
            f"{self.value:,.0f}"
            if self.value == round(self.value, 0) and abs(self.value) >= 1000
            else f"{self.value:.5g}"
        )
        return f"{sign}{text} {self.unit}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """The figure as in `report.json`."""
        basis = {"kind": self.basis.kind, **asdict(self.basis)}
        return {"name": self.name, "stage": self.stage, "value": self.value, "unit": self.unit, "basis": basis}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Figure:
        """Read back `to_json`; raises ValueError for an unknown kind of basis."""
        basis = dict(data["basis"])
        kind = basis.pop("kind", None)
        if kind not in _BASES:
            raise ValueError(f"figure {data.get('name')!r}: basis kind {kind!r}, expected one of {sorted(_BASES)}")
        if "assumptions" in basis:
            basis["assumptions"] = tuple(basis["assumptions"])
        return Figure(data["name"], data["value"], data["unit"], _BASES[kind](**basis), data["stage"])


class Figures:
    """A set of figures keyed by name, stage and kind of basis; `|` merges, the right side wins a tie."""

    def __init__(self, figures: Iterable[Figure] = ()) -> None:
        self._by_key = {f.key: f for f in figures}

    def __or__(self, other: Figures) -> Figures:
        return Figures([*self, *other])

    def __iter__(self) -> Iterator[Figure]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, name: str, stage: Stage = "compressed", kind: str | None = None) -> Figure | None:
        """The figure of that name: of the given kind, or else measured before estimated before quoted."""
        for k in (kind,) if kind else ("measured", "estimated", "quoted"):
            if (found := self._by_key.get((name, stage, k))) is not None:
                return found
        return None

    def restage(self, stage: Stage) -> Figures:
        """The same figures under another stage."""
        return Figures(Figure(f.name, f.value, f.unit, f.basis, stage) for f in self)


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """A bound on a figure, such as `Gate("recall", "recall_any", ">= 99.6", "%")`.

    `device` names the device whose measurement the gate needs (a key of `core.hardware` targets);
    empty means that any measured value of the artifact will do, as for sizes and accuracies.
    """

    name: str
    figure: str
    bound: str
    unit: str = ""
    device: str = ""
    stage: Stage = "compressed"

    def __post_init__(self) -> None:
        self.parsed  # noqa: B018  refuse a bad bound where it is written

    @property
    def parsed(self) -> tuple[str, float]:
        """(operator, number); raises ValueError when the bound is not of that form."""
        match = re.fullmatch(r"\s*(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*", self.bound)
        if match is None:
            raise ValueError(f"gate {self.name!r}: bound {self.bound!r}, expected for instance '>= 99.6'")
        return match[1], float(match[2])

    def judge(self, figures: Figures) -> Judgement:
        """PASS or FAIL by a measurement of the right device, otherwise UNPROVEN."""
        op, bound = self.parsed
        measured = figures.find(self.figure, self.stage, "measured")
        if measured is not None:
            basis = measured.basis
            assert isinstance(basis, Measured)
            if not self.device or basis.device == self.device or basis.device.startswith(self.device + ":"):
                if math.isnan(measured.value):
                    return Judgement(self, "UNPROVEN", f"measured as NaN on {basis.device}: nothing to count")
                ok = _OPERATORS[op](measured.value, bound)
                where = f"measured {measured} on {basis.device} with {basis.runtime}"
                return Judgement(self, "PASS" if ok else "FAIL", where)
            other = f"measured {measured}, but on {basis.device}, not on {self.device}"
            return Judgement(self, "UNPROVEN", other)
        for kind in ("estimated", "quoted"):
            if (found := figures.find(self.figure, self.stage, kind)) is not None:
                need = f" on {self.device}" if self.device else ""
                band = getattr(found.basis, "error_band", None)
                band_text = f" +-{band:.0%}" if band else ""
                return Judgement(self, "UNPROVEN", f"{kind} {found}{band_text}; needs a measurement{need}")
        return Judgement(self, "UNPROVEN", f"no figure {self.figure!r} was produced")


@dataclass(frozen=True)
class Judgement:
    """The verdict on one gate and the reason for it."""

    gate: Gate
    verdict: Verdict
    why: str

    def to_json(self) -> dict[str, Any]:
        """The gate as in `report.json`."""
        g = self.gate
        return {"name": g.name, "figure": g.figure, "bound": g.bound, "unit": g.unit, "device": g.device,
                "verdict": self.verdict, "why": self.why}  # fmt: skip
