"""The cache: a folder for each content, and an artifact of shipped weights that is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import core.shipped
from core.cache import cache_folder
from core.export import Artifact, export
from core.kit import InputError
from core.shipped import shipped_artifact
from tests.core.toy import ToyKit


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_for_each_content(tmp_path: Path, home: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    place = cache_folder("set", [one, two])
    assert place.parent == home and place.name.startswith("set-") and home.is_dir() and not place.exists()
    assert cache_folder("set", [one, two]) == place, "the same for the same content"
    assert cache_folder("other", [one, two]) != place
    assert cache_folder("set", [two, one]) != place and cache_folder("set", [one]) != place
    two.write_text("c")
    assert cache_folder("set", [one, two]) != place


def test_the_name_is_the_hash_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("abc")  # FIPS 180-4, example 1: ba7816bf 8f01cfea ...
    assert cache_folder("set", [tmp_path / "file"]).name == "set-ba7816bf8f01"


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FITKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("set").parent == tmp_path / "xdg" / "fitkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("set").parent == tmp_path / "home" / ".cache" / "fitkit"


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("FITKIT_CACHE", str(place))
        with pytest.raises(InputError, match=rf"{place}: cannot be made \(.*\); set FITKIT_CACHE to a folder"):
            cache_folder("set")


class Shipped(ToyKit):
    """Ships FP32 only, for one runtime: an export takes a moment then."""

    def shipped(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"fp32": self.model()}, {"threshold": 7}


class Stopped(BaseException):
    """As a kill in the middle."""


def test_shipped_weights_are_exported_once_and_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports: list[Path] = []

    def export_one(models: Any, kit: Any, target: str, out: Path, meta: Any) -> Artifact:
        exports.append(out)
        return export(models, kit.exports(), target, out, kit=kit.name, meta=meta, runtimes=["onnxruntime"])

    def stop(*given: Any, **named: Any) -> Any:
        raise Stopped

    monkeypatch.setattr(core.shipped, "export_kit", export_one)
    monkeypatch.setattr(core.shipped, "SECONDS", 0.05)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(core.shipped, "bench", stop)
        shipped_artifact(Shipped())
    assert list(home.iterdir()) == [], "an artifact whose fastest variant was not chosen is not kept"
    made = shipped_artifact(Shipped())
    assert made.meta == {"threshold": 7} and made.chosen == "fp32-onnxruntime"
    assert [made.folder] == list(home.iterdir()) and len(exports) == 2
    assert shipped_artifact(Shipped()).sha256 == made.sha256 and len(exports) == 2, "kept"
    file = made.folder / made.variant().files["net"]
    file.write_bytes(file.read_bytes() + b" ")
    again = shipped_artifact(Shipped())
    assert len(exports) == 3 and Artifact.open(again.folder).sha256 == again.sha256, "a damaged one is made anew"
