"""The rules of the source tree, held by reading its syntax: who may import whom and when, and what nobody may call."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lower floors know nothing of higher ones. Units of one floor may import each other, but never in a circle.
FLOORS = (
    {"figures", "hardware", "kit", "cache", "files", "progress", "weights"},
    {"compress", "train"},
    {"quantization", "pruning", "distillation", "nas"},
    {"export", "evaluation", "search"},
    {"ledger", "report"},
    {"run", "run_search", "shipped"},
    {"cli"},
)
TECHNIQUES = FLOORS[2]
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}

# Slow to import, or not installed everywhere: imported where they are used.
RUNTIMES = {
    "ethosu", "executorch", "litert_torch", "matplotlib", "nncf", "onnxruntime", "openvino", "optuna", "ray",
    "tflite_micro", "torch_pruning", "ultralytics",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
GRAB_BAGS = {"utils", "util", "helpers", "helper", "misc", "common"}


@dataclass(frozen=True)
class Source:
    """A parsed file and its path from the root of the repository, such as "core/kit.py"."""

    path: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported module, its line, and whether it is imported as soon as the file is."""

    target: str
    line: int
    at_once: bool


Rule = Callable[[Source], Iterator[tuple[int, str]]]


def parse(path: str, text: str) -> Source:
    return Source(path, ast.parse(text, path))


def tree_of(*folders: str) -> list[Source]:
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return [parse(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def names_of(node: ast.AST, source: Source) -> list[str]:
    """The dotted modules that a node imports; `from core import kit` counts as `core.kit`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = source.package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module")
        and node.args
    ):
        first = node.args[0]
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


@cache
def imports(source: Source) -> tuple[Import, ...]:
    def walk(node: ast.AST, at_once: bool) -> Iterator[Import]:
        for name in names_of(node, source):
            yield Import(name, node.lineno, at_once)  # type: ignore[attr-defined]
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not lazy and not typing_only)

    return tuple(walk(source.tree, True))


def unit(module: str) -> str:
    """The part of core that a dotted module belongs to: "kit" of "core.kit.Step", "" of "core" itself."""
    return module.split(".")[1] if module.startswith("core.") else ""


def within_core(source: Source) -> Iterator[tuple[str, Import]]:
    """The units of core that a file of core imports, its own left out."""
    for item in imports(source):
        if item.target.split(".")[0] == "core" and unit(item.target) != unit(source.module):
            yield unit(item.target), item


def floors(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.startswith("core/") and (mine := unit(source.module)):
        if mine not in FLOOR_OF:
            yield 1, f"core.{mine} stands on no floor; give it one in FLOORS"
            return
        for other, item in within_core(source):
            if other not in FLOOR_OF:
                yield item.line, f"imports {item.target}: a unit that stands on no floor; import from core.<module>"
            elif FLOOR_OF[other] > FLOOR_OF[mine]:
                yield item.line, f"core.{mine} imports core.{other}, which stands above it"


def techniques_apart(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.startswith("core/") and unit(source.module) in TECHNIQUES:
        for other, item in within_core(source):
            if other in TECHNIQUES:
                yield item.line, f"technique core.{unit(source.module)} imports technique core.{other}"


def core_knows_no_kit(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.startswith("core/"):
        for item in imports(source):
            if item.target.split(".")[0] in ("kits", "tests", "benchmarks"):
                yield item.line, f"core imports {item.target}"


def kits_use_the_public_core(source: Source) -> Iterator[tuple[int, str]]:
    """A kit may import `core`, `core.<module>` and their names without an underscore, and nothing of another kit."""
    if source.path.startswith("kits/"):
        own = ".".join(source.module.split(".")[:2])
        for item in imports(source):
            parts = item.target.split(".")
            if parts[0] == "core" and any(part.startswith("_") for part in parts):
                yield item.line, f"imports {item.target}, which is private"
            if parts[0] == "kits" and ".".join(parts[:2]) != own:
                yield item.line, f"kit {own} imports {item.target}"
            if parts[0] in ("tests", "benchmarks"):
                yield item.line, f"kit {own} imports {item.target}"


def runtimes_when_used(source: Source) -> Iterator[tuple[int, str]]:
    for item in imports(source):
        if item.at_once and item.target.split(".")[0] in RUNTIMES:
            yield item.line, f"imports {item.target} at module level; import it inside the function that uses it"


def ultralytics_in_baselines_only(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.startswith("kits/") and source.path.endswith("/baseline.py"):
        return
    for item in imports(source):
        if item.target.split(".")[0] == "ultralytics":
            yield item.line, "imports ultralytics (AGPL-3.0); only kits/<kit>/baseline.py may"


def nothing_runs_from_data(source: Source) -> Iterator[tuple[int, str]]:
    """No pickle, eval, unsafe YAML, shell or code from a model hub: a file that is read can never run."""
    for item in imports(source):
        if item.target.split(".")[0] in PICKLES:
            yield item.line, f"imports {item.target}; keep tensors in safetensors and the rest in JSON"
        if item.target in ("torch.load", "torch.save", "builtins.eval", "builtins.exec", "os.system", "yaml.load"):
            yield item.line, f"imports {item.target}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load" and any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in node.keywords
        ):
            continue  # tensors and plain containers alone, as official checkpoints come
        if called in ("eval", "exec", "__import__", "torch.load", "torch.save", "yaml.load", "os.system", "os.popen"):
            yield node.lineno, f"calls {called}"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield node.lineno, f"passes {keyword.arg}={ast.unparse(keyword.value)}"


def no_grab_bags(source: Source) -> Iterator[tuple[int, str]]:
    if bags := GRAB_BAGS & set(source.module.lower().split(".")):
        yield 1, f"is named {min(bags)}; name it after the one idea it holds"


RULES: tuple[Rule, ...] = (
    floors,
    techniques_apart,
    core_knows_no_kit,
    kits_use_the_public_core,
    runtimes_when_used,
    ultralytics_in_baselines_only,
    nothing_runs_from_data,
    no_grab_bags,
)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    found = tree_of("core", "kits")
    assert {"core/kit.py", "core/compress.py", "core/figures.py"} <= {source.path for source in found}
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule, sources: list[Source]) -> None:
    broken = [f"{source.path}:{line}: {why}" for source in sources for line, why in rule(source)]
    assert not broken, "\n".join(broken)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Names around a circle of imports, first and last the same; [] where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_units_of_core_import_in_no_circle(sources: list[Source]) -> None:
    edges: dict[str, set[str]] = {}
    for source in sources:
        if source.path.startswith("core/") and unit(source.module):
            edges.setdefault(unit(source.module), set()).update(other for other, _ in within_core(source))
    assert not circle(edges), " -> ".join(circle(edges))


def test_tests_are_in_no_grab_bag() -> None:
    broken = [source.path for source in tree_of("tests", "benchmarks") if any(no_grab_bags(source))]
    assert not broken, "\n".join(broken)


def test_every_import_is_a_declared_dependency(sources: list[Source]) -> None:
    """What the code imports is in pyproject.toml: always there, or in an extra when it is imported on use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {normal(r.split("[")[0].split("<")[0].split(">")[0].split("=")[0]) for r in requirements}

    def normal(name: str) -> str:
        return name.strip().lower().replace("_", "-").replace(".", "-")

    always = names(project["dependencies"])
    on_use = always.union(*(names(extra) for extra in project["optional-dependencies"].values()))
    homes = packages_distributions()
    broken = []
    for source in sources:
        for item in imports(source):
            top = item.target.split(".")[0]
            if top in sys.stdlib_module_names or top in ("core", "kits"):
                continue
            providers = {normal(name) for name in homes.get(top, [top])}
            if not providers & (always if item.at_once else on_use):
                broken.append(f"{source.path}:{item.line}: imports {top}, which pyproject.toml does not declare")
    assert not broken, "\n".join(broken)


def test_importing_core_is_cheap() -> None:
    script = "import core, json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout))
    assert not loaded & RUNTIMES, f"`import core` loads {', '.join(sorted(loaded & RUNTIMES))}"
    assert "kits" not in loaded


@pytest.mark.parametrize(
    ("rule", "path", "text", "line"),
    [
        (floors, "core/figures.py", "def f():\n    from core.train import fit", 2),
        (floors, "core/compress.py", "import core.pruning.ranking", 1),
        (floors, "core/quantization/qat.py", "from ..export import export", 1),
        (floors, "core/quantization/qat.py", "from core import export", 1),
        (floors, "core/kit.py", "from core import load", 1),
        (floors, "core/attic.py", "", 1),
        (techniques_apart, "core/quantization/qat.py", "x = 1\nfrom core.pruning import Prune", 2),
        (techniques_apart, "core/nas/space.py", "def f():\n    from .. import distillation", 2),
        (core_knows_no_kit, "core/kit.py", "import importlib\nimportlib.import_module('kits.pcb_inspection')", 2),
        (core_knows_no_kit, "core/cli.py", "def f():\n    import kits.pcb_inspection", 2),
        (kits_use_the_public_core, "kits/a/model.py", "from core.kit import _plain", 1),
        (kits_use_the_public_core, "kits/a/model.py", "from core._secret import thing", 1),
        (kits_use_the_public_core, "kits/a/model.py", "from kits.b.data import load", 1),
        (kits_use_the_public_core, "kits/a/model.py", "from ..b import data", 1),
        (runtimes_when_used, "core/export/openvino.py", "import openvino as ov", 1),
        (runtimes_when_used, "core/export/onnx.py", "class A:\n    from onnxruntime import InferenceSession", 2),
        (runtimes_when_used, "kits/a/baseline.py", "try:\n    import ultralytics\nexcept ImportError:\n    pass", 2),
        (ultralytics_in_baselines_only, "kits/a/model.py", "def f():\n    from ultralytics import YOLO", 2),
        (ultralytics_in_baselines_only, "core/baseline.py", "def f():\n    import ultralytics", 2),
        (nothing_runs_from_data, "core/train.py", "import pickle", 1),
        (nothing_runs_from_data, "core/train.py", "import torch\ntorch.load('a.pt', weights_only=flag)", 2),
        (nothing_runs_from_data, "core/train.py", "import torch\ntorch.load('a.pt')", 2),
        (nothing_runs_from_data, "core/train.py", "from torch import load", 1),
        (nothing_runs_from_data, "core/train.py", "eval('1')", 1),
        (nothing_runs_from_data, "core/train.py", "exec('1')", 1),
        (nothing_runs_from_data, "core/train.py", "yaml.load(f, Loader=yaml.Loader)", 1),
        (nothing_runs_from_data, "core/train.py", "subprocess.run('ls', shell=True)", 1),
        (nothing_runs_from_data, "core/train.py", "f(trust_remote_code=flag)", 1),
        (nothing_runs_from_data, "core/train.py", "np.load(p, allow_pickle=True)", 1),
        (no_grab_bags, "core/pruning/utils.py", "", 1),
        (no_grab_bags, "kits/a/misc/boxes.py", "", 1),
    ],
)
def test_rule_catches(rule: Rule, path: str, text: str, line: int) -> None:
    assert [number for number, _ in rule(parse(path, text))] == [line]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("core/quantization/qat.py", "from core.compress import handles\nfrom core.kit import Step\nmodel.eval()"),
        ("core/quantization/qat.py", "from . import schemes\nfrom core.quantization.schemes import Scheme"),
        ("core/export/openvino.py", "def run():\n    import openvino\n    return subprocess.run(['ls'], shell=False)"),
        ("core/export/onnx.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnxruntime"),
        ("core/__init__.py", "from core.cli import main\nfrom core.pruning import Prune"),
        (
            "kits/a/data.py",
            "import core\nfrom core.evaluation.detection import map\nfrom . import model\nimport kits.a.model",
        ),
        ("kits/a/baseline.py", "def teacher():\n    from ultralytics import YOLO"),
    ],
)
def test_rules_let_good_code_pass(path: str, text: str) -> None:
    found = {rule.__name__: list(rule(parse(path, text))) for rule in RULES}
    assert not any(found.values()), found


def test_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
