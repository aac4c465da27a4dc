"""Rounding that lets the weights not rounded yet make up for the error of those that are (GPTQ).

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". A layer's
output error is (w - q) H (w - q)^T with H the second moments of its inputs; column by column, the error of rounding
is spread over the columns to come by the Cholesky factor of the inverse of H.

The inputs of a convolution are its patches, one H for each of its groups. They stream by: H is all that is kept. A
kernel of more than BLOCK elements is split into blocks that are compensated apart (H of 23040 elements would be 2.1
GB, its factors twice that and minutes of work); what is lost is the compensation from one block to another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError
from core.quantization.packing import choose_scales, one_thread

BLOCK = 6144  # elements of a kernel that share an H, 151 MB of it
DAMPING = 0.01  # of the mean of H's diagonal, added to it
_POSITIONS = 4096  # outputs of a convolution read of each image; of larger ones, evenly spaced rows of them
_CHUNK = 1 << 24  # elements of patches made at a time
_LAZY = 128  # columns whose errors reach the rest of the matrix in one product


@dataclass
class Moments:
    """Sums over a layer's inputs: `first` (groups, kernel) and, where wanted, `second` for each block of the kernel.

    `groups` are those of a convolution, 1 otherwise; each of `second` is (groups, block, block) in float32. Call it
    as `moments(x)` with an input of the layer, of any float type.
    """

    layer: nn.Linear | nn.Conv2d
    group_size: int
    with_second: bool = True
    count: int = field(default=0, init=False)
    images: int = field(default=0, init=False)
    first: Tensor = field(init=False)
    second: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        groups, length, device = _groups(self.layer), self.layer.weight[0].numel(), self.layer.weight.device
        self.first = torch.zeros(groups, length, dtype=torch.float64, device=device)
        sizes = [last - first for first, last in blocks(length, self.group_size)] if self.with_second else []
        self.second = [torch.zeros(groups, size, size, device=device) for size in sizes]

    def __call__(self, x: Tensor) -> None:
        """Add an input (N, C, H, W) of a convolution or (..., in) of a linear layer."""
        x = x.detach()
        if isinstance(self.layer, nn.Linear):
            flat = x.reshape(-1, x.shape[-1])
            for part in flat.split(max(1, _CHUNK // flat.shape[1])):
                self._add(part.unsqueeze(1))
        else:
            for image in x if x.ndim == 4 else x[None]:
                self._add_image(image.float())

    def _add_image(self, image: Tensor) -> None:
        layer = self.layer
        assert isinstance(layer, nn.Conv2d)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(image[None], layer._reversed_padding_repeated_twice, mode=mode)[0]
        views = padded
        for axis in (0, 1):
            span = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            views = views.unfold(1 + axis, span, layer.stride[axis])
        views = views[..., :: layer.dilation[0], :: layer.dilation[1]].movedim(0, 2)  # (H', W', C, kh, kw)
        step = -(-views.shape[0] * views.shape[1] // _POSITIONS)
        rows = views[self.images % step :: step]  # each image from another row on, so that none is left out for good
        self.images += 1
        for part in rows.split(max(1, _CHUNK // max(1, rows[0].numel()))):
            self._add(part.reshape(-1, _groups(layer), self.first.shape[1]))

    def _add(self, inputs: Tensor) -> None:
        """Inputs (positions, groups, kernel)."""
        inputs = inputs.float()
        self.count += len(inputs)
        self.first += inputs.sum(0)
        by_group = inputs.movedim(1, 0)
        for (first, last), moment in zip(blocks(self.first.shape[1], self.group_size), self.second):
            part = by_group[:, :, first:last]
            moment.baddbmm_(part.mT, part)

    @property
    def mean(self) -> Tensor:
        """The mean input, (groups, kernel) in float32."""
        return (self.first / max(self.count, 1)).float()


def blocks(length: int, group_size: int) -> list[tuple[int, int]]:
    """The ranges of a kernel that are compensated apart; only whole groups share one."""
    step = max(BLOCK // group_size, 1) * group_size
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def moment_bytes(layer: nn.Linear | nn.Conv2d, group_size: int) -> int:
    """Bytes that the second moments of a layer take."""
    sizes = [last - first for first, last in blocks(layer.weight[0].numel(), group_size)]
    return 4 * _groups(layer) * sum(size * size for size in sizes)


def compensate(
    weight: Tensor, moments: Moments, bits: int, *, act_order: bool = False, layer: str = ""
) -> tuple[Tensor, Tensor]:
    """Integers int8 (out, kernel) and FP16 scales (out, groups) of a weight (out, ...), by its inputs' moments.

    A group's scale has the least squared error, each input weighed by its mean square, on the weights as they are when
    its turn comes. With `act_order` the columns of the largest inputs come first, on scales chosen before. Raises
    InputError naming the layer where no input came or one was not finite, ArithmeticError where H cannot be factored.
    """
    if moments.count == 0:
        raise InputError(f"layer {layer!r}: no calibration input reached it; round it to nearest or leave it out")
    rows = weight.detach().flatten(1)
    groups = len(moments.first)
    made: list[tuple[Tensor, Tensor]] = []
    for (first, last), second in zip(blocks(rows.shape[1], moments.group_size), moments.second):
        part = rows[:, first:last].float().unflatten(0, (groups, -1))
        solved = [
            _compensate(part[g], second[g] / moments.count, bits, moments.group_size, act_order, layer)
            for g in range(groups)
        ]
        made.append((torch.cat([q for q, _ in solved]), torch.cat([s for _, s in solved])))
    return torch.cat([q for q, _ in made], 1), torch.cat([s for _, s in made], 1)


def mean_error(lost: Tensor, moments: Moments) -> Tensor:
    """What a weight that lost `lost` (out, ...) takes from the mean of each output channel, (out,) in float32."""
    rows = lost.flatten(1).unflatten(0, (len(moments.first), -1))
    return torch.einsum("gok,gk->go", rows, moments.mean).flatten()


def output_error(weight: Tensor, rounded: Tensor, moments: Moments) -> float:
    """The sum of squares of a layer's output error, over that of its output without bias; blocks count apart."""
    groups, noise, signal = len(moments.first), 0.0, 0.0

    def power(rows: Tensor, second: Tensor) -> float:
        rows = rows.detach().float().unflatten(0, (groups, -1))
        return float((torch.bmm(rows, second) * rows).sum(dtype=torch.float64))

    for (first, last), second in zip(blocks(moments.first.shape[1], moments.group_size), moments.second):
        signal += power(weight.flatten(1)[:, first:last], second)
        noise += power((weight - rounded).flatten(1)[:, first:last], second)
    return noise / signal if signal else 0.0


def _compensate(
    weight: Tensor, second: Tensor, bits: int, group_size: int, act_order: bool, layer: str
) -> tuple[Tensor, Tensor]:
    """The same for one block of one group's kernels: weight (out, kernel), second (kernel, kernel)."""
    power = second.diagonal().clone()
    if not bool(torch.isfinite(power).all()):
        raise InputError(f"layer {layer!r}: a calibration input was not finite; check the model on these samples")
    if bool((power == 0).all()):
        power.fill_(1)  # nothing was ever fed in: every direction counts the same
    power += DAMPING * power.mean()
    with one_thread():
        scale = choose_scales(weight, bits, group_size, "mse", layer, power)
    order = power.argsort(descending=True) if act_order else torch.arange(len(power), device=power.device)
    spread = _spread(second[order][:, order] if act_order else second)
    columns = weight[:, order].T.contiguous()  # a column of the weight is a row here, whose elements lie together
    integers = torch.empty_like(columns, dtype=torch.int8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    group_of = (order // group_size).tolist()
    steps = scale.T.float()
    for first, last in _lazy_blocks(len(columns), group_size):
        work, errors = columns[first:last], torch.empty_like(columns[first:last])
        within = spread[first:last, first:last].contiguous()
        diagonal = within.diagonal().tolist()
        for i in range(last - first):
            column, group = first + i, group_of[first + i]
            if not act_order and column % group_size == 0:
                ahead = slice(column, column + group_size)
                with one_thread():
                    fresh = choose_scales(columns[ahead].T, bits, group_size, "mse", layer, power[ahead])
                scale[:, group], steps[group] = fresh[:, 0], fresh[:, 0].float()
            s = steps[group]
            q = (work[i] / s).nan_to_num_(0, 0, 0).round_().clamp_(low, high)
            integers[column] = q
            errors[i] = (work[i] - q * s).div_(diagonal[i])
            work[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
        columns[last:].addmm_(spread[first:last, last:].T, errors, alpha=-1)
    result = torch.empty_like(integers)
    result[order] = integers
    return result.T.contiguous(), scale


def _spread(second: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped second moments."""
    eye = second.diagonal().mean()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = second.flip(0, 1)
        damped.diagonal().add_(damping * eye if float(eye) > 0 else 1.0)
        # With H = U U^T and U upper, which is Cholesky from the last row up, the factor of the inverse is U^-1.
        factor, bad = torch.linalg.cholesky_ex(damped)
        del damped
        if int(bad) == 0:
            upper = factor.flip(0, 1)
            return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
    raise ArithmeticError("the second moments of its inputs cannot be factored")


def _lazy_blocks(length: int, group_size: int) -> list[tuple[int, int]]:
    """Ranges of columns, about 128 each, that cut no group of up to 128; where a larger group begins, one begins."""
    if group_size <= _LAZY:
        step = _LAZY // group_size * group_size
        return [(first, min(first + step, length)) for first in range(0, length, step)]
    found = []
    for start in range(0, length, group_size):
        end = min(start + group_size, length)
        found += [(first, min(first + _LAZY, end)) for first in range(start, end, _LAZY)]
    return found


def _groups(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1
