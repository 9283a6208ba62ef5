"""Loops that take one step when it is their turn."""

import threading
import time

import pytest

from benchmarks.measure.turns import StepEdge, Turns


def _sleeper(done: list[str], name: str, seconds: float):
    def run(step_edge: StepEdge) -> None:
        try:
            while True:
                time.sleep(seconds)
                done.append(name)
                step_edge()
        finally:
            done.append(f"{name} ended")

    return run


def test_steps_happen_in_turn_and_only_they_are_timed() -> None:
    done: list[str] = []
    short = Turns(_sleeper(done, "short", 0.01), lambda: None)
    long = Turns(_sleeper(done, "long", 0.1), lambda: None)
    long_s = [long.take().wall_s, long.take().wall_s]
    assert done == ["long", "long"]
    short_s = short.take().wall_s
    assert done == ["long", "long", "short"]
    assert min(long_s) >= 0.1
    # It had waited for the other's two steps.
    assert 0.01 <= short_s < 0.1
    short.end()
    long.end()
    assert done[3:] == ["short ended", "long ended"]
    assert not any(thread.name == "contestant" for thread in threading.enumerate())


def test_a_turn_of_several_steps_is_waited_for_once_and_can_be_watched() -> None:
    class Watch:
        def begin(self) -> None:
            done.append("begin")

        def edge(self) -> None:
            done.append("edge")

        def end(self) -> None:
            done.append("end")

    done: list[str] = []
    turns = Turns(_sleeper(done, "step", 0.02), lambda: done.append("waited"))
    step = turns.take(3, Watch())
    assert done == ["begin", *["step", "edge"] * 3, "waited", "end"]
    # A mean over the three.
    assert 0.02 <= step.wall_s < 0.05
    turns.take()
    assert done[-2:] == ["step", "waited"]
    turns.end()


def test_device_is_waited_for_inside_the_step() -> None:
    turns = Turns(_sleeper([], "one", 0.0), lambda: time.sleep(0.05))
    assert turns.take().wall_s >= 0.05
    turns.end()


def test_processor_time_leaves_waiting_out() -> None:
    def run(step_edge: StepEdge) -> None:
        while True:
            time.sleep(0.1)
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            step_edge()

    turns = Turns(run, lambda: None)
    step = turns.take()
    turns.end()
    assert 0.05 <= step.cpu_s < 0.1
    assert step.wall_s >= 0.15


def test_what_ends_a_loop_is_raised() -> None:
    def fail(step_edge: StepEdge) -> None:
        step_edge()
        raise ValueError("in the second step")

    turns = Turns(fail, lambda: None)
    turns.take()
    with pytest.raises(ValueError, match="in the second step"):
        turns.take()
    with pytest.raises(RuntimeError, match="before the contest was over"):
        Turns(lambda step_edge: None, lambda: None).take()
