"""From folders to pictures: scenes with faults, the results file, and boxes cut off at a picture's border."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import CLASSES
from kits.bev_perception.data.geometry import about_z, pinhole
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.metrics.nds import score
from kits.bev_perception.metrics.results import read_results
from kits.bev_perception.metrics.truth import truth_of
from kits.bev_perception.model.boxes import encode
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.pictures import scene_strip
from kits.bev_perception.pictures.cameras import cut_area, cut_lines, panel, planes
from kits.bev_perception.pictures.film import write_gif, write_mp4
from kits.bev_perception.pictures.frame import HEIGHT, WIDTH, frame_picture, png
from kits.bev_perception.pictures.overhead import REACH, overhead
from kits.bev_perception.pictures.paper import PALETTE, Paper, shortened, width_of
from kits.bev_perception.predict import add_arguments, check, predict
from kits.bev_perception.scenes import network_images, predictions, watch
from tests.kits.bev_folders import Tables, small_folder, token
from tests.kits.bev_models import MICRO

FRONT = "samples/CAM_FRONT/0_1.jpg"


class Oracle(nn.Module):
    """Says the truth of the keyframes in their order, and counts what it was given."""

    def __init__(self, samples: Sequence[Keyframe], config: Config = MICRO) -> None:
        super().__init__()
        self.config, self.samples = config, list(samples)
        self.had_prev: list[float] = []
        self.masks: list[list[float]] = []

    def forward(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev: Tensor, has_prev: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        truth = self.samples[len(self.had_prev)].truth(self.config.pc_range)
        self.had_prev.append(float(has_prev))
        self.masks.append(mask[0].tolist())
        assert images.isfinite().all() and lidar2img.isfinite().all() and can_bus.isfinite().all()
        count = max(len(truth.labels), 1)
        scores, codes = torch.full((1, count, len(CLASSES)), -12.0), torch.zeros(1, count, 10)
        if len(truth.labels):
            codes[0] = encode(torch.nan_to_num(truth.boxes))
            scores[0, torch.arange(count), truth.labels] = 6.0
        return scores, codes, torch.zeros(1, self.config.bev_h * self.config.bev_w, self.config.embed_dims)


def frames_of(root: Path) -> list[Keyframe]:
    data = NuScenes(root)
    return keyframes(data, list(data.scenes.values()))


def sure(boxes: Boxes) -> int:
    """How many boxes the oracle meant."""
    return int((boxes.scores > 0.9).sum())


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_truth_as_prediction_scores_everything_and_leaves_every_file(tmp_path: Path) -> None:
    world = small_folder(tmp_path / "in", samples=2)
    samples, tmp_path = frames_of(world), tmp_path / "out"
    told = predict(Oracle(samples), None, [str(world)], tmp_path, options())
    found, meta = read_results(tmp_path / "results_nusc.json", [s.token for s in samples])
    assert meta["use_camera"] and [sure(boxes) for boxes in found.values()] == [5, 5]
    data = NuScenes(world)
    got = score(truth_of(data, list(found)), found)
    # Classes without any truth count as missed, so the mean is over those that are there. The oracle's logits of -12
    # are boxes too: they take a little of the precision at the last of the 90 steps of recall.
    assert got.over(got.present).mean_ap == pytest.approx(1.0, abs=1 / 90)
    for name in got.present:
        errors = [v for v in got.errors[name].values() if not np.isnan(v)]
        assert max(errors) < 1e-3, (name, got.errors[name])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["scenes"]) == 1 and len(summary["scenes"][0]["frames"]) == 2
    frame = summary["scenes"][0]["frames"][1]
    assert sum(frame["shown"].values()) > 3 and not frame["notes"] and frame["seconds"] > 0
    picture = cv2.imread(str(tmp_path / frame["picture"]))
    assert picture is not None and picture.shape == (HEIGHT, WIDTH, 3)
    with Image.open(tmp_path / summary["scenes"][0]["gif"]) as film:
        assert film.n_frames == 2 and film.info["duration"] == 500
    assert isinstance(json.loads((tmp_path / "findings.json").read_text()), list)
    assert str(tmp_path) in told and "2 keyframe(s) of 1 scene(s)" in told


def test_an_untrained_network_goes_through(tmp_path: Path) -> None:
    world = small_folder(tmp_path / "in", samples=2)
    tmp_path = tmp_path / "out"
    module = BEVFormer(MICRO).train()
    told = predict(module, None, [str(world)], tmp_path, options("--no-pictures", "--limit", "1"))
    assert "1 keyframe(s)" in told and module.training and module.img_backbone.training
    found, _ = read_results(tmp_path / "results_nusc.json")
    assert len(found) == 1 and not (tmp_path / "frames").exists() and not list(tmp_path.glob("*.gif"))
    boxes = next(iter(found.values()))
    assert len(boxes) and (boxes.attributes >= 0).any()


@pytest.mark.parametrize("fault", ["missing", "truncated", "wrong size"])
def test_a_broken_camera_is_told_and_masked(tmp_path: Path, fault: str) -> None:
    root = small_folder(tmp_path / "in", samples=3)
    file = root / FRONT
    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:600])
    else:
        cv2.imwrite(str(file), np.zeros((90, 100, 3), np.uint8))
    samples = frames_of(root)
    module = Oracle(samples)
    seen = list(watch(module, samples))
    assert [bool(s.missing) for s in seen] == [False, True, False]
    assert module.masks == [[1] * 6, [0, 1, 1, 1, 1, 1], [1] * 6]
    assert module.had_prev == [0, 1, 1]  # the memory lives on
    assert sure(seen[1].boxes) == sure(seen[0].boxes) == 5 and "CAM_FRONT" in seen[1].notes[0]
    assert frame_picture(seen[1]).shape == (HEIGHT, WIDTH, 3)
    told = predict(Oracle(samples), None, [str(root)], tmp_path / "out", options("--no-pictures"))
    assert "camera CAM_FRONT is missing" in told and "checker: 1 error(s)" in told
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert [f["token"] for f in found if f["severity"] == "error"] == [token("CAM_FRONT", 0, 1)]


def test_a_frame_without_any_camera_is_left_out_and_the_memory_goes_on(tmp_path: Path) -> None:
    root = small_folder(tmp_path / "in", samples=3)
    for file in root.glob("samples/CAM_*/0_1.jpg"):
        file.unlink()
    samples = frames_of(root)
    module = Oracle([samples[0], samples[2]])
    seen = list(watch(module, samples))
    assert [s.left_out for s in seen] == [False, True, False] and module.had_prev == [0, 1]
    assert not len(seen[1].boxes) and "no camera came" in seen[1].notes[0]
    assert any("dropped" in note for note in seen[2].notes)
    assert len(predictions(seen)[samples[1].token]) == 0
    module = Oracle([samples[0], samples[2]])
    predict(module, None, [str(root)], tmp_path / "out", options())
    assert (tmp_path / "out" / "frames" / "small-0" / "001.png").is_file()


def test_nan_in_lidar_and_a_missing_sweep_do_not_matter(tmp_path: Path) -> None:
    root = small_folder(tmp_path / "in", samples=2)
    points = root / "samples" / "LIDAR_TOP" / "0_0.pcd.bin"
    np.full((50, 5), np.nan, "<f4").tofile(points)
    (root / "samples" / "LIDAR_TOP" / "0_2.pcd.bin").unlink()
    samples = frames_of(root)
    seen = list(watch(Oracle(samples), samples))
    assert [sure(s.boxes) for s in seen] == [5, 5]
    for each in seen:
        assert frame_picture(each).shape == (HEIGHT, WIDTH, 3)


def test_an_empty_scene_and_a_sample_without_boxes(tmp_path: Path) -> None:
    def mend(t: Tables) -> None:
        t["scene"][1].update(first_sample_token="", last_sample_token="", nbr_samples=0)
        bare = token("sample", 0, 1)
        t["sample_annotation"] = [a for a in t["sample_annotation"] if a["sample_token"] != bare]
        for a in t["sample_annotation"]:
            a.update(prev="", next="")

    root = small_folder(tmp_path / "in", mend, samples=2, scenes=2)
    samples = frames_of(root)
    told = predict(Oracle(samples), None, [str(root)], tmp_path / "out", options())
    assert "small-1: no keyframe in it" in told and "small-0, day: 2 frames" in told
    found, _ = read_results(tmp_path / "out" / "results_nusc.json")
    assert [sure(found[s.token]) for s in samples] == [5, 0]
    with pytest.raises(InputError, match="no scene with a keyframe"):
        predict(Oracle(samples), None, [str(root)], tmp_path / "none", options("--scene", "small-1"))


def test_dangling_tokens(tmp_path: Path) -> None:
    def boxes(t: Tables) -> None:
        t["sample_annotation"][0]["instance_token"] = "gone"

    def pose(t: Tables) -> None:
        row = next(r for r in t["sample_data"] if r["token"] == token("LIDAR_TOP", 0, 6))
        row["ego_pose_token"] = "gone"

    def mount(t: Tables) -> None:
        t["sample_data"][0]["calibrated_sensor_token"] = "gone"

    root = small_folder(tmp_path / "boxes", boxes, samples=1)
    module = BEVFormer(MICRO).eval()
    told = predict(module, None, [str(root)], tmp_path / "a", options())  # detected all the same, drawn without truth
    assert "checker: 1 error(s)" in told

    root = small_folder(tmp_path / "pose", pose, samples=4)
    seen = list(watch(module, frames_of(root)))
    assert [s.left_out for s in seen] == [False] * 3 + [True] and "'gone' is not in ego_pose.json" in seen[3].notes[0]
    assert frame_picture(seen[3]).shape == (HEIGHT, WIDTH, 3)

    root = small_folder(tmp_path / "mount", mount, samples=1)
    with pytest.raises(InputError, match="gone.*calibrated_sensor.json"):
        predict(module, None, [str(root)], tmp_path / "c", options())
    assert json.loads((tmp_path / "c" / "findings.json").read_text())[0]["table"] == "sample_data"


def test_a_network_that_breaks_is_told(tmp_path: Path) -> None:
    class Broken(Oracle):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scores, codes, bev = super().forward(*inputs)
            codes[0, 0, 2], scores[0, 1, 0] = 200.0, float("nan")  # a width that overflows, a score that is none
            return scores, codes, bev * float("nan")

    samples = frames_of(small_folder(tmp_path, samples=2))
    module = Broken(samples)
    seen = list(watch(module, samples))
    assert module.had_prev == [0, 0]
    for each in seen:
        assert "2 boxes of the network were not finite" in " ".join(each.notes)
        assert (each.boxes.scores > 0.9).sum() == 3 and np.isfinite(each.boxes.sizes).all()
    assert "NaN" in " ".join(seen[1].notes)


def test_images_are_in_the_order_of_the_config(tmp_path: Path) -> None:
    views = frames_of(small_folder(tmp_path, samples=1))[0].views(MICRO.images)
    plain = replace(MICRO, images=replace(MICRO.images, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    rgb = network_images(views, plain)
    bgr = network_images(views, replace(plain, images=replace(plain.images, channels="bgr")))
    assert torch.equal(rgb.flip(2), bgr) and not torch.equal(rgb, bgr)
    assert rgb.shape == (1, 6, 3, MICRO.images.height, MICRO.images.width)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    root = small_folder(tmp_path / "in", samples=1)
    for inputs, said in (
        ([str(tmp_path / "gone")], "no such folder"),
        ([str(tmp_path)], "no folder with scene.json"),
        ([str(root), f"{root}/../in"], "the same folder"),
    ):
        with pytest.raises(InputError, match=said):
            check(inputs)
    module = BEVFormer(MICRO)
    for given, said in (
        (["--scene", "nowhere"], "'nowhere': not in the folders; there are small-0"),
        (["--limit", "0"], "at least 1"),
        (["--threshold", "2"], "within 0 and 1"),
    ):
        with pytest.raises(InputError, match=said):
            predict(module, None, [str(root)], tmp_path / "out", options(*given))
    (root / "v1.0-test" / "map.json").unlink()
    with pytest.raises(InputError, match=r"map\.json: missing"):
        check([str(root)])
    with pytest.raises(InputError, match="no config"):
        next(watch(nn.Identity(), []))


def test_a_scenes_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    names = ["..", "S", "s", "a b"]

    def mend(t: Tables) -> None:
        for row, name in zip(t["scene"], names):
            row["name"] = name

    root = small_folder(tmp_path / "in", mend, samples=1, scenes=4)
    predict(Oracle(frames_of(root)), None, [str(root)], tmp_path / "out", options())
    assert sorted(p.name for p in (tmp_path / "out" / "frames").iterdir()) == ["S", "a_b", "s_2", "scene"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(s["scene"], s["gif"]) for s in summary["scenes"]] == list(
        zip(names, ["scene.gif", "S.gif", "s_2.gif", "a_b.gif"])
    )


def test_lines_and_areas_end_at_the_border_and_before_the_camera() -> None:
    sight = planes(100, 50)
    project = pinhole([[50.0, 0, 50], [0, 50, 25], [0, 0, 1]])[:3, :3]
    # Along the optical axis from behind the camera, one that is behind, and one that crosses the left border.
    lines = np.array([[(0, 0, -5), (0, 0, 10)], [(0, 0, -5), (1, 0, -1)], [(-20, 0, 10), (0, 0, 10)]], float)
    found = cut_lines(lines @ project.T, sight)
    np.testing.assert_allclose(found, [[(50, 25), (50, 25)], [(-8, 25), (50, 25)]], atol=1e-9)
    square = np.array([(-1, -1, 2), (1, -1, 2), (1, 1, 2), (-1, 1, 2)], float)
    whole = cut_area(square @ project.T, sight)
    np.testing.assert_allclose(sorted(whole.tolist()), [[25, 0], [25, 50], [75, 0], [75, 50]])
    road = np.array([(-1, 1, -5), (1, 1, -5), (1, 1, 40), (-1, 1, 40)], float)  # runs below the camera
    seen = cut_area(road @ project.T, sight)
    assert len(seen) >= 4 and seen.min() >= -8 - 1e-9 and seen[:, 1].max() <= 58 + 1e-9
    assert not len(cut_area((square * [1, 1, -1]) @ project.T, sight))


def test_a_box_is_drawn_where_it_is() -> None:
    boxes = Boxes.of([[0.0, 20.0, 0.0]], [[2.0, 4.0, 2.0]], about_z([np.pi / 2]), [[0, 0]], [0], [0.9])
    camera = pinhole([[240.0, 0, 240], [0, 240, 135], [0, 0, 1]])  # of a camera at the LiDAR that looks along its y
    camera = camera @ np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    paper = Paper(480, 270)
    panel(paper, (0, 0, 480, 270), "front", np.zeros((270, 480, 3), np.uint8), camera, boxes, Boxes.none())
    strong = (np.abs(paper.pixels.astype(int) - PALETTE[0]) < 60).all(axis=2)
    strong[:125] = False  # its tag is above
    rows, columns = np.nonzero(strong)
    # The near end is 18 m away: +-1 m are +-13.3 px about the middle.
    assert (columns.min(), columns.max(), rows.max()) == pytest.approx((226.7, 253.3, 148.3), abs=2)
    paper = Paper(540, 540)
    overhead(paper, (0, 0, 540), np.zeros((0, 5), np.float32), None, boxes, Boxes.none())
    rows, columns = np.nonzero((np.abs(paper.pixels.astype(int) - PALETTE[0]) < 60).all(axis=2))
    scale = 540 / (2 * REACH)
    assert columns.mean() == pytest.approx(270, abs=1)
    assert rows.max() == pytest.approx(270 - 18 * scale, abs=2)
    assert rows.min() == pytest.approx(270 - 22 * scale - 5, abs=2)  # with the line that points ahead


def test_films_keep_their_frames(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        picture = np.full((120, 200, 3), 40 + 60 * i, np.uint8)
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(png(picture))
    assert write_gif(tmp_path / "film.gif", paths, 0.25) == 1200
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 250 and film.size == (200, 120)
        film.seek(2)
        assert np.abs(np.array(film.convert("RGB")).astype(int) - 160).max() <= 8
    with pytest.raises(InputError, match="no picture"):
        write_gif(tmp_path / "none.gif", [], 0.5)
    if write_mp4(tmp_path / "film.mp4", paths, 0.25):
        video = cv2.VideoCapture(str(tmp_path / "film.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
        video.release()
    else:
        assert not (tmp_path / "film.mp4").exists()
    assert not list(tmp_path.glob("*.new*"))


def test_pictures_for_the_report(tmp_path: Path) -> None:
    samples = frames_of(small_folder(tmp_path, samples=2, scenes=3))
    found = scene_strip(BEVFormer(MICRO).eval(), MICRO, samples, shown=2)
    assert [p["title"].split(":")[0] for p in found] == ["small-0, day, frame 2", "small-1, night, frame 2"]
    for each in found:
        picture = cv2.imdecode(np.frombuffer(each["png"], np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None and picture.shape[1] == 1500


def test_words_are_shortened_to_their_room() -> None:
    words = "a note that is much too long for the room it has"
    assert width_of(shortened(words, 14, 120), 14) <= 120 and shortened(words, 14, 120).endswith("...")
    assert shortened("short", 14, 120) == "short"
