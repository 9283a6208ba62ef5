"""Phases, events and injected faults."""

import json
from pathlib import Path

import pytest

from sharding.ranks.errors import UserError
from trainer.faults.injection.inject import INJECT_VARIABLE, inject_faults, read_faults
from trainer.run_folder.events import EVENTS_NAME, read_events, record_event
from trainer.runtime.phases import Phase, Phases, PhaseState


def test_listeners_hear_what_ends_and_what_begins() -> None:
    phases, heard = Phases(), list[tuple[PhaseState, PhaseState]]()
    phases.listen(lambda ended, begun: heard.append((ended, begun)))
    phases.enter(Phase.DATA, 3)
    with phases.during(Phase.EVALUATE):
        assert phases.now.phase is Phase.EVALUATE
    assert [begun.phase for _, begun in heard] == [Phase.DATA, Phase.EVALUATE, Phase.DATA]
    assert [begun.step for _, begun in heard] == [3, 3, 3]
    assert heard[0][0].phase is Phase.START
    assert all(ended.since <= begun.since for ended, begun in heard)


def test_an_error_leaves_the_phase_that_it_happened_in() -> None:
    phases = Phases()
    phases.enter(Phase.LOG, 2)
    with pytest.raises(ValueError, match="here"), phases.during(Phase.EVALUATE):
        raise ValueError("here")
    assert (phases.now.phase, phases.now.step) == (Phase.EVALUATE, 2)


def test_events_are_read_back_in_order_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    record_event(tmp_path, "spike", attempt=1, step=4, loss=9.5)
    record_event(tmp_path, "restart", attempt=2, step=3)
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"kind": "torn')
    assert [(event["kind"], event["attempt"], event["step"]) for event in read_events(tmp_path)] == [
        ("spike", 1, 4),
        ("restart", 2, 3),
    ]


def test_a_fault_is_triggered_on_its_rank_step_phase_and_attempt_alone(tmp_path: Path) -> None:
    faults = read_faults({INJECT_VARIABLE: json.dumps([{"fault": "raise", "rank": 1, "step": 5, "attempt": 2}])})
    for rank, attempt in ((0, 2), (1, 1)):
        spared = Phases()
        inject_faults(faults, spared, tmp_path, rank, attempt)
        spared.enter(Phase.TRAIN, 5)
    triggered = Phases()
    inject_faults(faults, triggered, tmp_path, 1, 2)
    triggered.enter(Phase.TRAIN, 4)
    triggered.enter(Phase.DATA, 5)
    assert read_events(tmp_path) == []
    with pytest.raises(RuntimeError, match="train of step 5"):
        triggered.enter(Phase.TRAIN)
    assert [(event["kind"], event["step"], event["rank"]) for event in read_events(tmp_path)] == [("injected", 5, 1)]


def test_a_misspelt_fault_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"SHARDLINE_INJECT is not a list of faults .*unset it"):
        read_faults({INJECT_VARIABLE: '[{"fault": "explode"}]'})
    assert read_faults({}) == []
