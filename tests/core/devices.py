"""Devices with round numbers, and small networks to run on them, for the tests of core.hardware."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.hardware import (
    target,
)
from core.hardware.targets import Target
from core.kit import Graph

NAMES = {
    "this-host", "x86-edge-box", "snapdragon-8-gen-2", "dimensity-9200", "jetson-orin", "mdc-810",
    "automotive-10tops", "stm32f746", "cortex-m7-64k", "edge-1w",
}  # fmt: skip


def number(value, unit):
    return {"value": value, "unit": unit, "source": "test"}


def entry():
    """A device with round numbers: 100 GFLOP/s kept half busy, one memory of 10 GB/s."""
    ram = {"name": "RAM", "technology": "dram", "holds": ["weights", "activations"]}
    ram |= {"bytes": number(1e9, "B"), "bandwidth": number(1e10, "B/s")}
    return {
        "title": "round device",
        "device_class": "test",
        "peak": {"fp32": number(1e11, "op/s"), "int8": number(4e11, "op/s")},
        "memory": [ram],
        "power": {"rated": number(10, "W"), "static": number(2, "W")},
        "process": number(45, "nm"),
        "efficiency": number(0.5, "share of peak"),
        "latency_band": number(0.4, "relative"),
        "macs_per_instruction": number(8, "MAC"),
    }


def device(tmp_path: Path, **changes) -> Target:
    file = tmp_path / "round.json"
    file.write_text(json.dumps({**entry(), **changes}))
    return target(str(file))


def graph(*inputs: torch.Tensor, part: str = "") -> tuple[Graph, ...]:
    return (Graph("g", {f"x{i}": x for i, x in enumerate(inputs)}, ("y",), part),)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.narrow = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.narrow(self.act(self.norm(self.wide(x)))) + x)


class Attention(nn.Module):
    """Attention by matrix products outside any layer."""

    def __init__(self, dim=32):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        return self.out(torch.einsum("bij,bjd->bid", weights, v))


class FakeQuantized(nn.Conv2d):
    """A wrapper as quantization makes them: a Conv2d that owns quantizers and simulates in its forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantizer = nn.Sequential(nn.Identity())
        self.step = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        x = self.quantizer(torch.round(x / self.step) * self.step)
        weight = torch.clamp(torch.round(self.weight / self.step), -128, 127) * self.step
        return self._conv_forward(x, weight, self.bias)


def torch_macs(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2
