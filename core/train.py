"""The one loop: train, fine-tune, quantization-aware training and distillation, on Hugging Face accelerate."""

from __future__ import annotations

import copy
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.files import replaced
from core.kit import InputError
from core.progress import progress
from core.weights import load_stored, stored


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    `warmup` is the share of all steps with a rising learning rate, `floor` the share of `lr` at the end
    of the cosine, `ema` the decay of the weight average (0: off), `clip` the gradient norm (0: off).
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.05
    floor: float = 0.02
    ema: float = 0.0
    clip: float = 0.0
    optimizer: str = "adamw"
    seed: int = 0
    evaluate_every: int = 1

    def rate(self, step: int, total: int) -> float:
        """The learning rate at a step: linear warm-up, then a cosine to `floor`."""
        ramp = max(1, round(self.warmup * total))
        if step < ramp:
            return self.lr * (step + 1) / ramp
        share = (step - ramp) / max(1, total - ramp)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def bfloat16(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Convolutions in bfloat16 if wanted and if the device multiplies it: GPUs, and CPUs with AMX or AVX512-BF16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and _multiplies_bfloat16(device))


def faster_in_bfloat16(step: Callable[[bool], object], device: torch.device, rounds: int = 3) -> bool:
    """Whether `step(True)`, in `bfloat16`, takes less time than `step(False)`: of small layers the casts eat the gain.

    Timed in turns, the fastest of `rounds` each, after one to warm up; nothing is run where a device lacks bfloat16.
    """
    if not _multiplies_bfloat16(device):
        return False
    least = {True: math.inf, False: math.inf}
    for index in range(1 + rounds):
        for fast in least:
            started = time.perf_counter()
            step(fast)
            if index:
                least[fast] = min(least[fast], time.perf_counter() - started)
    return least[True] < least[False]


def _multiplies_bfloat16(device: torch.device) -> bool:
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return device.type != "cpu" or bool(known.get("amx_bf16", False) or known.get("avx512_bf16", False))


@dataclass(frozen=True)
class Fit:
    """The trained model (the average, and the best epoch, where those were asked for) and its history."""

    model: nn.Module
    history: list[dict[str, float]]


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    schedule: Schedule,
    *,
    steps_per_epoch: int,
    folder: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[int, nn.Module], bool | None] | None = None,
    label: str = "train",
) -> Fit:
    """Train a model in place and return it, with the weights of the best epoch if `evaluate` is given.

    `batches(epoch)` yields that epoch's batches, the same for the same epoch; `steps_per_epoch` of them
    are taken. `evaluate` is a score where more is better. With `folder`, every epoch leaves
    `last.safetensors` there, the state of everything in one file, and `resume` goes on from it. Raises
    FloatingPointError when the loss is no longer finite, InputError for an epoch without batches and for
    a checkpoint of another training.

    Under `accelerate launch` the N processes share the batches of an epoch, one each a step, so that it has
    `steps_per_epoch // N` steps; a last round of fewer than N batches is left out. `loss` must then call the
    model as a whole; `evaluate` and `on_epoch` are called in the first process only. Where `on_epoch` returns True, the
    training ends, in all of them.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    accelerator = Accelerator()
    optimizer = _optimizer(model, schedule)
    # before `prepare`: in mixed precision that wraps the forward of the very model, which a copy would go on calling
    average = copy.deepcopy(model).to(accelerator.device) if schedule.ema else None
    net, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(net)
    candidate = average if average is not None else bare
    best: dict[str, Tensor] = {}
    best_score, history, first = -math.inf, [], 0
    steps = max(1, steps_per_epoch // accelerator.num_processes)
    total = schedule.epochs * steps
    last = folder / "last.safetensors" if folder is not None else None
    if resume and last is not None and last.exists():
        state = _Checkpoint.read(last)
        for key, wanted in (("schedule", asdict(schedule)), ("steps", steps)):
            if state.meta[key] != wanted:
                what = (
                    "schedule"
                    if key == "schedule"
                    else f"number of steps an epoch, {state.meta[key]} instead of {steps}"
                )
                raise InputError(f"{last}: was written with another {what}; delete it or train without --resume")
        try:
            load_stored(bare, state.part("model"), str(last))
            if average is not None:
                load_stored(average, state.part("average"), str(last))
        except InputError as error:
            raise InputError(f"{last}: was written for another network; delete it or train without --resume") from error
        best, best_score = state.part("best"), state.meta["best_score"]
        _load_optimizer(optimizer, state.part("optimizer"))
        history, first = state.meta["history"], state.meta["epoch"] + 1
    with progress(label, total, done=first * steps, quiet=not accelerator.is_main_process) as bar:
        for epoch in range(first, schedule.epochs):
            torch.manual_seed(schedule.seed * 100_003 + epoch)
            bare.train()
            started, losses = time.perf_counter(), []
            with closing(_ahead(_share(batches(epoch), accelerator))) as ready:
                for index, batch in enumerate(itertools.islice(ready, steps)):
                    step = epoch * steps + index
                    for group in optimizer.param_groups:
                        group["lr"] = schedule.rate(step, total)
                    value = loss(net, send_to_device(batch, accelerator.device))
                    losses.append(value.item())
                    if not math.isfinite(losses[-1]):
                        raise FloatingPointError(
                            f"{label}: loss is {losses[-1]} at epoch {epoch}, step {index}; lower lr {schedule.lr}"
                        )
                    optimizer.zero_grad()
                    accelerator.backward(value)
                    if schedule.clip:
                        accelerator.clip_grad_norm_(bare.parameters(), schedule.clip)
                    optimizer.step()
                    if average is not None:
                        _blend(average, bare, min(schedule.ema, (1 + step) / (10 + step)))
                    bar.advance(f"epoch {epoch + 1}/{schedule.epochs} loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
            if not losses:
                raise InputError(
                    f"{label}: epoch {epoch} brought no batch for each process; give more samples or smaller batches"
                )
            for each in dict.fromkeys((bare, candidate)):
                _as_in_first(each, accelerator)
            mean = _over_all(sum(losses) / len(losses), accelerator, "mean")
            entry = {"epoch": epoch, "loss": mean, "seconds": round(time.perf_counter() - started, 1)}
            candidate.eval()
            due = (epoch + 1) % schedule.evaluate_every == 0 or epoch + 1 == schedule.epochs
            if evaluate is not None and due:
                entry["score"] = _over_all(
                    float(evaluate(candidate)) if accelerator.is_main_process else 0.0, accelerator, "sum"
                )
                if entry["score"] > best_score:
                    best_score = entry["score"]
                    best = {k: v.detach().clone() for k, v in stored(candidate).items()}
            history.append(entry)
            ended = False
            if accelerator.is_main_process:
                bar.log(f"{label} " + "  ".join(f"{k} {v:.5g}" for k, v in entry.items()))
                if last is not None:
                    meta = {
                        "schedule": asdict(schedule),
                        "steps": steps,
                        "epoch": epoch,
                        "history": history,
                        "best_score": best_score,
                    }
                    parts = {"model": stored(bare), "best": best, "optimizer": _optimizer_state(optimizer)}
                    if average is not None:
                        parts["average"] = stored(average)
                    _Checkpoint.write(last, parts, meta)
                if on_epoch is not None:
                    ended = bool(on_epoch(epoch, candidate))
            if on_epoch is not None and _over_all(float(ended), accelerator, "sum") > 0:
                break
    bare = accelerator.unwrap_model(net, keep_fp32_wrapper=False)
    load_stored(bare, best or stored(candidate), label)
    bare.eval()
    accelerator.free_memory()
    return Fit(bare, history)


def _share(batches: Iterable[Any], accelerator: Any) -> Iterator[Any]:
    """This process's batch of every whole round: in one for some processes only, those would wait for the rest."""
    source = iter(batches)
    while len(batch_each := list(itertools.islice(source, accelerator.num_processes))) == accelerator.num_processes:
        yield batch_each[accelerator.process_index]


@torch.no_grad()
def _as_in_first(model: nn.Module, accelerator: Any) -> None:
    """Give every process the first one's weights and buffers: each one's batch norms have seen other batches."""
    from accelerate.utils import broadcast

    if accelerator.num_processes > 1:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.copy_(broadcast(tensor.detach().clone()))


def _over_all(value: float, accelerator: Any, how: str) -> float:
    """The "mean" or "sum" of a number over all processes."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), how))


def _ahead(batches: Iterable[Any], depth: int = 4) -> Generator[Any, None, None]:
    """The same batches in the same order, the next few made in a thread while the current one trains."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put("batch", batch)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001  raised again where the batch is asked for
            put("error", error)

    worker = threading.Thread(target=work, daemon=True, name="batches")
    worker.start()
    try:
        while (item := ready.get())[0] == "batch":
            yield item[1]
        if item[0] == "error":
            raise item[1]
    finally:
        stop.set()
        worker.join()


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on biases, norms and scales."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)
    raise InputError(f"optimizer {schedule.optimizer!r} is not known; use 'adamw' or 'sgd'")


@torch.no_grad()
def _blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    # not by state_dict, which lists a tensor that two layers share twice
    both = (itertools.chain(m.parameters(), m.buffers()) for m in (average, model))
    for mean, now in zip(*both, strict=True):
        if mean.dtype.is_floating_point:
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


def _optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
        if value is not None
    }


def _load_optimizer(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    full = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        param = params[int(index)]
        # in the memory layout of its parameter, so that the next step computes in the same order
        entries.setdefault(int(index), {})[name] = (
            torch.empty_like(param).copy_(value) if value.shape == param.shape else value
        )
    optimizer.load_state_dict({"state": entries, "param_groups": full["param_groups"]})


@dataclass(frozen=True)
class _Checkpoint:
    """Named groups of tensors and JSON in one safetensors file, replaced whole."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        return {k.split("/", 1)[1]: v for k, v in self.tensors.items() if k.startswith(name + "/")}

    @staticmethod
    def write(path: Path, parts: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        tensors = {
            f"{part}/{k}": v.detach().cpu().contiguous().clone()
            for part, group in parts.items()
            for k, v in group.items()
        }
        with replaced(path) as fresh:
            save_file(tensors, str(fresh), metadata={"fitkit": json.dumps(meta)})

    @staticmethod
    def read(path: Path) -> _Checkpoint:
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads(file.metadata()["fitkit"])
                return _Checkpoint({k: file.get_tensor(k) for k in file.keys()}, meta)  # noqa: SIM118
        except Exception as error:  # safetensors raises its own type for a torn file
            raise InputError(
                f"{path}: not a whole checkpoint ({error}); delete it to start that training anew"
            ) from error
