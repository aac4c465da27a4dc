"""What every test shares: a fixed seed, and the published boards where somebody has them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same random numbers, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def deeppcb() -> Path:
    """The folder of DeepPCB as published (the one that holds PCBData/), named by FITKIT_DEEPPCB."""
    folder = os.environ.get("FITKIT_DEEPPCB")
    if not folder:
        pytest.skip("FITKIT_DEEPPCB does not name a folder with DeepPCB")
    assert Path(folder, "PCBData").is_dir(), f"FITKIT_DEEPPCB={folder}: no PCBData/ in it"
    return Path(folder)
