"""Layers of a supernet: the largest one's weights, of which a candidate uses a part, and the plain layers cut of them.

As once-for-all networks (Cai et al. 2020): the first channels, the middle of a kernel through a learnt matrix, the
first blocks of a stage. How many inputs a layer has it reads from what comes. Letters: N batch, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.kit import InputError


class ElasticConv2d(nn.Module):
    """A convolution of which `out_channels`, `kernel_size` and `groups` can be set, or with a kernel for every channel.

    `kernels` are odd sizes (or one of any size), the largest of which holds the weights; a smaller one is its middle,
    turned by a square matrix that begins as one and is learnt. In groups it uses the blocks of the weights on the
    diagonal; with `depthwise` every channel is a group. Padding keeps the size at stride 1 unless it is given.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernels: Sequence[int] = (3,), stride: int = 1,
        *, depthwise: bool = False, bias: bool = False, padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if (len(kernels) > 1 and any(k % 2 == 0 for k in kernels)) or sorted(set(kernels)) != sorted(kernels):
            raise InputError(f"ElasticConv2d: kernels {tuple(kernels)}, expected odd sizes, each once")
        if depthwise and in_channels != out_channels:
            raise InputError(f"ElasticConv2d: depthwise with {in_channels} and {out_channels} channels; give the same")
        self.kernels = tuple(sorted(kernels, reverse=True))
        self.stride, self.depthwise, self._padding = stride, depthwise, padding
        whole = nn.Conv2d(in_channels, out_channels, self.kernels[0], groups=in_channels if depthwise else 1, bias=bias)
        self.weight, self.bias = whole.weight, whole.bias
        self.turns = nn.ParameterList(nn.Parameter(torch.eye(k * k)) for k in self.kernels[1:])
        self.out_channels, self.kernel_size, self.groups = out_channels, self.kernels[0], 1

    def set(
        self, *, out_channels: int | None = None, kernel_size: int | None = None, groups: int | None = None
    ) -> None:
        """What the next forward uses; InputError for more channels than there are, or a kernel that is not known.

        Channels that the groups do not divide are told by that forward.
        """
        if out_channels is not None:
            if not 1 <= out_channels <= len(self.weight):
                raise InputError(f"ElasticConv2d: {out_channels} channels of {len(self.weight)}")
            self.out_channels = out_channels
        if kernel_size is not None:
            if kernel_size not in self.kernels:
                raise InputError(f"ElasticConv2d: kernel {kernel_size}, known are {self.kernels}")
            self.kernel_size = kernel_size
        if groups is not None:
            if groups < 1 or self.depthwise:
                raise InputError(f"ElasticConv2d: {groups} groups of a {'depthwise ' * self.depthwise}convolution")
            self.groups = groups

    @property
    def padding(self) -> int:
        """That of the kernel in use."""
        return self.kernel_size // 2 if self._padding is None else self._padding

    def active(self, in_channels: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for inputs of `in_channels`."""
        out = in_channels if self.depthwise else self.out_channels
        weight = self.weight[:out, : 1 if self.depthwise else in_channels]
        if self.groups > 1:
            if out % self.groups or in_channels % self.groups:
                raise InputError(f"ElasticConv2d: {in_channels} to {out} channels in {self.groups} groups")
            rows = (block.chunk(self.groups, 1)[n] for n, block in enumerate(weight.chunk(self.groups)))
            weight = torch.cat(list(rows))
        for size, turn in zip(self.kernels[1:], self.turns):
            if size < self.kernel_size:
                break
            edge = (weight.shape[-1] - size) // 2
            middle = weight[:, :, edge : edge + size, edge : edge + size]
            weight = (middle.flatten(2) @ turn).unflatten(2, (size, size))
        return weight.contiguous(), self.bias[:out] if self.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H / stride, W / stride)."""
        weight, bias = self.active(x.shape[1])
        groups = x.shape[1] if self.depthwise else self.groups
        return F.conv2d(x, weight, bias, self.stride, self.padding, groups=groups)

    def cut(self, in_channels: int) -> nn.Conv2d:
        """The plain layer for inputs of `in_channels`."""
        weight, bias = self.active(in_channels)
        plain = nn.Conv2d(
            in_channels, len(weight), self.kernel_size, self.stride, self.padding,
            groups=in_channels if self.depthwise else self.groups, bias=bias is not None,
        )  # fmt: skip
        with torch.no_grad():
            plain.weight.copy_(weight)
            if bias is not None:
                cast(Tensor, plain.bias).copy_(bias)
        return plain


class ElasticLinear(nn.Module):
    """A linear layer of which `out_features` can be set."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        whole = nn.Linear(in_features, out_features)
        self.weight, self.bias = whole.weight, whole.bias
        self.out_features = out_features

    def set(self, *, out_features: int) -> None:
        """What the next forward uses; InputError for more than there are."""
        if not 1 <= out_features <= len(self.weight):
            raise InputError(f"ElasticLinear: {out_features} features of {len(self.weight)}")
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., out_features)."""
        return F.linear(x, self.weight[: self.out_features, : x.shape[-1]].contiguous(), self.bias[: self.out_features])

    def cut(self, in_channels: int) -> nn.Linear:
        """The plain layer for inputs of `in_channels`."""
        plain = nn.Linear(in_channels, self.out_features)
        with torch.no_grad():
            plain.weight.copy_(self.weight[: self.out_features, :in_channels])
            plain.bias.copy_(self.bias[: self.out_features])
        return plain


class ElasticBatchNorm2d(nn.Module):
    """A batch norm over the first channels that come.

    Its statistics are a mixture of all candidates that trained: what is cut is to be recalibrated, see
    `supernet.recalibrate`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        whole = nn.BatchNorm2d(channels)
        self.weight, self.bias, self.eps, self.momentum = whole.weight, whole.bias, whole.eps, momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised."""
        c = x.shape[1]
        return F.batch_norm(
            x, self.running_mean[:c], self.running_var[:c], self.weight[:c], self.bias[:c], self.training,
            self.momentum, self.eps,
        )  # fmt: skip

    def cut(self, in_channels: int) -> nn.BatchNorm2d:
        """The plain layer for inputs of `in_channels`."""
        plain = nn.BatchNorm2d(in_channels, self.eps)
        with torch.no_grad():
            for mine, its in (
                (self.weight, plain.weight), (self.bias, plain.bias),
                (self.running_mean, cast(Tensor, plain.running_mean)),
                (self.running_var, cast(Tensor, plain.running_var)),
            ):  # fmt: skip
                its.copy_(mine[:in_channels])
        return plain


class ElasticStage(nn.Module):
    """Blocks of which the first `depth` are run, at least one."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.depth = len(blocks)

    def set(self, *, depth: int) -> None:
        """What the next forward uses; InputError for more blocks than there are."""
        if not 1 <= depth <= len(self.blocks):
            raise InputError(f"ElasticStage: depth {depth} of {len(self.blocks)}")
        self.depth = depth

    def active_blocks(self) -> Iterator[nn.Module]:
        """The blocks that the next forward runs."""
        yield from list(self.blocks)[: self.depth]

    def forward(self, x: Tensor) -> Tensor:
        """Through the first `depth` blocks."""
        for block in self.active_blocks():
            x = block(x)
        return x


LAYERS = (ElasticConv2d, ElasticLinear, ElasticBatchNorm2d)


def extract(supernet: nn.Module, *inputs: Tensor, optional: Sequence[str] = ()) -> nn.Module:
    """A copy of the network as it is set now, in plain layers, whose forward in eval mode is the same to the bit.

    `inputs` are an example of its arguments, from which the layers' inputs are told. Layers that the example does not
    reach are dropped with a stage's last blocks, and where their names match a pattern in `optional`; elsewhere they
    raise InputError, since nobody could say how wide they are.
    """
    channels: dict[str, int] = {}
    hooks = []
    for name, module in supernet.named_modules():
        if isinstance(module, LAYERS):
            axis = -1 if isinstance(module, ElasticLinear) else 1

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name, axis: int = axis) -> None:
                came = int(given[0].shape[axis])
                if channels.setdefault(name, came) != came:
                    raise InputError(f"extract: {name} is given {channels[name]} and {came} channels in one forward")

            hooks.append(module.register_forward_pre_hook(note))
    modes = [(module, module.training) for module in supernet.modules()]
    supernet.eval()
    try:
        with torch.no_grad():
            supernet(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    plain = copy.deepcopy(supernet)
    _replace(plain, "", channels, optional)
    return plain.eval()


def _replace(module: nn.Module, path: str, channels: dict[str, int], optional: Sequence[str]) -> None:
    for name, child in list(module.named_children()):
        where = f"{path}{name}"
        if isinstance(child, ElasticStage):
            for index, block in enumerate(child.blocks):
                if index < child.depth:
                    _replace_in(child.blocks, str(index), block, f"{where}.blocks.{index}", channels, optional)
            setattr(module, name, nn.Sequential(*child.active_blocks()))
        else:
            _replace_in(module, name, child, where, channels, optional)


def _replace_in(
    parent: nn.Module, name: str, child: nn.Module, where: str, channels: dict[str, int], optional: Sequence[str]
) -> None:
    if isinstance(child, LAYERS):
        if where not in channels:
            if any(fnmatch(where, pattern) for pattern in optional):
                parent.add_module(name, nn.Identity())
                return
            raise InputError(f"extract: {where} is not reached by the example; give inputs that reach every layer")
        parent.add_module(name, child.cut(channels[where]))
    else:
        _replace(child, f"{where}.", channels, optional)
