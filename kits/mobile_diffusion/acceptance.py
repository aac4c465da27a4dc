"""What a customer accepts: alignment with prompts of held-out compositions, what compression costs, and the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.figures import Gate
from core.progress import progress
from kits.mobile_diffusion.alignment import judge_image, summary
from kits.mobile_diffusion.data.captions import parse
from kits.mobile_diffusion.data.default import Prompt
from kits.mobile_diffusion.generate import bar_steps, generate
from kits.mobile_diffusion.model.pipeline import Diffusion

MB = 1e6
PHONE = "snapdragon-8-gen-2"
BATCH = 32
"""Pictures that are made together while scoring; alone or together they are the same to a level of 255."""

GATES: tuple[Gate, ...] = (
    Gate("alignment of the original", "alignment", ">= 85", "%", stage="original"),
    Gate("loss of alignment", "accuracy_loss", "<= 5", "points"),
    Gate("speed against the original", "speedup", ">= 6", "x", device="this-host"),
    Gate("bytes against the original in FP32", "size_ratio", "<= 0.125"),
    Gate("SD-1.5-class student, all parts on disk", "sd15_student_size", "<= 500", "MB"),
    Gate("SD-1.5 with all its blocks at INT4, on disk", "sd15_size", "<= 600", "MB"),
    Gate("peak memory at 512x512, SD-1.5-class student", "sd15_student_peak", "<= 1.5", "GB", device="this-host"),
    Gate("packing SD-1.5's UNet", "sd15_pack_seconds", "<= 180", "s", device="this-host"),
    Gate("memory of packing against the FP16 checkpoint", "sd15_pack_memory", "<= 1.3", "x", device="this-host"),
    Gate("seconds for a picture on the phone", "picture_seconds", "<= 15.2", "s", device=PHONE),
    Gate("power on the phone", "picture_power", "<= 3.1", "W", device=PHONE),
)  # fmt: skip


def steps_of(model: Diffusion, prompts: Sequence[Any]) -> int:
    """Steps of a picture: the model's own, or those of a short trial where the model can take fewer."""
    how = model.sampling
    most = min((p.steps for p in prompts if p.steps is not None), default=how.steps)
    return how.steps if how.fixed else min(most, how.steps)


def pictures(model: Diffusion, prompts: Sequence[Prompt], label: str = "drawing") -> list[NDArray[np.uint8]]:
    """A picture (H, W, 3) for every prompt, with the guidance that the model comes with; see `steps_of`."""
    steps = steps_of(model, prompts)
    with progress(label, bar_steps(model, len(prompts), steps, BATCH)) as bar:
        return generate(
            model,
            [p.text for p in prompts],
            seeds=[p.seed for p in prompts],
            steps=steps,
            guidance=model.sampling.guidance,
            batch=BATCH,
            on_step=lambda step, count: bar.advance(),
        )


def align(prompts: Sequence[Prompt], drawn: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    """Figures of alignment: {name: (rate in %, "%")}, and {name: [low, high] in %} of 95 % under "intervals".

    "alignment" is the share of pictures in which every demand is met, "alignment_<demand>" that of each demand among
    the prompts that make it, "alignment_<kind>" the share of whole pictures among each kind of prompt.
    """
    verdicts = [judge_image(picture, parse(p.text)) for p, picture in zip(prompts, drawn, strict=True)]
    rates = summary(verdicts, [p.kind for p in prompts])
    rates = {"all": rates["all"], **rates}  # first, as the main score
    names = {n: "alignment" if n == "all" else f"alignment_{n.replace('kind/', 'prompts_')}" for n in rates}
    return {
        "values": {names[n]: (100 * r.value, "%") for n, r in rates.items()},
        "intervals": {names[n]: [100 * bound for bound in r.interval] for n, r in rates.items()},
        "counts": {names[n]: [r.met, r.asked] for n, r in rates.items()},
        "verdicts": verdicts,
    }
