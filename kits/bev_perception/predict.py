"""`fitkit predict bev_perception`: a person's own nuScenes-format folders in, boxes, pictures and films out."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from core.files import replaced, write_text
from core.kit import InputError
from core.progress import progress
from kits.bev_perception.data.checker import check_folder
from kits.bev_perception.data.classes import CLASSES
from kits.bev_perception.data.conventions import Finding
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes, Scene
from kits.bev_perception.data.tables import TABLES, find_version
from kits.bev_perception.metrics.results import write_results
from kits.bev_perception.model.configs import Config
from kits.bev_perception.pictures.film import write_gif, write_mp4
from kits.bev_perception.pictures.frame import THRESHOLD, frame_picture, light, png
from kits.bev_perception.scenes import Seen, config_of, watch

OPENED = 120  # images and sweeps that the checker opens; those of the frames are all opened later
TOLD = 5  # findings and notes of a summary
LONGEST = 0.5  # s that a film shows a frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `predict` that are about scenes."""
    parser.add_argument("--scene", action="append", metavar="NAME", help="only this scene; may be given again")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N keyframes of each scene")
    parser.add_argument(
        "--threshold", type=float, help="draw and count predictions from this score (default: the frozen one)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures and films")
    parser.add_argument("--mp4", action="store_true", help="an MP4 of each scene as well")


def check(inputs: Sequence[str]) -> None:
    """Refuse what is no nuScenes-format folder, and a folder given twice."""
    given: dict[Path, str] = {}
    for name in inputs:
        root = Path(name)
        if not root.is_dir():
            raise InputError(f"{name}: no such folder; give a folder in nuScenes format (samples/, v1.0-*/)")
        version = find_version(root)
        for table in TABLES:
            if not (root / version / f"{table}.json").is_file():
                raise InputError(f"{root / version / table}.json: missing; add the table, an empty one is []")
        if root.resolve() in given:
            raise InputError(f"{name}: the same folder as {given[root.resolve()]}; give it once")
        given[root.resolve()] = name


def predict(
    module: nn.Module,
    config: Config | None,
    inputs: Sequence[str],
    out: Path,
    options: argparse.Namespace,
    meta: Mapping[str, Any] | None = None,
) -> str:
    """Detect in folders; leaves results_nusc.json, summary.json, findings.json, frames/ and films in `out`.

    `meta` may hold the "threshold" of the pictures. The folders are checked first; what makes one unusable stops the
    run, everything else is told. Frames that the detector could not see have empty lists in the results.
    """
    check(inputs)
    config = config_of(module, config)
    threshold = float((meta or {}).get("threshold", THRESHOLD)) if options.threshold is None else options.threshold
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold}: expected a score within 0 and 1")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: expected at least 1 keyframe a scene")
    out.mkdir(parents=True, exist_ok=True)
    findings = _checked(inputs, out)
    drives = _drives(inputs, options)
    results, reports = {}, []
    count = sum(len(drive.samples) for drive in drives)
    stages = 1 if options.no_pictures else 3  # detect, draw, film
    with progress("detecting", count * stages) as bar:
        for line in findings.lines:
            bar.log(line)
        try:
            for drive in drives:
                frames: list[dict[str, Any]] = []
                reports.append(drive.report(frames))
                for seen in watch(module, drive.samples, config):
                    token = seen.keyframe.token
                    if token in results:
                        raise InputError(f"sample {token!r} is in two of the folders; give them one at a time")
                    results[token] = seen.boxes
                    frames.append(_frame(seen, threshold))
                    bar.advance(drive.name)
                    if not options.no_pictures:
                        frames[-1]["picture"] = _picture(seen, threshold, config, drive, out)
                        bar.advance(drive.name)
                if not options.no_pictures and frames:
                    reports[-1].update(_films(drive, frames, out, options.mp4))
                    bar.advance(drive.name, len(frames))
        finally:
            write_results(out / "results_nusc.json", results)
            summary = {"config": config.name, "threshold": threshold, **findings.counts, "scenes": reports}
            write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    frames = [frame for report in reports for frame in report["frames"]]
    if all(frame["left_out"] for frame in frames):
        raise InputError(f"{', '.join(inputs)}: not one frame could be used; first: {frames[0]['notes'][0]}")
    return _told(reports, findings, threshold, out)


@dataclass(frozen=True)
class _Findings:
    """What the checker found, by folder."""

    by_folder: Mapping[str, Sequence[Finding]]

    @property
    def counts(self) -> dict[str, int]:
        found = [f.severity for listed in self.by_folder.values() for f in listed]
        return {"errors": found.count("error"), "warnings": found.count("warning")}

    @property
    def lines(self) -> list[str]:
        """The first findings, errors before warnings, one of each kind before a second."""
        found = [f for listed in self.by_folder.values() for f in listed]
        seen: dict[tuple[str, str, str], int] = {}
        ranked = []
        for f in found:
            kind = (f.severity, f.table, f.mend)
            seen[kind] = seen.get(kind, 0) + 1
            ranked.append((f.severity != "error", seen[kind], f))
        ranked.sort(key=lambda row: row[:2])
        more = [f"  and {len(found) - TOLD} more in findings.json"] if len(found) > TOLD else []
        return [f"  {f}" for _, _, f in ranked[:TOLD]] + more


@dataclass(frozen=True)
class _Drive:
    """A scene to be shown: the name of its folder of pictures is safe and its own."""

    root: str
    scene: Scene
    name: str
    samples: Sequence[Keyframe]

    def report(self, frames: list[dict[str, Any]]) -> dict[str, Any]:
        tone = light(self.samples[0]) if self.samples else ""
        return {"scene": self.scene.name, "folder": self.root, "light": tone, "frames": frames}


def _checked(inputs: Sequence[str], out: Path) -> _Findings:
    found = {}
    for name in inputs:
        found[name] = check_folder(name, files=OPENED)
        listed = [{"folder": folder, **asdict(f)} for folder, rows in found.items() for f in rows]
        write_text(out / "findings.json", json.dumps(listed, indent=1) + "\n")
    return _Findings(found)


def _drives(inputs: Sequence[str], options: argparse.Namespace) -> list[_Drive]:
    """The scenes that are asked for, in the order of the folders; InputError where there is none."""
    drives: list[_Drive] = []
    taken: set[str] = set()
    known: list[str] = []
    for root in inputs:
        data = NuScenes(root)
        known += list(data.scenes)
        for scene in data.scenes.values():
            if options.scene and scene.name not in options.scene:
                continue
            drives.append(_Drive(root, scene, _name(scene.name, taken), keyframes(data, [scene])[: options.limit]))
    if unknown := [name for name in options.scene or () if name not in known]:
        raise InputError(f"--scene {unknown[0]!r}: not in the folders; there are {', '.join(known[:12])}")
    if not any(drive.samples for drive in drives):
        raise InputError(f"{', '.join(inputs)}: no scene with a keyframe; give a folder that has one")
    return drives


def _name(scene: str, taken: set[str]) -> str:
    """A name of a folder for a scene, whatever its own name holds."""
    base = re.sub(r"[^A-Za-z0-9_.-]+", "_", scene).strip(".")[:80] or "scene"
    name, number = base, 1
    while name.lower() in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name.lower())
    return name


def _frame(seen: Seen, threshold: float) -> dict[str, Any]:
    shown = seen.boxes.labels[seen.boxes.scores >= threshold]
    counts = {name: int((shown == label).sum()) for label, name in enumerate(CLASSES)}
    return {
        "sample": seen.keyframe.token, "index": seen.keyframe.index, "seconds": round(seen.seconds, 4),
        "left_out": seen.left_out, "missing": dict(seen.missing), "notes": list(seen.notes),
        "boxes": len(seen.boxes), "shown": {name: n for name, n in counts.items() if n},
    }  # fmt: skip


def _picture(seen: Seen, threshold: float, config: Config, drive: _Drive, out: Path) -> str:
    name = f"frames/{drive.name}/{seen.keyframe.index:03d}.png"
    with replaced(out / name) as fresh:
        fresh.write_bytes(png(frame_picture(seen, threshold, config)))
    return name


def _films(drive: _Drive, frames: Sequence[Mapping[str, Any]], out: Path, mp4: bool) -> dict[str, Any]:
    """The films of a scene by kind, relative to `out`, at the pace of the drive; "mp4" is None where it failed."""
    pictures = [out / frame["picture"] for frame in frames]
    seconds = _pace(drive.samples)
    made: dict[str, Any] = {"gif": f"{drive.name}.gif"}
    write_gif(out / made["gif"], pictures, seconds)
    if mp4:
        made["mp4"] = f"{drive.name}.mp4" if write_mp4(out / f"{drive.name}.mp4", pictures, seconds) else None
    return made


def _pace(samples: Sequence[Keyframe]) -> float:
    """Seconds between keyframes, within what can be watched."""
    stamps = [samples[0].data.tables["sample"][k.token].get("timestamp") for k in samples]
    gaps = np.diff([s for s in stamps if isinstance(s, int | float)]) * 1e-6
    return float(np.clip(np.median(gaps), 0.1, LONGEST)) if len(gaps) else LONGEST


def _told(reports: Sequence[Mapping[str, Any]], findings: _Findings, threshold: float, out: Path) -> str:
    frames = [frame for report in reports for frame in report["frames"]]
    median = float(np.median([f["seconds"] for f in frames if not f["left_out"]]))
    lines = [f"{len(frames)} keyframe(s) of {len(reports)} scene(s), {median * 1e3:.0f} ms each from files to boxes"]
    for report in reports[:20]:
        total: dict[str, int] = {}
        for frame in report["frames"]:
            for name, n in frame["shown"].items():
                total[name] = total.get(name, 0) + n
        most = sorted(total.items(), key=lambda item: -item[1])[:4]
        what = ", ".join(f"{n} {name}" for name, n in most) or "nothing"
        count = len(report["frames"])
        told = f"{count} frames, {what} from {threshold:.3g} on" if count else "no keyframe in it"
        lines.append(f"  {report['scene']}{report['light'] and ', ' + report['light']}: {told}")
        if report.get("mp4", "") is None:
            lines.append("    no MP4: OpenCV on this machine writes none; the GIF is there")
    noted = [(report["scene"], f) for report in reports for f in report["frames"] if f["notes"]]
    for scene, frame in noted[:TOLD]:
        lines.append(f"  {scene} frame {frame['index']}: {frame['notes'][0]}")
    if len(noted) > TOLD:
        lines.append(f"  and notes on {len(noted) - TOLD} more frames in summary.json")
    counts = findings.counts
    if counts["errors"] or counts["warnings"]:
        lines.append(f"checker: {counts['errors']} error(s), {counts['warnings']} warning(s) in findings.json")
    return "\n".join([*lines, f"results in {out}"])
