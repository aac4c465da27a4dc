"""INT4 Stable Diffusion for phones; `KIT` is what `fitkit` runs."""

from __future__ import annotations

from kits.mobile_diffusion.kit import MobileDiffusion

KIT = MobileDiffusion()
