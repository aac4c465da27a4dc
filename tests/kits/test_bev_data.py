"""The loader on small written folders, on real ones, and its geometry against closed forms and SciPy."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.can_bus import CanBus
from kits.bev_perception.data.classes import CAMERAS, CLASSES, LABELS
from kits.bev_perception.data.geometry import (
    Fit,
    Pose,
    about_z,
    corners,
    inside_box,
    multiply,
    project,
    quaternion,
    rotation_matrix,
    yaw,
)
from kits.bev_perception.data.nuscenes import NuScenes
from tests.kits.bev_folders import DATA, SPEED, Tables, real_folder, small_folder, token

SAMPLES = [token("sample", 0, i) for i in range(4)]


def test_quaternions_agree_with_scipy() -> None:
    q = np.random.default_rng(0).normal(size=(200, 4))
    scipy = Rotation.from_quat(q, scalar_first=True)
    np.testing.assert_allclose(rotation_matrix(q), scipy.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(
        quaternion(rotation_matrix(q)), scipy.as_quat(canonical=True, scalar_first=True), atol=1e-12
    )
    both = (scipy[:100] * scipy[100:]).as_matrix()
    np.testing.assert_allclose(rotation_matrix(multiply(q[:100], q[100:])), both, atol=1e-12)
    np.testing.assert_allclose(yaw(q), np.arctan2(scipy.as_matrix()[:, 1, 0], scipy.as_matrix()[:, 0, 0]), atol=1e-12)
    np.testing.assert_allclose(yaw(about_z([-3.0, 0.0, 2.0])), [-3.0, 0.0, 2.0], atol=1e-12)
    half_turns = np.eye(4)[1:]  # w = 0, where the plain formula divides by zero
    np.testing.assert_allclose(np.abs(quaternion(rotation_matrix(half_turns))), half_turns, atol=1e-12)


def test_poses_go_there_and_back() -> None:
    g = np.random.default_rng(1)
    a, b = (Pose.of(g.normal(size=3).tolist(), g.normal(size=4).tolist()) for _ in range(2))
    points = g.normal(size=(5, 3))
    np.testing.assert_allclose((a @ b).apply(points), a.apply(b.apply(points)), atol=1e-12)
    np.testing.assert_allclose((a @ b).matrix, a.matrix @ b.matrix, atol=1e-12)
    np.testing.assert_allclose(a.inverse.apply(a.apply(points)), points, atol=1e-12)


def test_corners_and_inside() -> None:
    found = corners([[1, 2, 3]], [[2, 4, 6]], about_z([np.pi / 2]))[0]
    # The length of 4 now lies along y, the front first.
    np.testing.assert_allclose(found[0], [0, 4, 6], atol=1e-12)
    np.testing.assert_allclose(found.mean(axis=0), [1, 2, 3], atol=1e-12)
    box = np.array([1.0, 2, 3]), np.array([2.0, 4, 6]), about_z(np.pi / 2)
    assert inside_box([[1, 3.99, 3], [1, 4.01, 3], [2.01, 2, 3], [1.9, 2, 5.9]], *box).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_boxes_move_with_their_velocities_and_headings() -> None:
    boxes = Boxes.of([[1, 0, 0]], [[1, 2, 1]], about_z([0.0]), [[3, 0]], [0])
    moved = boxes.moved(Pose.of([10, 0, 0], about_z(np.pi / 2).tolist()))
    np.testing.assert_allclose(moved.centers, [[10, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(moved.velocities, [[0, 3]], atol=1e-12)
    np.testing.assert_allclose(moved.yaws, [np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(boxes.after(0.5).centers, [[2.5, 0, 0]])
    with pytest.raises(ValueError, match="2 labels"):
        Boxes.of([[1, 0, 0]], [[1, 2, 1]], about_z([0.0]), [[3, 0]], [0, 1])


def test_scenes_samples_and_sweeps(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path, scenes=2))
    assert list(data.scenes) == ["small-0", "small-1"]
    scene = data.scenes["small-0"]
    assert scene.samples == tuple(SAMPLES)
    assert (scene.night, data.scenes["small-1"].night) == (False, True)
    samples = list(data.samples(scene))
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert np.diff([s.timestamp for s in samples]).tolist() == [500_000] * 3
    chain = list(data.before(samples[3].lidar))
    assert len(chain) == 6
    assert [r.key for r in chain] == [False, True] * 3
    assert list(data.after(samples[3].lidar)) == []
    assert samples[0].recordings["CAM_FRONT"].image().shape == (180, 320, 3)


def test_sweeps_are_brought_into_the_frame_of_the_keyframe(tmp_path: Path) -> None:
    root = small_folder(tmp_path)
    data = NuScenes(root)
    sample = data.sample(SAMPLES[1])
    sweep = next(data.before(sample.lidar))
    # In the LiDAR frame y is forward: a point 10 m ahead of the older sweep is 0.25 s x SPEED nearer now.
    for recording in (sample.lidar, sweep):
        np.array([[3, 10, 0, 1, 2], [0.5, -0.5, 0, 1, 2], [np.nan] * 5], "<f4").tofile(recording.path)
    found = data.merged_points(sample, 2)
    np.testing.assert_allclose(found, [[3, 10, 0, 1, 2, 0], [3, 10 - 0.25 * SPEED, 0, 1, 2, 0.25]], atol=1e-5)
    assert len(data.merged_points(sample, 1)) == 1


def test_boxes_velocities_attributes_and_what_is_not_detected(tmp_path: Path) -> None:
    def stroller(tables: Tables) -> None:
        tables["category"].append({"token": "s", "name": "human.pedestrian.stroller", "description": ""})
        tables["instance"][2]["category_token"] = "s"

    data = NuScenes(small_folder(tmp_path, stroller))
    found = data.annotations(SAMPLES[1])
    assert [CLASSES[label] for label in found.boxes.labels] == ["car", "car", "traffic_cone", "truck"]
    np.testing.assert_allclose(found.boxes.velocities, [[5, 0], [0, 0], [0, 0], [4, 0]], atol=1e-6)
    assert found.boxes.attributes.tolist()[2] == -1
    assert found.boxes.num_pts.tolist() == [8] * 4
    assert found.instances[0] == token("instance", 0, 0)
    assert found.visibility == ("4",) * 4


def test_velocities_that_cannot_be_told(tmp_path: Path) -> None:
    def gap(tables: Tables) -> None:
        for row in tables["sample"][2:]:
            row["timestamp"] += 2_000_000
        lone = next(r for r in tables["sample_annotation"] if r["token"] == token("box1", 0, 0))
        lone["next"] = ""

    root = small_folder(tmp_path, gap)
    data = NuScenes(root)
    assert np.isnan(data.velocity(token("box1", 0, 0))).all()  # alone
    # 0.5 s back and 2.5 s on: 3 s around an annotation are still taken, and the thing seems slow.
    np.testing.assert_allclose(data.velocity(token("box0", 0, 1))[:2], [5 * 1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(data.velocity(token("box0", 0, 0))[:2], [5, 0], atol=1e-6)
    (root / "velocity.json").write_text(json.dumps({token("box1", 0, 0): [1.5, -2], token("box0", 0, 0): [9, 9]}))
    data = NuScenes(root)
    assert data.annotations(SAMPLES[0]).boxes.velocities[1].tolist() == [1.5, -2]
    assert data.annotations(SAMPLES[0]).boxes.velocities[0].tolist() != [9, 9]  # only where nothing else is known
    assert np.isnan(data.truth(SAMPLES[0]).velocities[1]).all()


def test_splits(tmp_path: Path) -> None:
    root = small_folder(tmp_path, scenes=2)
    assert NuScenes(root).splits == {"all": ("small-0", "small-1")}
    (root / "v1.0-test/splits.json").write_text(json.dumps({"val": ["small-1"], "odd": ["gone"]}))
    data = NuScenes(root)
    assert [scene.name for scene in data.split("val")] == ["small-1"]
    with pytest.raises(InputError, match="'gone' of split 'odd'"):
        data.split("odd")
    with pytest.raises(InputError, match="no split 'test'; add it to splits.json or use one of all, val, odd"):
        data.split("test")
    (root / "v1.0-test/splits.json").write_text(json.dumps({"val": "small-1"}))
    with pytest.raises(InputError, match="not a list of scene names"):
        _ = NuScenes(root).splits


def test_can_bus_from_ego_poses(tmp_path: Path) -> None:
    def turning(tables: Tables) -> None:
        """0.3 rad/s to the left, speed rising by 2 m/s2 along x."""
        begin = min(row["timestamp"] for row in tables["sample"])
        for row in tables["ego_pose"]:
            t = (row["timestamp"] - begin) * 1e-6
            row["rotation"] = about_z(-0.6 + 0.3 * t).tolist()
            row["translation"] = [SPEED * t + t * t, 0.0, 0.0]

    data = NuScenes(small_folder(tmp_path, turning))
    bus = CanBus(data)
    found = bus(data.sample(SAMPLES[2]))
    heading = -0.6 + 0.3
    level = rotation_matrix(about_z(heading)).T
    np.testing.assert_allclose(found[:3], [SPEED + 1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found[3:7], about_z(heading), atol=1e-9)
    np.testing.assert_allclose(found[7:10], level @ [2, 0, 9.81], atol=1e-6)
    np.testing.assert_allclose(found[10:13], [0, 0, 0.3], atol=1e-6)
    # Looking back: the mean speed of the quarter of a second before.
    np.testing.assert_allclose(found[13:16], level @ [SPEED + 2 - 0.25, 0, 0], atol=1e-6)
    assert found[16] == pytest.approx(heading + 2 * np.pi)
    assert found[17] == pytest.approx(np.degrees(heading) + 360)
    first = bus(data.sample(SAMPLES[0]))
    np.testing.assert_allclose(first[10:13], [0, 0, 0.3], atol=1e-6)  # at the start it looks ahead


def test_can_bus_messages(tmp_path: Path) -> None:
    root = small_folder(tmp_path)
    start = NuScenes(root).sample(SAMPLES[0]).timestamp
    messages = [
        {"accel": [i, 0, 9.8], "rotation_rate": [0, i, 0], "vel": [i, i, i], "utime": start + i * 400_000}
        for i in range(1, 4)
    ]
    (root / "can_bus").mkdir()
    file = root / "can_bus/small-0_pose.json"
    file.write_text(json.dumps(messages))
    data = NuScenes(root)
    bus = CanBus(data)
    # The first message after the sample, and the last where there is none.
    assert [bus(data.sample(t))[7] for t in SAMPLES] == [1, 2, 3, 3]
    assert bus(data.sample(SAMPLES[1]))[7:16].tolist() == [2, 0, 9.8, 0, 2, 0, 2, 2, 2]
    del messages[1]["vel"]
    file.write_text(json.dumps(messages))
    with pytest.raises(InputError, match="message 1: vel is None, expected 3 numbers"):
        CanBus(data)(data.sample(SAMPLES[0]))


def test_views_scale_and_pad_and_lidar2img_follows(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path))
    sample = data.sample(SAMPLES[1])
    views = sample.views((96, 160)).whole()
    assert views.images.shape == (6, 96, 160, 3)
    assert views.inner.tolist() == [[90, 160]] * 6
    assert not views.images[:, 90:].any()
    scaled = views.normalised((100.0, 100.0, 100.0), (50.0, 50.0, 50.0))
    assert scaled.shape == (6, 3, 96, 160)
    assert not scaled[:, :, 90:].any()
    np.testing.assert_allclose(scaled[0, :, 5, 7], (views.images[0, 5, 7] - 100.0) / 50, atol=1e-6)
    # 10 m ahead of the front camera, 1 m left of it and 0.5 m below; the camera took its image 20 ms earlier.
    ahead = np.array([-1.0, 10.0, 1.0 - 1.8])
    pixel, depth = project(ahead, views.lidar2img[0])
    assert depth == pytest.approx(10 + 0.02 * SPEED)
    np.testing.assert_allclose(pixel, (np.array([160, 90]) + 250 * np.array([-1, 0.5]) / depth) / 2, atol=1e-9)
    full, _ = project(ahead, sample.lidar2img("CAM_FRONT"))
    np.testing.assert_allclose(full, pixel * 2, atol=1e-9)
    assert np.isnan(project([0, -10, 0], views.lidar2img[0])[0]).all()


def test_fit_pads_below_or_right() -> None:
    assert Fit((1600, 900), (480, 800)).scaled == (800, 450)
    assert Fit((1920, 1080), (480, 800)).scaled == (800, 450)
    assert Fit((400, 800), (480, 800)).scaled == (240, 480)


def test_a_missing_camera_is_black_and_named(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path))
    sample = data.sample(SAMPLES[0])
    sample.recordings["CAM_BACK"].path.unlink()
    sample.recordings["CAM_FRONT_LEFT"].path.write_bytes(b"\xff\xd8 cut")
    cv2.imwrite(str(sample.recordings["CAM_BACK_LEFT"].path), np.ones((50, 50, 3), np.uint8))
    views = sample.views((96, 160))
    assert set(views.missing) == {"CAM_BACK", "CAM_FRONT_LEFT", "CAM_BACK_LEFT"}
    assert "50 x 50, the table says 320 x 180" in views.missing["CAM_BACK_LEFT"]
    for i, channel in enumerate(CAMERAS):
        assert views.images[i].any() == (channel not in views.missing)
    assert views.lidar2img[CAMERAS.index("CAM_BACK")].any()
    assert not views.normalised((9.0,) * 3, (1.0,) * 3)[CAMERAS.index("CAM_BACK")].any()
    with pytest.raises(InputError, match="CAM_FRONT_LEFT/0_0.jpg is cut off"):
        views.whole()


def test_a_camera_without_record_sees_nothing(tmp_path: Path) -> None:
    def lose(tables: Tables) -> None:
        tables["sample_data"][:] = [r for r in tables["sample_data"] if "CAM_BACK/" not in r["filename"]]

    views = NuScenes(small_folder(tmp_path, lose)).sample(SAMPLES[0]).views((96, 160))
    assert set(views.missing) == {"CAM_BACK"}
    assert not views.lidar2img[CAMERAS.index("CAM_BACK")].any()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "samples\\x.jpg", "C:x.jpg", ""])
def test_paths_stay_inside_the_folder(name: str, tmp_path: Path) -> None:
    def climb(tables: Tables) -> None:
        tables["sample_data"][0]["filename"] = name

    with pytest.raises(InputError, match="is refused"):
        NuScenes(small_folder(tmp_path, climb)).sample(SAMPLES[0])


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = small_folder(tmp_path / "data")
    file = root / "samples/CAM_FRONT/0_0.jpg"
    file.unlink()
    file.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(InputError, match="links out of its folder"):
        NuScenes(root).sample(SAMPLES[0])


def test_broken_references_name_both_ends(tmp_path: Path) -> None:
    def dangle(tables: Tables) -> None:
        tables["sample"][1]["next"] = "gone"

    data = NuScenes(small_folder(tmp_path, dangle))
    with pytest.raises(InputError, match="token 'gone' is not in sample.json"):
        _ = data.scenes

    def circle(tables: Tables) -> None:
        tables["sample"][3]["next"] = tables["sample"][0]["token"]

    with pytest.raises(InputError, match="turn back"):
        _ = NuScenes(small_folder(tmp_path / "b", circle)).scenes
    with pytest.raises(InputError, match="'nowhere' is not in sample.json"):
        NuScenes(small_folder(tmp_path / "c")).sample("nowhere")


def test_an_empty_scene_and_a_sample_without_boxes(tmp_path: Path) -> None:
    def clear(tables: Tables) -> None:
        tables["sample_annotation"].clear()
        tables["instance"].clear()
        tables["scene"].append(tables["scene"][0] | {"token": "e", "name": "empty", "first_sample_token": ""})

    data = NuScenes(small_folder(tmp_path, clear))
    assert list(data.samples(data.scenes["empty"])) == []
    assert len(data.annotations(SAMPLES[0]).boxes) == 0
    assert data.truth(SAMPLES[0]).centers.shape == (0, 3)


def test_the_real_keyframe() -> None:
    data = NuScenes(real_folder("nuscenes_keyframe"))
    assert data.splits["mini_train"] == ("scene-0061",)
    assert data.splits["mini_val"] == ()
    sample = data.sample(data.split("all")[0].samples[0])
    found = data.annotations(sample.token).boxes
    counts = {name: int((found.labels == LABELS[name]).sum()) for name in CLASSES}
    assert counts == {
        "car": 8, "truck": 2, "construction_vehicle": 1, "bus": 1, "trailer": 0,
        "barrier": 22, "motorcycle": 0, "bicycle": 1, "pedestrian": 30, "traffic_cone": 3,
    }  # fmt: skip
    assert np.isnan(data.truth(sample.token).velocities).all()
    assert np.isfinite(found.velocities).all(axis=1).sum() > 60
    assert len(sample.lidar.points()) == 34_688
    # The boxes hold the points that the table counts: poses, mounting and axes agree.
    local = found.moved(sample.pose.inverse)
    points = sample.lidar.points()[:, :3]
    held = [inside_box(points, c, s, r).sum() for c, s, r in zip(local.centers, local.sizes, local.rotations)]
    assert (np.array(held) > 0)[found.num_pts > 0].mean() > 0.95
    assert not sample.views((480, 800)).missing


def test_lidar2img_is_that_of_the_official_preparation() -> None:
    """The reference holds the matrices of this very keyframe, as mmdetection3d made them, for some image size."""
    data = NuScenes(real_folder("nuscenes_keyframe"))
    sample = data.sample(next(iter(data.tables["sample"])))
    with np.load(DATA / "bevformer_reference" / "sequence.npz", allow_pickle=False) as stored:
        reference = stored["lidar2img"].astype(np.float64)
    ours = np.stack([sample.lidar2img(channel) for channel in CAMERAS])[: len(reference)]
    # The scale of the reference's image is in its first two rows.
    scale = reference[0, 0, 0] / ours[0, 0, 0]
    expected = reference / np.array([scale, scale, 1, 1])[:, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-2)


def test_the_real_sequence() -> None:
    data = NuScenes(real_folder("pandaset_002"))
    samples = list(data.samples(data.split("all")[0]))
    assert len(samples) == 16
    assert sum(len(data.annotations(s.token).boxes) for s in samples) == 1504
    bus = np.stack([CanBus(data)(s) for s in samples])
    path = np.linalg.norm(np.diff(bus[:, :2], axis=0), axis=1).sum()
    assert path == pytest.approx(20, abs=1)
    # It drives forward: the derived velocity lies along x and is what the positions say.
    assert bus[-1, 13] == pytest.approx(np.linalg.norm(bus[-1, :2] - bus[-2, :2]) / 0.5, rel=0.02)
    assert abs(bus[-1, 14]) < 0.2
