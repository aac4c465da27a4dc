"""Which torch module every node of an exported ONNX model comes from.

torch's dynamo exporter leaves the path of modules in each node's metadata; the names of weights tell
the rest (a batch norm folded into a convolution carries the norm's path but the convolution's weight).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STORED = {1: "FP32", 2: "INT8", 3: "INT8", 10: "FP16", 16: "BF16", 21: "INT4", 22: "INT4"}
SCOPES = "pkg.torch.onnx.name_scopes"
_QUOTED = re.compile(r"'([^']*)'")  # the exporter writes a list of names as Python shows it
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LAYOUT = frozenset({"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split"})
_TO_ROOT = frozenset({"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast", "Max", "Min",
                      "Split", "Slice"})  # fmt: skip
_BOOLEAN = frozenset({"And", "Or", "Not", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN",
                      "IsInf"})  # fmt: skip
_AFTER = frozenset({"Add", "Mul", "Sub", "Div", "Relu", "Clip", "Sigmoid", "HardSigmoid"}) | _LAYOUT


@dataclass(frozen=True)
class Call:
    """One call of a module in the ONNX graph: the value that leaves it, and the how-manieth call it is (from 0)."""

    layer: str
    index: int
    value: str


class Layers:
    """The map from an exported model's nodes, values and weights to the dotted names of torch modules."""

    def __init__(self, model: Any, modules: Iterable[str], prefix: str = "") -> None:
        """`model` is an `onnx.ModelProto`, `modules` the names of the exported module's submodules.

        `prefix` is the path of the exported module in the whole model, put before every name.
        """
        self._modules = set(modules) - {""}
        self._prefix = prefix
        self.nodes = list(model.graph.node)
        self.producer = {out: n for n in self.nodes for out in n.output if out}
        self.initializers = {t.name: t for t in model.graph.initializer}
        self._graph_outputs = {o.name for o in model.graph.output}
        self._by_name = {n.name: n for n in self.nodes}
        self._by_weight: dict[str, list[Any]] = defaultdict(list)
        for node in self.weighted():
            for name in {n for given in node.input[1:] for n in (given, self.root(given))}:
                self._by_weight[name].append(node)

    def weighted(self) -> list[Any]:
        """The nodes that multiply by a weight: convolutions, and products with a constant."""
        return [n for n in self.nodes if n.op_type in WEIGHTED and self.root(n.input[1]) in self.initializers]

    def root(self, value: str) -> str:
        """The initializer behind a value, through quantizers, parts and changes of layout; else a value on that way."""
        while value in self.producer and self.producer[value].op_type in _TO_ROOT:
            value = self.producer[value].input[0]
        return value

    def scopes(self, node: Any) -> list[str]:
        """The modules that a node lies in, outermost first; empty for a node that a later pass put in."""
        for prop in node.metadata_props:
            if prop.key == SCOPES:
                return [s for s in _QUOTED.findall(prop.value)[:-1] if s in self._modules]
        return []

    def layer(self, node: Any) -> str:
        """The dotted name of the module that a node belongs to, or the node's own name where there is none."""
        if node.op_type in WEIGHTED:
            owner = f".{self.root(node.input[1])}".split(".weight")[0].removeprefix(".")
            if owner in self._modules or (not owner and self._prefix):
                return self.full(owner)
        scopes = self.scopes(node)
        return self.full(scopes[-1] if scopes else "") or str(node.name)

    def full(self, name: str) -> str:
        """A module's name in the whole model."""
        return ".".join(p for p in (self._prefix, name) if p)

    def find(self, name: str) -> Any | None:
        """The node that a runtime's name stands for: its own name, or an output's, with the runtime's suffixes cut."""
        for cut in (name, name.split("_token_")[0], name.removesuffix("_nchwc"), name.split("/")[0]):
            if (node := self._by_name.get(cut) or self.producer.get(cut)) is not None:
                return node
        return None

    def by_weights(self, names: Iterable[str]) -> Any | None:
        """The one weighted node that uses an initializer of these names, or None."""
        for name in names:
            if len(nodes := self._by_weight.get(name, [])) == 1:
                return nodes[0]
        return None

    def behind(self, node: Any) -> Any | None:
        """The weighted node that this one ends, where only bias, activation and layout lie between; else None."""
        seen = 0
        weighted = {n.name for n in self.weighted()}
        while node is not None and node.name not in weighted:
            if node.op_type not in _AFTER or seen > 8:
                return None
            read = [name for name in node.input if self.root(name) not in self.initializers]
            node, seen = self.producer.get(read[0]) if len(read) == 1 else None, seen + 1
        return node

    def constant(self, node: Any) -> bool:
        """Whether a node reads constants only, so that a runtime computes it once, when it compiles the graph."""
        waiting, seen = [node], {node.name}
        while waiting:
            for name in waiting.pop().input:
                before = self.producer.get(name)
                if before is None:
                    if name and name not in self.initializers:
                        return False
                elif before.name not in seen:
                    seen.add(before.name)
                    waiting.append(before)
        return True

    def boolean(self, node: Any) -> bool:
        """Whether a node puts out truth values."""
        while node.op_type in _LAYOUT and node.input[0] in self.producer:
            node = self.producer[node.input[0]]
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        return node.op_type in _BOOLEAN or (node.op_type == "Cast" and to == 9)

    def stored(self, node: Any) -> str:
        """The data type in which the file holds the weight of a weighted node: "FP32", "FP16", "INT8", ..."""
        return STORED.get(self.initializers[self.root(node.input[1])].data_type, "other")

    def dequantized(self, value: str) -> bool:
        """Whether a value comes straight out of a DequantizeLinear, or out of one through a change of layout."""
        while value in self.producer and self.producer[value].op_type in {"Transpose", "Reshape", "Identity"}:
            value = self.producer[value].input[0]
        return value in self.producer and self.producer[value].op_type == "DequantizeLinear"

    def quantized(self) -> list[Any]:
        """The weighted nodes whose activation and weight are both quantized: those that should run in integers."""
        return [n for n in self.weighted() if self.dequantized(n.input[0]) and self.dequantized(n.input[1])]

    def calls(self) -> list[Call]:
        """Every call of a module whose single output can be told in the graph, in the order of execution.

        A call is a run of nodes of one module; its output is the one value that is used outside the run.
        Calls that end in the same value are told once, by the innermost module.
        """
        users: dict[str, set[int]] = defaultdict(set)
        for i, node in enumerate(self.nodes):
            for name in node.input:
                users[name].add(i)
        # where the runs are counted, nodes outside all modules that a pass put between do not break a run
        placed = [(i, self.scopes(n)) for i, n in enumerate(self.nodes)]
        placed = [(i, s) for i, s in placed if s or self.nodes[i].metadata_props]
        open_runs: dict[str, list[int]] = {}
        runs: list[tuple[str, list[int]]] = []
        for i, scopes in placed:
            for name in [n for n in open_runs if n not in scopes]:
                runs.append((name, open_runs.pop(name)))
            for name in scopes:
                open_runs.setdefault(name, []).append(i)
        runs += open_runs.items()
        seen: dict[str, int] = defaultdict(int)
        found: dict[str, tuple[int, int, Call]] = {}
        for name, members in sorted(runs, key=lambda r: r[1][0]):
            inside, index = set(members), seen[name]
            seen[name] += 1
            leaving = [
                o for i in members for o in self.nodes[i].output if users[o] - inside or o in self._graph_outputs
            ]
            if len(leaving) == 1:
                depth, before = name.count("."), found.get(leaving[0])
                if before is None or depth >= before[1]:
                    found[leaving[0]] = (members[-1], depth, Call(name, index, leaving[0]))
        return [call for _, _, call in sorted(found.values(), key=lambda f: f[0])]
