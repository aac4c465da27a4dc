"""What a kit is: steps, recipes, the graphs it exports, and the protocol that every kit fulfils."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from core.figures import Figures, Gate


class InputError(ValueError):
    """Input or arguments that a person can mend; the message is one line that says how."""


@dataclass(frozen=True)
class Step:
    """One compression move as data; subclasses are frozen dataclasses with plain JSON fields."""

    registry: ClassVar[dict[str, type[Step]]] = {}

    def __init_subclass__(cls) -> None:
        Step.registry[cls.__name__] = cls

    def to_json(self) -> dict[str, Any]:
        """{"step": class name, field: value, ...}."""
        return {"step": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Step:
        """Read back `to_json`; only registered classes and their own fields are accepted."""
        values = dict(data)
        name = values.pop("step", None)
        cls = Step.registry.get(str(name))
        if cls is None:
            raise InputError(f"step {name!r} is not known; known are {', '.join(sorted(Step.registry))}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"step {name}: unknown field {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [n for n in needed if n not in values]:
            raise InputError(f"step {name}: field {missing[0]!r} is missing")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Recipe:
    """A named tuple of steps with what it costs and what it is expected to give."""

    name: str
    steps: tuple[Step, ...]
    cost: str
    expects: str

    def to_json(self) -> dict[str, Any]:
        """The recipe as in `report.json`."""
        steps = [s.to_json() for s in self.steps]
        return {"name": self.name, "steps": steps, "cost": self.cost, "expects": self.expects}


@dataclass(frozen=True)
class Graph:
    """One graph to export: a submodule, example inputs by name, and names of the outputs.

    `part` is the dotted path of the submodule ("" for the whole model). `inputs` are example tensors
    in the order of the submodule's positional arguments. `dynamic` maps an input's name to
    {axis: name of the axis}.
    """

    name: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    part: str = ""
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def module(self, model: nn.Module) -> nn.Module:
        """The submodule of `model` that this graph exports."""
        return model.get_submodule(self.part)


@dataclass(frozen=True)
class Context:
    """What a step may use: the kit, its data, the untouched original, and a folder for checkpoints.

    `data` is the user's folder (None: the kit's generated set); `preset` is "smoke" or "full";
    `folder` is where a step keeps its own checkpoints (None: nowhere); `resume` continues from them.
    """

    kit: Kit
    original: nn.Module
    data: Path | None = None
    preset: str = "full"
    folder: Path | None = None
    resume: bool = False
    seed: int = 0


@runtime_checkable
class Calibrated(Protocol):
    """A kit whose loss leaves layers out that its results depend on, such as a decoder that is not trained."""

    def calibration(self, batch: Any) -> tuple[Tensor, ...]:
        """The positional arguments for a batch with which the network runs every layer that counts."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """A kit whose network takes what it put out before, such as the memory of the frame before."""

    def stream(self, samples: Sequence[Any], count: int, seed: int) -> Generator[tuple[Tensor, ...], Any, None]:
        """The network's positional arguments for about `count` samples in an order in which they follow each other.

        What the network returned for them is sent back: `output = yield arguments`.
        """
        ...


@runtime_checkable
class Telling(Protocol):
    """A kit that has something to say about what its verdicts mean on some data."""

    def remarks(self, data: Path | None, weights: Path | None) -> Sequence[str]:
        """Sentences for the report of a run on a folder, or (None) on the generated set, with the weights given."""
        ...


@runtime_checkable
class Kit(Protocol):
    """A task: model, data, loss, score, gates, recipes.

    `headline` names the metric of `score` whose loss by compression is the figure "accuracy_loss";
    `rate_hz` is the inferences a second for which the power is estimated. `runtimes` are those it is exported for:
    "onnxruntime" and "openvino", or "torch" alone, where a model saves itself (`core.export.folder`).
    """

    name: str
    title: str
    recipes: Mapping[str, Recipe]
    default_recipe: str
    default_target: str
    headline: str
    rate_hz: float
    gates: tuple[Gate, ...]
    runtimes: tuple[str, ...]

    def of(self, model: nn.Module) -> Kit:
        """This kit for one model, where data, graphs or batches depend on it (its own tokenizer or latents)."""
        ...

    def model(self, weights: Path | None = None) -> nn.Module:
        """The uncompressed network in eval mode, with the shipped weights or those of `weights`."""
        ...

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        """The samples of a split ("train", "val", "test") of a folder, or of the generated set."""
        ...

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        """Batches of samples for `loss`; with `train` shuffled and augmented, the same for the same seed."""
        ...

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """The positional arguments of the network for a batch."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch, a scalar that can be differentiated."""
        ...

    def score(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
        """Metrics of a module (torch or an artifact's) on samples: {name: (value, unit)}.

        `meta` holds what was chosen on validation data, such as a threshold.
        """
        ...

    def exports(self) -> tuple[Graph, ...]:
        """The graphs that make up an artifact."""
        ...

    def shipped(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """The models that ship, {"fp32": ..., "int8": ...}, and their meta."""
        ...

    def freeze(self, module: nn.Module, data: Path | None, preset: str) -> dict[str, Any]:
        """What is chosen on validation data for this very module: the meta of its artifact."""
        ...

    def report_split(self, data: Path | None) -> str:
        """The split on which figures are reported: held out of training and of every choice that the kit makes."""
        ...

    def train(self, data: Path | None, preset: str, out: Path, resume: bool, teacher: Path | None = None) -> Figures:
        """Train from random weights, leave them in `out`, and return the scores on the report split.

        `teacher` are the weights of a larger model to learn from as well; InputError where a kit knows none.
        """
        ...

    def evaluate(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Score samples end to end, leave predictions/ and metrics.json in `out`, and return the metrics."""
        ...

    def check(self, inputs: Sequence[str]) -> None:
        """Refuse a user's inputs of `predict` that are missing or malformed, before anything long starts."""
        ...

    def predict(self, module: Any, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: Any) -> str:
        """Run on a user's inputs, leave results and pictures in `out`, and return a summary of a few lines.

        `module` is an nn.Module, or the folder of a model that runs in torch, which the kit loads as memory allows.
        """
        ...

    def arguments(self, command: str, parser: Any) -> None:
        """Add the kit's own options of a command ("predict") to its argparse parser."""
        ...

    def pipeline(self, module: nn.Module, samples: Sequence[Any]) -> Callable[[], Any]:
        """A callable that takes the next decoded sample through the whole job; what `bench` times."""
        ...

    def baselines(self, samples: Sequence[Any], threads: int) -> dict[str, Callable[[], Any]]:
        """Other tools doing the same job, to be timed beside it; empty where they are not installed.

        A name begins with the tool's, up to the first dash, and says what stands behind the times: precision,
        runtime, random weights.
        """
        ...

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Figures and tables that need both models side by side, or that only this kit takes; nothing for most.

        `artifact` is that of the run, `compressed` a module of it (`origin_of` tells its variant), `out` a folder for
        what is worth keeping.
        """
        ...

    def pictures(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Example pictures for the report: {"title", "png"}."""
        ...


def load(name: str) -> Kit:
    """The KIT object of an import path such as "kits.pcb_inspection"; a bare name means `kits.<name>`."""
    path = name if "." in name else f"kits.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        raise InputError(f"no kit {name!r}: {path} cannot be imported; `fitkit list` shows the kits") from error
    kit = getattr(module, "KIT", None)
    if not isinstance(kit, Kit):
        raise InputError(f"{path} has no KIT that fulfils core.kit.Kit")
    return kit
