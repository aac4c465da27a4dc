"""Write the result tables of the READMEs from the stored reports: `python benchmarks/readme.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.report import read_json
from core.report.tables import markdown_gates, markdown_results, markdown_tables, replace_block

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {
    "README.md": {
        "pcb_inspection": (markdown_gates, markdown_tables),
        "mobile_diffusion": (markdown_gates,),
        "bev_perception": (markdown_gates,),
    },
    "kits/pcb_inspection/README.md": {"pcb_inspection": (markdown_tables, markdown_results)},
    "kits/mobile_diffusion/README.md": {"mobile_diffusion": (markdown_tables, markdown_results)},
    "kits/bev_perception/README.md": {"bev_perception": (markdown_tables, markdown_results)},
}
"""README -> kit whose stored report fills the block of that name -> what of it is shown."""


RECIPES = {
    "alignment": "alignment [%]",
    "accuracy_loss": "lost [points]",
    "speedup": "speed [x]",
    "size_ratio": "bytes of FP32",
}
"""Figures of a recipe on its own, by the title of their column."""


def markdown_recipes(reports: list[dict[str, Any]]) -> str:
    """A row for each recipe's stored report; the figures are measured, each against the original in its own run."""
    lines = ["| recipe | " + " | ".join(RECIPES.values()) + " |", "|:--" + "|--:" * len(RECIPES) + "|"]
    for report in reports:
        found = {f["name"]: f["value"] for f in report["figures"] if f["stage"] == "compressed"}
        values = [f"{found[name]:.3g}" if name in found else "" for name in RECIPES]
        lines.append(f"| `{report['recipe']['name']}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def markdown_tiny(found: dict[str, Any]) -> str:
    """The two precisions of BEVFormer-tiny in full size, timed in turns."""
    times = {t["name"]: t for t in found["timings"]}
    values = {f["name"]: f["value"] for f in found["figures"]}
    lines = ["| network | p50 [ms] | p99 [ms] | layers with weights ran as |", "|:--|--:|--:|:--|"]
    for name, audit in found["audit"].items():
        ran = ", ".join(f"{count} {precision}" for precision, count in audit.items())
        lines.append(f"| {name} | {times[name]['p50']:.0f} | {times[name]['p99']:.0f} | {ran} |")
    low, high = found["interval"]
    share = values["tiny_latency_share"]
    lines += [
        "",
        f"mixed takes {share:.3f} ({low:.3f} to {high:.3f}) of FP32's time: {found['device']}, {found['threads']} "
        f"threads, in turns, {found['rounds']} rounds. {values['tiny_parameters']:,.0f} random parameters, so of the "
        f"architecture only. {values['tiny_tops']:.2f} TOPS at 10 Hz.",
    ]
    return "\n".join(lines)


def markdown_lidar(found: dict[str, Any]) -> str:
    """What a LiDAR teacher gave, by day and by night, with intervals over the seeds."""
    runs = found["runs"]
    head = ("figure", "LiDAR teacher", "before", "trained on alone", "with the teacher", "gain [points]", "relative")
    lines = ["| " + " | ".join(head) + " |", "|:--" + "|--:" * (len(head) - 1) + "|"]
    for key, before in found["before"].items():
        means = [sum(run[way][key] for run in runs) / len(runs) for way in ("alone", "taught")]
        (gain, low, high), relative = found[f"gain_{key}"]["points"], found[f"gain_{key}"]["relative"]
        metric, group = key.split("_")
        cells = [f"{v:.2f}" for v in (found["teacher"][key], before, *means)]
        told = "" if relative is None else f"{100 * relative[0]:+.1f} %"
        name = {"nds": "NDS", "map": "mAP"}[metric] + ("" if group == "all" else f", {group}")
        lines.append(f"| {name} | {' | '.join(cells)} | {gain:+.2f} ({low:+.2f} to {high:+.2f}) | {told} |")
    told = (
        f"{len(runs)} seeds, {found['epochs']:g} epoch(s) of {100 * found['share']:.0f} % of the training scenes each; "
        f"{found['frames']} frames of the split {found['split']}, in {found['runtime']}; intervals of the gain are "
        "Student's of 95 % over the seeds."
    )
    return "\n".join([*lines, "", told])


def markdown_cues(found: dict[str, Any]) -> str:
    """Which cue tells the frames with a sudden obstacle, and how many obstacles are looked at again."""
    lines = ["| cue | area under the curve |", "|:--|--:|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in found["area"].items()]
    alarm, clock = (found["looked"][name] for name in ("alarm", "clock"))
    lines += [
        "",
        f"{found['events']} sudden obstacles in {found['frames']} frames of their scenes, split {found['split']}, in "
        f"{found['runtime']}. Looked at again in time: {alarm['events']:.0f} by the alarm ({100 * alarm['share']:.1f} "
        f"% of the frames), {clock['events']:.0f} by the clock ({100 * clock['share']:.1f} %).",
    ]
    return "\n".join(lines)


def markdown_second_look(found: dict[str, Any]) -> str:
    """What the dynamic path finds of sudden obstacles, beside the clock and each detector alone."""
    lines = [
        "| detector | found | frames looked at again [%] | NDS | NDS within 2 s of an event |",
        "|:--" + "|--:" * 4 + "|",
    ]
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['found']:.0f} of {found['events']} | {row['share']:.1f} | {row['nds']:.2f} | "
            f"{row['nds_event']:.2f} |"
        )
    lines += ["", f"{found['frames']} frames, {found['runtime']}, {found['device']}."]
    return "\n".join(lines)


def markdown_scan(found: dict[str, Any]) -> str:
    """What a large scan takes, always dense and gated; the seconds of every round."""
    lines = ["| scan | way | seconds | detections | peak [MB] |", "|:--|:--|--:|--:|--:|"]
    for scan in found["scans"]:
        for way, row in scan["ways"].items():
            seconds = ", ".join(f"{value:.2f}" for value in row["seconds"])
            lines.append(f"| {scan['scan']} | {way} | {seconds} | {row['detections']:,} | {max(row['peak_mb'])} |")
    lines += ["", f"{found['what']}; {found['device']}, {found['software']}; decoding is not counted."]
    return "\n".join(lines)


def markdown_yolo(found: dict[str, Any]) -> str:
    """What `examples/prune_yolo.py` left of a YOLO, beside that YOLO before and trained on whole, in OpenVINO."""
    head = ("YOLO", "parameters", "GMAC", "MB", "mAP50 [%]", "mAP50-95 [%]", "p50 [ms]", "energy [mJ], estimated")
    lines = ["| " + " | ".join(head) + " |", "|:--" + "|--:" * (len(head) - 1) + "|"]
    times = {t["name"]: t["p50"] for t in found["timing"]["timings"]}
    named = {"before": "before", "control": "before, trained on for as many epochs", "after": "pruned and trained on"}
    for name, title in named.items():
        if name not in found:
            continue
        row = found[name]
        cells = [f"{row['parameters']:,}", f"{row['macs'] / 1e9:.2f}", f"{row['megabytes']:.2f}", f"{row['map50']:.2f}",
                 f"{row['map5095']:.2f}", f"{times[name]:.2f}", f"~{row['energy_mj_estimated']:.0f}"]  # fmt: skip
        lines.append(f"| {title} | {' | '.join(cells)} |")
    low, high = found["speedup_interval"]
    lines += [
        "",
        f"{found['macs_gone']:.1f} % of the multiply-accumulates gone, {found['energy_gone_estimated']:.1f} % of the "
        f"energy (estimated), {found['speedup']:.2f} ({low:.2f} to {high:.2f}) times as fast; split "
        f"{found['split']}, {found['device']}, {found['software']}, in turns.",
    ]
    return "\n".join(lines)


def rendered() -> dict[Path, str]:
    """Every README with its tables as the stored reports say."""
    texts: dict[Path, str] = {}
    for readme, blocks in BLOCKS.items():
        path = ROOT / readme
        text = path.read_text(encoding="utf-8")
        for kit, parts in blocks.items():
            report = read_json(ROOT / "benchmarks" / "reports" / kit / "report.json")
            text = replace_block(text, kit, "\n\n".join(part(report) for part in parts))
        reports = ROOT / "benchmarks" / "reports" / path.parent.name
        for name in ("tools", "experts", "table", "names"):
            if (told := reports / f"{name}.md").is_file():
                text = replace_block(text, f"{path.parent.name}-{name}", told.read_text(encoding="utf-8"))
        if kept := sorted(reports.glob("recipe-*.json")):
            text = replace_block(text, f"{path.parent.name}-recipes", markdown_recipes([read_json(p) for p in kept]))
        if (tiny := reports / "tiny.json").is_file():
            text = replace_block(text, f"{path.parent.name}-tiny", markdown_tiny(read_json(tiny)))
        if (pruned := reports / "yolo-pruned.json").is_file():
            text = replace_block(text, f"{path.parent.name}-yolo", markdown_yolo(read_json(pruned)))
        if (scan := reports / "scan.json").is_file():
            text = replace_block(text, f"{path.parent.name}-scan", markdown_scan(read_json(scan)))
        if (judged := reports / "by-hand.json").is_file():
            text = replace_block(text, f"{path.parent.name}-by-hand", markdown_gates(read_json(judged)))
        if (lidar := reports / "lidar.json").is_file():
            text = replace_block(text, f"{path.parent.name}-lidar", markdown_lidar(read_json(lidar)))
        if (second := reports / "second_look.json").is_file():
            text = replace_block(text, f"{path.parent.name}-second-look", markdown_second_look(read_json(second)))
        if (cues := reports / "cues.json").is_file():
            text = replace_block(text, f"{path.parent.name}-cues", markdown_cues(read_json(cues)))
        texts[path] = text
    return texts


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
