"""The memory over time: when it is used, when it is dropped and why, and what the network is told of the motion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core.kit import InputError
from kits.bev_perception.model import geometry
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.state import BevState, Bounds, Frame, Step

CONFIG = replace(NANO, bev_h=6, bev_w=5, embed_dims=8)


def memory(value: float) -> Tensor:
    return torch.full((1, 30, 8), value)


def frame(t: float, x: float, y: float = 0.0, degrees: float = 0.0, scene: str = "a", **more: object) -> Frame:
    half = math.radians(degrees) / 2
    return Frame.from_pose(scene, t, (x, y, 0.3), (math.cos(half), 0, 0, math.sin(half)), **more)  # type: ignore[arg-type]


def run(state: BevState, *frames: Frame) -> list[Step]:
    """Every frame kept, with its number as the memory."""
    steps = []
    for number, each in enumerate(frames, 1):
        steps.append(state.step(each))
        state.keep(memory(float(number)))
    return steps


def test_a_pose_gives_the_numbers_of_the_official_info_files() -> None:
    q = np.array([0.5721, 0.0013, -0.0102, 0.8201])
    q /= np.linalg.norm(q)
    found = Frame.from_pose("a", 0.0, (411.0, 1180.0, 1.5), q, velocity=(3.0, 0.0, 0.0)).can_bus
    w, x, y, z = q
    rotation = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + w * z)])  # the car's x axis in the world
    assert found[:7] == pytest.approx([411.0, 1180.0, 1.5, *q])
    assert found[7:16] == pytest.approx([0, 0, 0, 0, 0, 0, 3.0, 0, 0])
    assert found[16] == pytest.approx(math.atan2(rotation[1], rotation[0]) % (2 * math.pi))
    assert found[17] == pytest.approx(math.degrees(found[16]))
    assert frame(0.0, 0.0, degrees=-30).can_bus[17] == pytest.approx(330.0)


def test_a_scene_begins_without_a_history_and_goes_on_with_it() -> None:
    first, second = run(BevState(CONFIG), frame(0.0, 100.0, 50.0, 10.0), frame(0.5, 103.0, 54.0, 12.5))
    assert first.reset == "the first frame"
    assert first.has_prev.tolist() == [0.0]
    assert not first.prev_bev.any()
    assert first.can_bus[0, [0, 1, 2, 17]].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert first.can_bus[0, 16] == pytest.approx(math.radians(10.0))
    assert second.reset == ""
    assert second.has_prev.tolist() == [1.0]
    assert torch.equal(second.prev_bev, memory(1.0))
    assert second.can_bus[0, [0, 1, 2, 17]].tolist() == pytest.approx([3.0, 4.0, 0.0, 2.5], abs=1e-4)
    # 5 m, heading 12.5 degrees, way 53.13 degrees
    way = math.radians(12.5) - math.atan2(4, 3)
    wanted = [5 * math.sin(way) / 102.4, 5 * math.cos(way) / 102.4]
    assert geometry.shift(second.can_bus, CONFIG.extent)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_another_scene_begins_anew() -> None:
    steps = run(
        BevState(CONFIG), frame(0.0, 1.0), frame(0.5, 2.0), frame(1.0, 3.0, scene="b"), frame(1.5, 4.0, scene="b")
    )
    assert [s.has_prev.item() for s in steps] == [0, 1, 0, 1]
    assert steps[2].reset == "scene 'b' begins"
    assert not steps[2].prev_bev.any()
    assert steps[3].can_bus[0, 0] == pytest.approx(1.0)


def test_a_dropped_frame_keeps_the_history_and_counts_the_whole_way() -> None:
    steps = run(BevState(CONFIG), frame(0.0, 0.0), frame(1.5, 30.0))
    assert steps[1].reset == ""
    assert steps[1].can_bus[0, 0] == pytest.approx(30.0)
    assert steps[1].notes == ("1.50 s since the last frame: 2 dropped",)


def test_a_frame_that_was_not_kept_counts_as_dropped() -> None:
    state = BevState(CONFIG)
    run(state, frame(0.0, 0.0))
    state.step(frame(0.5, 5.0))  # the network failed: nothing to keep
    step = state.step(frame(1.0, 10.0))
    assert step.has_prev.item() == 1
    assert torch.equal(step.prev_bev, memory(1.0))
    assert step.can_bus[0, 0] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (frame(2.6, 1.0), "2.60 s since the last frame, more than 2"),
        (frame(0.0, 1.0), "time goes from 0.000 to 0.000 s"),
        (frame(-1.0, 1.0), "time goes from 0.000 to -1.000 s"),
        (frame(0.5, 60.0), "the pose jumps 60.0 m in 0.50 s, more than 70 m/s"),
        (frame(0.5, 1.0, degrees=90.0), "the pose turns 90.0 degrees in 0.50 s, more than 120 a second"),
    ],
)
def test_what_a_car_cannot_do_drops_the_history_and_says_why(second: Frame, why: str) -> None:
    third = replace(second, timestamp=second.timestamp + 0.5)
    steps = run(BevState(CONFIG), frame(0.0, 0.0), second, third)
    assert steps[1].reset == why
    assert steps[1].has_prev.item() == 0
    assert steps[1].can_bus[0, [0, 1, 2, 17]].abs().max() == 0
    assert steps[2].has_prev.item() == 1  # the frame after goes on from there


def test_bounds_are_a_matter_of_the_vehicle() -> None:
    steps = run(BevState(CONFIG, Bounds(speed=200.0, gap=5.0)), frame(0.0, 0.0), frame(0.5, 60.0), frame(4.0, 61.0))
    assert [s.reset for s in steps[1:]] == ["", ""]


@pytest.mark.parametrize(("wrap", "turn"), [(False, -358.5), (True, 1.5)])
def test_turns_over_north_are_wrapped_or_not_as_the_model_learnt_them(wrap: bool, turn: float) -> None:
    state = BevState(replace(CONFIG, wrap_turn=wrap))
    steps = run(state, frame(0.0, 0.0, degrees=359.6), frame(0.5, 1.0, degrees=1.1))
    assert steps[1].reset == ""
    assert steps[1].can_bus[0, 17] == pytest.approx(turn, abs=1e-3)


def test_a_missing_camera_is_masked_and_noted() -> None:
    state = BevState(CONFIG)
    step = state.step(frame(0.0, 0.0, cameras=(True, True, False, True, True, True)))
    assert step.camera_mask.tolist() == [[1, 1, 0, 1, 1, 1]]
    assert step.notes == ("camera CAM_FRONT_LEFT is missing: what only it sees comes from the history alone",)
    assert state.step(frame(0.0, 0.0)).camera_mask.tolist() == [[1] * 6]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (frame(0.5, math.nan), "pose, CAN bus or time is not finite"),
        (frame(math.inf, 1.0), "pose, CAN bus or time is not finite"),
        (frame(0.5, 1.0, cameras=(False,) * 6), "no camera came"),
        (frame(0.5, 1.0, cameras=(True,) * 5), "5 cameras are named, the network takes 6"),
        (Frame("a", 0.5, np.zeros(17)), r"shape \(17,\) and not \(18,\)"),
    ],
)
def test_the_state_survives_a_bad_frame(bad: Frame, why: str) -> None:
    state = BevState(CONFIG)
    run(state, frame(0.0, 0.0))
    with pytest.raises(InputError, match=why):
        state.step(bad)
    step = state.step(frame(1.0, 4.0))
    assert step.has_prev.item() == 1
    assert step.can_bus[0, 0] == pytest.approx(4.0)


def test_a_memory_that_is_not_finite_is_not_kept() -> None:
    state = BevState(CONFIG)
    state.step(frame(0.0, 0.0))
    broken = memory(1.0)
    broken[0, 3, 2] = math.nan
    state.keep(broken)
    step = state.step(frame(0.5, 1.0))
    assert step.reset == "the memory of the frame before held NaN or infinity"
    assert step.has_prev.item() == 0


def test_keep_needs_a_step_and_the_right_shape() -> None:
    state = BevState(CONFIG)
    with pytest.raises(InputError, match="call step first"):
        state.keep(memory(0.0))
    state.step(frame(0.0, 0.0))
    with pytest.raises(InputError, match=r"\(1, 29, 8\) and not \(1, 30, 8\)"):
        state.keep(torch.zeros(1, 29, 8))
    state.keep(memory(1.0))
    state.reset("the user asked for it")
    assert state.step(frame(0.5, 1.0)).reset == "the user asked for it"


def test_inputs_stand_in_the_network_s_order() -> None:
    step = BevState(CONFIG).step(frame(0.0, 0.0))
    assert [tuple(t.shape) for t in step.inputs] == [(1, 18), (1, 30, 8), (1,), (1, 6)]
