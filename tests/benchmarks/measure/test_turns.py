"""Loops that take one step when it is their turn."""

import threading
from dataclasses import dataclass

import pytest

from benchmarks.measure import turns as turns_module
from benchmarks.measure.turns import StepEdge, Turns


@dataclass
class Clock:
    """Time that passes when a test says so; one contestant runs at a time, so nobody else moves it."""

    wall_s: float = 1000.0
    cpu_s: float = 10.0

    def perf_counter(self) -> float:
        return self.wall_s

    def process_time(self) -> float:
        return self.cpu_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns_module, "time", clock)
    return clock


def _worker(clock: Clock, done: list[str], name: str, seconds: float):
    def run(step_edge: StepEdge) -> None:
        try:
            while True:
                clock.wall_s += seconds
                done.append(name)
                step_edge()
        finally:
            done.append(f"{name} ended")

    return run


@pytest.mark.timing
def test_steps_happen_in_turn_and_only_they_are_timed(clock: Clock) -> None:
    done: list[str] = []
    short = Turns(_worker(clock, done, "short", 0.25), lambda: None)
    long = Turns(_worker(clock, done, "long", 2.0), lambda: None)
    assert [long.take().wall_s, long.take().wall_s] == [2.0, 2.0]
    assert done == ["long", "long"]
    # It had waited for the other's two steps.
    assert short.take().wall_s == 0.25
    assert done == ["long", "long", "short"]
    short.end()
    long.end()
    assert done[3:] == ["short ended", "long ended"]
    assert not any(thread.name == "contestant" for thread in threading.enumerate())


@pytest.mark.timing
def test_a_turn_of_several_steps_is_waited_for_once_and_can_be_watched(clock: Clock) -> None:
    class Watch:
        def begin(self) -> None:
            # Before the time of the turn.
            clock.wall_s += 100.0
            done.append("begin")

        def edge(self) -> None:
            done.append("edge")

        def end(self) -> None:
            # After it.
            clock.wall_s += 100.0
            done.append("end")

    done: list[str] = []
    turns = Turns(_worker(clock, done, "step", 0.5), lambda: done.append("waited"))
    step = turns.take(3, Watch())
    assert done == ["begin", *["step", "edge"] * 3, "waited", "end"]
    # A mean over the three.
    assert step.wall_s == 0.5
    turns.take()
    assert done[-2:] == ["step", "waited"]
    turns.end()


@pytest.mark.timing
def test_device_is_waited_for_inside_the_step(clock: Clock) -> None:
    def wait() -> None:
        clock.wall_s += 0.25

    turns = Turns(_worker(clock, [], "one", 0.5), wait)
    assert turns.take().wall_s == 0.75
    turns.end()


@pytest.mark.timing
def test_processor_time_leaves_waiting_out(clock: Clock) -> None:
    def run(step_edge: StepEdge) -> None:
        while True:
            clock.wall_s += 0.75
            clock.cpu_s += 0.25
            step_edge()

    turns = Turns(run, lambda: None)
    step = turns.take()
    turns.end()
    assert (step.wall_s, step.cpu_s) == (0.75, 0.25)


@pytest.mark.timing
def test_the_clocks_are_those_of_wall_and_of_this_process() -> None:
    assert turns_module.time.perf_counter() > 0
    began_s = turns_module.time.process_time()
    while turns_module.time.process_time() == began_s:
        pass


@pytest.mark.timing
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
