"""Response losses: the student's outputs against the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

from core.kit import InputError

KINDS = ("logits", "logits-last", "sigmoid", "regression", "l1", "none")


def softened_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int = 1) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) over the classes on `dim`, mean over the rest.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015). T^2 keeps the size
    of the gradient when T changes. Logits of any shape, the same for both; a scalar.
    """
    log_p = F.log_softmax(teacher / temperature, dim)
    log_q = F.log_softmax(student / temperature, dim)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def softened_binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between Bernoulli distributions of sigmoid(logit / T), mean over all elements.

    The form of `softened_kl` for outputs with one sigmoid a class, as dense detectors have them.
    """
    s, t = student / temperature, teacher / temperature
    yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (yes + no).mean()


def response_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss of one output by its kind.

    "logits": classes on axis 1; "logits-last": on the last axis; "sigmoid": one sigmoid an element;
    "regression": mean squared error; "l1": mean absolute error. Raises InputError when the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"Distill.outputs: the student gives {tuple(student.shape)} where the teacher gives "
            f"{tuple(teacher.shape)}; use 'none' for this output, or a teacher with the same outputs"
        )
    losses: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: softened_kl(student, teacher, temperature),
        "logits-last": lambda: softened_kl(student, teacher, temperature, -1),
        "sigmoid": lambda: softened_binary_kl(student, teacher, temperature),
        "regression": lambda: F.mse_loss(student, teacher),
        "l1": lambda: F.l1_loss(student, teacher),
    }
    return losses[kind]()


def flat_outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of a network's result, in order, whatever they are nested in."""
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def responses_loss(kinds: str | tuple[str, ...], student: Any, teacher: Any, temperature: float) -> Tensor:
    """The sum of the losses of all outputs; one kind serves for all, a tuple has one for each output.

    Raises InputError when the numbers of outputs and kinds do not agree.
    """
    ours, theirs = flat_outputs(student), flat_outputs(teacher)
    each = (kinds,) * len(ours) if isinstance(kinds, str) else kinds
    if not len(ours) == len(theirs) == len(each):
        raise InputError(
            f"Distill.outputs: {len(each)} kinds for {len(ours)} outputs of the student and {len(theirs)} of the "
            f"teacher; name one kind for every output ('none' leaves one out)"
        )
    terms = [response_loss(k, s, t, temperature) for k, s, t in zip(each, ours, theirs, strict=True) if k != "none"]
    return sum(terms, start=ours[0].new_zeros(()))
