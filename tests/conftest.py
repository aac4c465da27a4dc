"""What every test shares: a fixed seed, a cache of its own, and the published boards where somebody has them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated sets and exports of this session, made anew by the code under test and kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def deeppcb() -> Path:
    """The folder of DeepPCB as published (the one that holds PCBData/), named by FITKIT_DEEPPCB."""
    folder = os.environ.get("FITKIT_DEEPPCB")
    if not folder:
        pytest.skip("FITKIT_DEEPPCB does not name a folder with DeepPCB")
    assert Path(folder, "PCBData").is_dir(), f"FITKIT_DEEPPCB={folder}: no PCBData/ in it"
    return Path(folder)
