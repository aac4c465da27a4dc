"""The command line: list, run, train, search, evaluate, bench, predict."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from core.kit import InputError

DONE, GATE_FAILED, WRONG_INPUT = 0, 1, 2
PRESETS = ("smoke", "full")


def parser(kit: Any = None) -> argparse.ArgumentParser:
    """The parser; with a kit, `predict` has that kit's own options as well."""
    top = _Parser(prog="fitkit", description="Large models on small devices: compress, export, measure, judge.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", help="kits, recipes, targets").add_argument("--json", action="store_true")
    run = _command(
        commands, "run", "compress with a recipe, export, score, measure, judge; leaves a report and an artifact"
    )
    run.add_argument("--recipe", help="name of a recipe (default: the kit's)")
    run.add_argument("--target", help="name of a target, or a JSON file that describes one (default: the kit's)")
    run.add_argument(
        "--weights", type=Path, help="start from these weights: the folder that `fitkit train` left, or a file"
    )
    train = _command(commands, "train", "train the kit's model from random weights")
    train.add_argument("--teacher", type=Path, help="weights of a larger model to learn from as well")
    search = _command(
        commands, "search", "search the kit's space beside random search; leaves a report with the front and the winner"
    )
    search.add_argument("--searcher", default="nsga2", help="differential-evolution, regularised-evolution, nsga2 or "
                        "random (default: nsga2)")  # fmt: skip
    search.add_argument("--trials", type=int, default=64, help="candidates to evaluate, and as many of random search")
    search.add_argument("--storage", help="a file or an SQL URL that keeps the trials, for several machines "
                        "(default: a file in --out)")  # fmt: skip
    search.add_argument("--workers", default="1", help="processes that evaluate, or 'ray' for a cluster (default: 1)")
    search.add_argument("--seed", type=int, default=0)
    search.add_argument("--fix", action="append", default=[], metavar="NAME=VALUE", help="a choice that is not "
                        "searched, such as size=640; may be given several times")  # fmt: skip
    search.add_argument("--finalists", type=int, default=1, help="of the best, so many are trained shortly each before "
                        "one wins (default: 1, without)")  # fmt: skip
    for command in (run, train, search):
        command.add_argument("--preset", choices=PRESETS, default="full", help="smoke: a short trial (default: full)")
        command.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
        command.add_argument("--data", type=Path, help="folder of data (default: the kit's generated set)")
    evaluate = _command(commands, "evaluate", "score an artifact on data; leaves predictions/ and metrics.json")
    evaluate.add_argument("--data", type=Path, required=True, help="folder of data")
    evaluate.add_argument("--split", help="split to score (default: test where there is one, else the held-out part)")
    bench = _command(commands, "bench", "time an artifact on this machine: p50, p99, peak memory", out=False)
    bench.add_argument("--threads", type=int, help="of the runtime (default: 2, or 1 on a single core)")
    bench.add_argument("--seconds", type=float, default=10.0, help="how long to time (default 10)")
    bench.add_argument("--json", action="store_true")
    predict = _command(commands, "predict", "run on your own inputs; leaves results and pictures")
    predict.add_argument("inputs", nargs="+", metavar="INPUT")
    for command in (evaluate, bench, predict):
        command.add_argument(
            "--artifact", type=Path, help="folder of an artifact or a run (default: the shipped weights)"
        )
        command.add_argument("--variant", help="which of the artifact's variants (default: its chosen one)")
    if kit is not None:
        kit.arguments("predict", predict)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 done, 1 a gate failed, 2 the input or the arguments are wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _quiet()
    try:
        if not given:
            parser().print_help()
            return DONE
        kit = _kit(given)
        options = parser(kit).parse_args(given)
        return int(_COMMANDS[options.command](kit, options))
    except (InputError, FloatingPointError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"{error.filename or 'the disk'}: no space left; free some and go on with --resume")
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}; mend the path or its rights")
        raise
    except RuntimeError as error:
        from core.export import ParityError

        if isinstance(error, ParityError):
            return _fail(str(error))
        raise
    except KeyboardInterrupt:
        return _fail("stopped; what was finished is kept, --resume goes on from there")


def _kit(given: Sequence[str]) -> Any:
    """The kit that a command line names, whose own options its parser is to know; None where it names none."""
    if given[0] not in _COMMANDS or given[0] == "list":
        return None
    name = given[1] if len(given) > 1 else ""
    if not name or name.startswith("-"):  # options stand before the kit
        if {"-h", "--help"} & set(given):
            return None
        name = parser().parse_known_args(given)[0].kit
    from core.kit import load

    return load(name)


def _list(kit: Any, options: argparse.Namespace) -> int:
    from core.hardware import targets
    from core.kit import load

    folder = importlib.util.find_spec("kits")
    places = list(folder.submodule_search_locations or []) if folder else []
    names = [m.name for m in pkgutil.iter_modules(places) if m.ispkg]
    found = {name: load(name) for name in names}
    if options.json:
        listing = {
            "kits": {
                n: {
                    "title": k.title,
                    "default_recipe": k.default_recipe,
                    "recipes": [r.to_json() for r in k.recipes.values()],
                }
                for n, k in found.items()
            },
            "targets": {n: t.title for n, t in targets().items()},
        }
        print(json.dumps(listing, indent=1))
        return DONE
    from rich.console import Console
    from rich.table import Table

    recipes = Table("kit", "recipe", "cost", "expects", title="Kits and recipes")
    for name, k in found.items():
        for recipe in k.recipes.values():
            mark = " (default)" if recipe.name == k.default_recipe else ""
            recipes.add_row(name, recipe.name + mark, recipe.cost, recipe.expects)
    devices = Table("target", "device", title="Targets")
    for name, t in targets().items():
        devices.add_row(name, t.title)
    console = Console()
    console.print(recipes)
    console.print(devices)
    return DONE


def _run(kit: Any, options: argparse.Namespace) -> int:
    from core.report.terminal import show
    from core.run import Run

    name = options.recipe
    if name is not None and name not in kit.recipes:
        raise InputError(f"--recipe {name!r}: {kit.name} has {', '.join(kit.recipes)}")
    target = options.target or kit.default_target
    out = options.out or Path("runs") / kit.name
    recipe = kit.recipes[name] if name is not None else None
    report = Run(kit, recipe, target, _folder(options.data), options.preset, out, options.resume, options.weights)()
    show(report)
    print(f"report: {out / 'report.html'}   artifact: {out / 'artifact'}")
    return GATE_FAILED if report.failed else DONE


def _train(kit: Any, options: argparse.Namespace) -> int:
    out = options.out or Path("runs") / f"{kit.name}-train"
    out.mkdir(parents=True, exist_ok=True)
    if options.teacher is not None and not options.teacher.exists():
        raise InputError(f"--teacher {options.teacher}: no such file; give the teacher's weights")
    figures = kit.train(_folder(options.data), options.preset, out, options.resume, options.teacher)
    for figure in figures:
        print(f"{figure.name:24} {figure}")
    print(f"weights: {out}")
    return DONE


def _search(kit: Any, options: argparse.Namespace) -> int:
    from core.report.terminal import show
    from core.run_search import SearchRun

    workers: int | str = options.workers
    if workers != "ray":
        if not options.workers.isdigit() or int(options.workers) < 1:
            raise InputError(f"--workers {options.workers}: expected a number above 0, or 'ray'")
        workers = int(options.workers)
    if options.finalists < 1:
        raise InputError(f"--finalists {options.finalists}: expected 1 or more")
    for text in options.fix:
        if "=" not in text:
            raise InputError(f"--fix {text}: expected NAME=VALUE, such as size=640")
    out = options.out or Path("runs") / f"{kit.name}-search"
    report = SearchRun(
        kit, options.searcher, options.trials, _folder(options.data), options.preset, out, options.resume,
        options.storage, workers, options.seed, dict(text.split("=", 1) for text in options.fix), options.finalists,
    )()  # fmt: skip
    show(report)
    print(f"report: {out / 'report.html'}   trials: {out / 'search.json'}")
    return DONE


def _evaluate(kit: Any, options: argparse.Namespace) -> int:
    data = _folder(options.data)
    split = options.split or kit.report_split(data)
    samples = kit.dataset(data, split)
    artifact = _artifact(kit, options.artifact)
    out = options.out or Path("runs") / f"{kit.name}-evaluate"
    module = artifact.as_module(options.variant, threads=2)
    metrics = kit.evaluate(module, samples, artifact.meta, out)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            print(f"{name:24} {value:.5g}")
    print(
        f"{artifact.variant(options.variant).name} on {len(samples)} samples of {split!r}; "
        f"metrics and predictions: {out}"
    )
    return DONE


def _bench(kit: Any, options: argparse.Namespace) -> int:
    from core.evaluation.bench import available_cores, bench
    from core.evaluation.measure import device, peak_memory, runtime_title

    cores = len(available_cores())
    threads = min(2, cores) if options.threads is None else options.threads
    if not 1 <= threads <= cores:  # before a runtime starts that many
        raise InputError(f"--threads {threads}: expected 1 to {cores}, the cores that this process may use")
    artifact = _artifact(kit, options.artifact)
    samples = list(islice(kit.dataset(None, "test", "smoke"), 16))
    names = [artifact.variant(options.variant).name] if options.variant else list(artifact.variants)
    runs = {name: kit.pipeline(artifact.as_module(name, threads), samples) for name in names}
    result = bench(runs, seconds=options.seconds, threads=threads)
    memory = {name: peak_memory(artifact.folder, name, threads) for name in names}
    rows = [
        {
            "variant": n,
            "chosen": n == artifact.chosen,
            "p50_ms": t.p50,
            "p99_ms": t.p99,
            "fps": 1e3 / t.p50,
            "runs": t.runs,
            "peak_memory_mb": memory[n],
            "size_mb": artifact.size_bytes(n) / 1e6,
            "runtime": runtime_title(artifact, n, threads),
        }
        for n, t in result.timings.items()
    ]
    if options.json:
        print(json.dumps({"device": device(), "kit": kit.name, "end_to_end": True, "variants": rows}, indent=1))
        return DONE
    from rich.console import Console
    from rich.table import Table

    table = Table("variant", "p50 ms", "p99 ms", "1/s", "peak MB", "size MB", title=f"{device()}, end to end, in turns")
    for row in rows:
        mark = " *" if row["chosen"] else ""
        table.add_row(
            f"{row['variant']}{mark}",
            *(f"{row[k]:.2f}" for k in ("p50_ms", "p99_ms", "fps", "peak_memory_mb", "size_mb")),
        )
    Console().print(table)
    return DONE


def _predict(kit: Any, options: argparse.Namespace) -> int:
    from core.export import folder

    kit.check(options.inputs)
    out = options.out or Path("runs") / f"{kit.name}-predict"
    if folder.RUNTIME in kit.runtimes and options.artifact is not None and (options.artifact / folder.INDEX).is_file():
        # the folder of a model, and no artifact of it
        print(kit.predict(options.artifact, options.inputs, {}, out, options))
        return DONE
    artifact = _artifact(kit, options.artifact)
    ready = artifact.folder_of(options.variant) or artifact.as_module(options.variant, threads=2)
    print(kit.predict(ready, options.inputs, artifact.meta, out, options))
    return DONE


def _artifact(kit: Any, folder: Path | None) -> Any:
    """The artifact of a folder (of a run, or itself), or the shipped weights, exported on first use."""
    from core.export import Artifact

    if folder is not None:
        artifact = Artifact.open(folder / "artifact" if (folder / "artifact").is_dir() else folder)
        if artifact.manifest["kit"] != kit.name:
            raise InputError(f"--artifact {folder}: is of the kit {artifact.manifest['kit']!r}, not of {kit.name!r}")
        return artifact
    from core.shipped import shipped_artifact

    return shipped_artifact(kit)


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise InputError(f"--data {path}: no such folder; give the folder of the data, or leave --data out")
    return path


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def _command(commands: Any, name: str, text: str, out: bool = True) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("kit", help="name of a kit, or its import path")
    if out:
        command.add_argument("--out", type=Path, help="folder for what it leaves (default: below runs/)")
    return command


def _quiet() -> None:
    """Keep the chatter of libraries that fitkit stands on out of the user's sight."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("ONEDNN_VERBOSE", "0")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("bitsandbytes", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)


def _fail(text: str) -> int:
    print(f"fitkit: {' '.join(text.split())}", file=sys.stderr)
    return WRONG_INPUT


_COMMANDS = {
    "list": _list,
    "run": _run,
    "train": _train,
    "search": _search,
    "evaluate": _evaluate,
    "bench": _bench,
    "predict": _predict,
}

if __name__ == "__main__":
    sys.exit(main())
