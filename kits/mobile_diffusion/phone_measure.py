"""Time the exported parts on a phone, and write what the report takes up as measured there.

On a computer with `adb` and a phone attached:

    python -m kits.mobile_diffusion.phone_measure FOLDER --runner executor_runner --out phone.json --report RUN

or in a terminal on the phone itself (Termux), with `--local`. FOLDER is what `kits.mobile_diffusion.phone` wrote;
the runner is ExecuTorch's `executor_runner` or MNN's `ModuleBasic.out`, built for the phone (see PHONE.md). Measuring
needs nothing but Python's own library, since a phone has no torch; `--report` needs fitkit, and
`--measured phone.json` fills in what was measured before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
KIND = "fitkit phone folder"
RUNNERS = {"executorch": "executor_runner", "mnn": "ModuleBasic.out"}
SUFFIXES = {"executorch": ".pte", "mnn": ".mnn"}
REMOTE = "/data/local/tmp/fitkit"
# the targets of core/hardware/targets.json by the SoC that a phone reports; a gate wants one of these
TARGETS = {"SM8550": "snapdragon-8-gen-2", "MT6985": "dimensity-9200"}
BATTERY = "/sys/class/power_supply/battery"
# of a phone as a whole; a gauge that gives other values does not count in microamperes
PLAUSIBLE_WATTS = (0.2, 25.0)
LEAST_SQNR = 15.0
"""In dB, of a phone's output against that of the same file on the computer; both may compute in other precision."""
TIMEOUT = 1800.0
"""Seconds after which a command on the phone is given up."""


class MeasureError(ValueError):
    """Something that a person can mend; the message is one line that says how."""


class Phone:
    """Runs commands on the phone through `adb`, or here where `local` says that this is the phone."""

    def __init__(self, serial: str | None = None, local: bool = False) -> None:
        self.local = local
        self._adb = ["adb", *(["-s", serial] if serial else [])]
        self.folder = tempfile.mkdtemp(prefix="fitkit-") if local else REMOTE

    def command(self, line: str) -> list[str]:
        """The arguments that run a line of shell on the phone."""
        return ["sh", "-c", line] if self.local else [*self._adb, "shell", line]

    def check(self) -> None:
        """Raise MeasureError unless adb sees this phone, or one phone alone, ready to take commands."""
        if self.local:
            return
        listed = self._finished(["adb", "devices"], "adb devices").splitlines()
        found = dict(row.split("\t")[:2] for row in listed if "\t" in row)
        wanted = self._adb[2] if len(self._adb) > 2 else None
        if not found:
            raise MeasureError("adb sees no phone; plug it in, and allow USB debugging on it")
        if wanted is None and len(found) > 1:
            raise MeasureError(f"adb sees several phones: {', '.join(found)}; name one with --serial")
        serial = wanted or next(iter(found))
        if serial not in found:
            raise MeasureError(f"--serial {serial}: adb sees {', '.join(found)}")
        if found[serial] != "device":
            raise MeasureError(f"phone {serial} is {found[serial]}; unlock it, allow USB debugging, or plug it in anew")

    def run(self, line: str) -> str:
        """What a line of shell prints, error stream included; raises MeasureError where it fails."""
        return self._finished(self.command(line), line)

    def push(self, source: Path, name: str) -> None:
        """Copy a file to `name` in the phone's folder."""
        target = f"{self.folder}/{name}"
        if self.local:
            self._finished(["cp", str(source), target], f"copying {source}")
        else:
            self._finished([*self._adb, "push", str(source), target], f"pushing {source}")

    def pull(self, name: str) -> bytes:
        """The bytes of a file in the phone's folder."""
        if self.local:
            try:
                return Path(self.folder, name).read_bytes()
            except OSError as error:
                raise MeasureError(f"{name}: the runner left no such file ({error.strerror})") from error
        with tempfile.TemporaryDirectory() as here:
            file = Path(here, "pulled")
            self._finished([*self._adb, "pull", f"{self.folder}/{name}", str(file)], f"pulling {name}")
            return file.read_bytes()

    def _finished(self, command: Sequence[str], what: str) -> str:
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
            )
        except FileNotFoundError as error:
            raise MeasureError(
                f"{command[0]}: no such program; install Android's platform tools, or use --local"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise MeasureError(f"{what}: no answer in {TIMEOUT:g} s; see whether the phone is still there") from error
        said = ran.stdout + ran.stderr
        if ran.returncode != 0:
            raise MeasureError(f"{what}: failed with {ran.returncode}: {_last(said)}")
        return said


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of phone files, every file checked; raises MeasureError naming what is wrong."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise MeasureError(f"{folder}: manifest.json is missing; write the folder with kits.mobile_diffusion.phone")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MeasureError(f"{path}: not JSON ({error}); export again") from error
    if not isinstance(manifest, dict) or (manifest.get("kind"), manifest.get("format")) != (KIND, FORMAT):
        raise MeasureError(f"{path}: not the manifest of a phone folder of format {FORMAT}; export again")
    for name, record in manifest["files"].items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise MeasureError(f"{path}: path {name!r} leads out of the folder; export again")
        file = folder / pure
        if not file.is_file():
            raise MeasureError(f"{file}: missing, though {path} lists it; export again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != record["sha256"]:
            raise MeasureError(f"{file}: its bytes differ from the sha256 in {path}; export again")
    return manifest


def chosen_files(manifest: Mapping[str, Any], runtime: str, weights: str) -> dict[str, dict[str, Any]]:
    """{part: {"path", "weights", "sha256", "bytes"}} of one runtime and set of weights."""
    found = {}
    for part in manifest["parts"]:
        kind = manifest["sets"].get(weights, {}).get(part, weights)
        name = f"{runtime}/{part}-{kind}{SUFFIXES[runtime]}"
        if name not in manifest["files"]:
            raise MeasureError(f"the folder has no {name}; export with --formats {runtime} --weights {weights}")
        found[part] = {"path": name, "weights": kind, **manifest["files"][name]}
    return found


def artifact_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash for the files that ran, as in a measured figure's basis."""
    return hashlib.sha256(json.dumps({p: f["sha256"] for p, f in files.items()}, sort_keys=True).encode()).hexdigest()


def runner_line(runtime: str, part: str, inputs: Sequence[str], runs: int, threads: int) -> str:
    """The line of shell that runs one part `runs` times, in the phone's folder, on its example inputs."""
    if runtime == "executorch":
        files = ",".join(f"{part}/{name}.bin" for name in inputs)
        return (
            f"./{RUNNERS[runtime]} --model_path={part}.pte --inputs={files} --output_file={part}/out "
            f"--print_output=none --num_executions={runs} --cpu_threads={threads} 2>&1"
        )
    # run mask 0, forward type 0 (CPU), runs, threads, precision 0 (FP16 arithmetic where the phone has it)
    return f"./{RUNNERS[runtime]} {part}.mnn {part} 0 0 {runs} {threads} 0 2>&1"


def mean_time(runtime: str, said: str, runs: int) -> float:
    """The mean of `runs` executions in ms, as the runner tells it."""
    mean = 0.0
    if runtime == "executorch":
        if total := re.search(r"executed successfully (\d+) time\(s\) in (\d+(?:\.\d+)?) ms", said):
            if int(total[1]) != runs:
                raise MeasureError(f"{RUNNERS[runtime]} ran {total[1]} times, {runs} were asked for")
            mean = float(total[2]) / runs
    elif found := re.search(r"Avg= (\d+(?:\.\d+)?) ms", said):
        mean = float(found[1])
    if mean <= 0:
        raise MeasureError(f"{RUNNERS[runtime]} told no times; its last words: {_last(said)}")
    return mean


def _last(said: str) -> str:
    return (said.strip().splitlines() or ["nothing"])[-1].strip()


def deviation(expected: bytes, found: Sequence[float]) -> dict[str, float]:
    """Largest difference relative to the peak, and SQNR in dB, of the phone's output from the computer's."""
    wanted = array("f")
    wanted.frombytes(expected)
    if len(wanted) != len(found) or not all(math.isfinite(v) for v in found):
        raise MeasureError(f"the phone gave {len(found)} values, not all finite or not {len(wanted)}; see the runner")
    peak = max(abs(v) for v in wanted)
    noise = math.fsum((a - b) ** 2 for a, b in zip(wanted, found))
    signal = math.fsum(a * a for a in wanted)
    ratio = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else 200.0
    return {"relative": max(abs(a - b) for a, b in zip(wanted, found)) / (peak or 1.0), "sqnr": ratio}


class Gauge:
    """The battery's own gauge: what the whole phone draws, in watts. `why_not` says why there is no value."""

    def __init__(self, phone: Phone) -> None:
        self._phone = phone
        self.why_not = ""

    def read(self) -> float | None:
        """Watts now, or None with the reason in `why_not`."""
        try:
            said = self._phone.run(f"cat {BATTERY}/status {BATTERY}/current_now {BATTERY}/voltage_now").split()
            status, current, voltage = said[0], float(said[-2]), float(said[-1])
        except (MeasureError, ValueError, IndexError):
            self.why_not = f"{BATTERY} cannot be read on this phone"
            return None
        if status != "Discharging":
            self.why_not = (
                f"the battery is {status.lower()}, not discharging: connect through adb over Wi-Fi, unplugged"
            )
            return None
        watts = abs(current) * 1e-6 * voltage * 1e-6
        if not PLAUSIBLE_WATTS[0] <= watts <= PLAUSIBLE_WATTS[1]:
            self.why_not = f"the gauge gives {watts:.3g} W, so it does not count in microamperes"
            return None
        return watts


def run_watched(phone: Phone, line: str, gauge: Gauge, every: float) -> tuple[str, list[float]]:
    """What a line of shell prints, and the watts that the gauge gave every so many seconds meanwhile."""
    watts: list[float] = []
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(phone.command(line), stdout=said, stderr=subprocess.STDOUT)
        until = time.monotonic() + TIMEOUT
        try:
            while running.poll() is None:
                if time.monotonic() > until:
                    raise MeasureError(f"{line}: not done in {TIMEOUT:g} s; take fewer --runs")
                now = gauge.read()
                if now is not None and running.poll() is None:
                    watts.append(now)
                time.sleep(every)
        finally:
            if running.poll() is None:
                running.kill()
            running.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    if running.returncode != 0:
        raise MeasureError(f"{line}: failed with {running.returncode}: {_last(text)}")
    return text, watts


def measure(
    phone: Phone,
    folder: Path,
    runtime: str,
    runner: Path,
    *,
    weights: str = "int4",
    runs: int = 10,
    repeats: int = 3,
    threads: int = 4,
    every: float = 0.5,
) -> dict[str, Any]:
    """Push the files, run every part `repeats` times `runs` executions, and return the record that is written.

    Figures: "picture_seconds", the parts' mean times by their calls a picture, and "picture_power" during the UNet's
    runs where the gauge gives it. A part whose output is not that of the same file on the computer
    (SQNR below 15 dB) raises MeasureError.
    """
    if runs < 1 or repeats < 2:
        raise MeasureError(f"runs {runs}, repeats {repeats}: expected at least 1 and 2")
    if not runner.is_file():
        raise MeasureError(f"{runner}: no such file; build {RUNNERS[runtime]} for the phone (see PHONE.md)")
    manifest = read_manifest(folder)
    files = chosen_files(manifest, runtime, weights)
    phone.check()
    about = describe(phone)
    gauge = Gauge(phone)
    place = shlex.quote(phone.folder)
    phone.run(f"rm -rf {place} && mkdir -p {place}/output")  # no output of an older run is to be taken for this one's
    phone.push(runner, RUNNERS[runtime])
    phone.run(f"chmod 755 {place}/{RUNNERS[runtime]}")
    idle = gauge.read()
    found: dict[str, Any] = {}
    for part, file in files.items():
        inputs = [i["name"] for i in manifest["parts"][part]["inputs"]]
        phone.run(f"mkdir -p {place}/{part}")
        phone.push(folder / file["path"], f"{part}{SUFFIXES[runtime]}")
        suffix = "bin" if runtime == "executorch" else "txt"
        for name in [f"{n}.{suffix}" for n in inputs] + (["input.json"] if runtime == "mnn" else []):
            phone.push(folder / "examples" / part / name, f"{part}/{name}")
        line = f"cd {place} && {runner_line(runtime, part, inputs, runs, threads)}"
        phone.run(line)  # warms up, and leaves the output
        means, watts = [], []
        for _ in range(repeats):
            said, seen = run_watched(phone, line, gauge, every)
            means.append(mean_time(runtime, said, runs))
            watts += seen
        here = folder / "examples" / part / f"{runtime}-{file['weights']}.bin"
        error = deviation(here.read_bytes(), _output(phone, runtime, part))
        if error["sqnr"] < LEAST_SQNR:
            raise MeasureError(
                f"{part}: the phone's output is {error['sqnr']:.1f} dB from that of the same file on the computer, "
                f"expected {LEAST_SQNR:g} or more; wrong file or runner"
            )
        spread = _half_width(means)
        found[part] = {"ms": statistics.fmean(means), "spread": spread, "means": means, "watts": watts, "error": error}
    return _record(manifest, found, files, runtime, weights, about, gauge, idle, runs * repeats, threads)


def _output(phone: Phone, runtime: str, part: str) -> Sequence[float]:
    name = f"{part}/out-0.bin" if runtime == "executorch" else "output/0.txt"
    found = phone.pull(name)
    try:
        if runtime == "mnn":
            return [float(v) for v in found.split()]
        values = array("f")
        values.frombytes(found)
        return values
    except ValueError as error:
        raise MeasureError(f"{part}: {name} of the phone is malformed ({error}); see the runner") from error


def _half_width(values: Sequence[float]) -> float:
    """The half-width of the 95 % interval of a mean, by Student's t with the degrees of freedom that there are."""
    t = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    return t.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def describe(phone: Phone) -> dict[str, str]:
    """Model, SoC and system of the phone, and the target that the SoC stands for ("" where none does)."""
    names = {"model": "ro.product.model", "soc": "ro.soc.model", "android": "ro.build.version.release"}
    found = {key: phone.run(f"getprop {name}").strip() for key, name in names.items()}
    found["target"] = TARGETS.get(found["soc"].upper().split("-")[0], "")
    return found


def _record(
    manifest: Mapping[str, Any],
    found: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    runtime: str,
    weights: str,
    about: Mapping[str, str],
    gauge: Gauge,
    idle: float | None,
    runs: int,
    threads: int,
) -> dict[str, Any]:
    place = f"{about['model']} ({about['soc']}), Android {about['android']}"
    device = f"{about['target']}: {place}" if about["target"] else place
    version = manifest["versions"].get(runtime, "")
    title = {"executorch": "ExecuTorch", "mnn": "MNN"}[runtime]
    software = f"{title} (exported with {version}) {weights}, {threads} threads"
    artifact = artifact_hash(files)
    calls = {part: manifest["parts"][part]["calls"] for part in found}
    seconds = sum(calls[p] * f["ms"] for p, f in found.items()) / 1e3
    spread = math.sqrt(sum((calls[p] * f["spread"]) ** 2 for p, f in found.items())) / 1e3
    sizes = ", ".join(f"{n} x {p}" for p, n in calls.items())
    note = f"sum of {sizes}, each timed on the phone; without tokenizing and the scheduler's arithmetic"
    figures = [_figure("picture_seconds", seconds, "s", device, software, runs, spread, artifact, note)]
    notes = []
    watts = found["unet"]["watts"]
    if len(watts) >= 3:
        rest = f"; {idle:.2f} W before" if idle is not None else ""
        note = f"the whole phone by its battery's gauge, mean of {len(watts)} readings during the UNet's runs{rest}"
        figures.append(
            _figure(
                "picture_power",
                statistics.fmean(watts),
                "W",
                device,
                software,
                len(watts),
                _half_width(watts),
                artifact,
                note,
            )  # fmt: skip
        )
    else:
        why = gauge.why_not or f"only {len(watts)} readings: raise --runs"
        notes.append(f"no power: {why}")
    if not about["target"]:
        notes.append(f"SoC {about['soc']!r} is none of {', '.join(TARGETS)}: gates on those stay UNPROVEN")
    return {
        "format": FORMAT, "device": dict(about), "runtime": runtime, "weights": weights, "artifact": artifact,
        "picture": manifest["picture"], "parts": dict(found), "figures": figures, "notes": notes,
    }  # fmt: skip


def _figure(
    name: str, value: float, unit: str, device: str, runtime: str, runs: int, spread: float, artifact: str, note: str
) -> dict[str, Any]:
    """A figure as `core.figures.Figure.to_json` has it."""
    today = datetime.now(UTC).date().isoformat()
    basis = {"kind": "measured", "device": device, "runtime": runtime, "runs": runs, "spread": spread,
             "artifact": artifact, "date": today, "note": note}  # fmt: skip
    return {"name": name, "stage": "compressed", "value": value, "unit": unit, "basis": basis}


def main(arguments: Sequence[str]) -> int:
    """Measure, write the record, and print its figures; 2 where something has to be mended first."""
    parser = argparse.ArgumentParser(prog="phone_measure.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=sorted(RUNNERS), default="executorch")
    parser.add_argument("--weights", default="int4", help="float, int8 or int4, as exported")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runner", type=Path, help="the runtime's runner, built for the phone")
    source.add_argument("--measured", type=Path, help="measure nothing, fill in what this file says: see --report")
    parser.add_argument("--serial", help="which phone, where adb sees several")
    parser.add_argument("--local", action="store_true", help="this is the phone")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("phone.json"))
    parser.add_argument("--report", type=Path, help="the --out folder of `fitkit run`, whose report takes the figures")
    o = parser.parse_args(arguments)
    if o.measured is not None:
        if o.report is None:
            parser.error("--measured goes with --report")
        return _fill_in(o.measured, o.folder, o.report)
    try:
        phone = Phone(o.serial, o.local)
        how: dict[str, Any] = {"weights": o.weights, "runs": o.runs, "repeats": o.repeats, "threads": o.threads}
        record = measure(phone, o.folder, o.runtime, o.runner, **how)
    except MeasureError as error:
        print(error, file=sys.stderr)
        return 2
    o.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for f in record["figures"]:
        print(f"{f['name']}: {f['value']:.3f} +- {f['basis']['spread']:.3f} {f['unit']} on {f['basis']['device']}")
    for note in record["notes"]:
        print(note)
    return 0 if o.report is None else _fill_in(o.out, o.folder, o.report)


def _fill_in(measured: Path, folder: Path, run: Path) -> int:
    """Put a measurement into the report of a run and print the verdicts that it changed; 2 where it does not fit."""
    try:
        from kits.mobile_diffusion.phone_report import fill_in
    except ModuleNotFoundError as error:
        print(f"--report: {error.name} is not installed here; use --measured where fitkit is", file=sys.stderr)
        return 2
    try:
        judgements = fill_in(measured, folder, run)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for j in judgements:
        print(f"{j.verdict:8} {j.gate.name}: {j.why}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
