"""Monitor replies with members of wrong types raise `MachineError` and nothing else. Accepted members have
the type and range that their users need."""

import json

import pytest
from test_hostile_records import wrong_types

from snapengine.errors import CaptureCancelled, MachineError
from snapengine.options import Options
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.replies import ask_migration
from snapengine.qemu.via_migration import _Migration, _settings

ANSWERS = {
    "query-migrate-capabilities": [{"capability": "background-snapshot", "state": False},
                                   {"capability": "xbzrle", "state": True}],
    "query-migrate-parameters": {"max-bandwidth": 1 << 27, "downtime-limit": 300},
    "query-migrate": {"status": "completed", "downtime": 7, "ram": {"dirty-sync-count": 3}},
    "query-status": {"status": "running", "running": True},
}  # fmt: skip
EVENTS = [{"event": name, "timestamp": {"seconds": at, "microseconds": 5}, "data": {}}
          for name, at in (("STOP", 10), ("RESUME", 12))]  # fmt: skip


class Answering(Monitor):
    """A monitor with canned replies and no connection."""

    def __init__(self, answers=ANSWERS, events=()):
        self.answers, self.told = answers, events

    def execute(self, command, arguments=None, *, seconds=None):
        return self.answers.get(command)

    def _run(self, work, seconds, command=""):
        return self.told


def changed(command):
    """Yield monitors with one wrong member in the reply to `command`, each with what was changed."""
    for where, answer in [*wrong_types([ANSWERS[command]])]:
        yield where, Answering(ANSWERS | {command: answer[0]})


def outcome(act, *arguments):
    """Return the result of `act`, or None if it raises MachineError."""
    try:
        return act(*arguments)
    except (MachineError, CaptureCancelled):
        return None


def tried(act, command):
    """Check that some changed replies are rejected; return (change, result) of the accepted ones."""
    found = [(where, outcome(act, monitor)) for where, monitor in changed(command)]
    assert len(found) > 20
    assert any(one is None for _, one in found)
    return [(where, one) for where, one in found if one is not None]


def settings(monitor):
    return _settings(monitor, Options(), background=True)


@pytest.mark.parametrize("command", ["query-migrate-capabilities", "query-migrate-parameters"])
def test_what_is_set_back_is_what_qemu_takes(command):
    for where, (_, theirs) in tried(settings, command):
        for name, values in theirs:
            if name == "migrate-set-parameters":
                assert all(type(value) is int and value >= 0 for value in values.values()), where
            else:
                assert all(type(one["state"]) is bool for one in values["capabilities"]), where
            json.dumps(values, allow_nan=False)


def finish(monitor):
    migration = _Migration(monitor, Options(), was_running=True, background=True)
    try:
        return migration.finish()
    finally:
        migration.close()


@pytest.mark.parametrize("command", ["query-migrate", "query-status"])
def test_the_figures_of_a_migration_are_numbers(command):
    for where, figures in tried(finish, command):
        assert all(type(value) is int and 0 <= value < 1 << 63 for value in figures.values()), where


def test_the_end_of_a_migration():
    assert finish(Answering()) == {"stop_ns": 7 * 10**6, "rounds": 3}
    assert finish(Answering(events=EVENTS)) == {"stop_ns": 2 * 10**9, "rounds": 3}
    assert ask_migration(Answering({"query-migrate": {}})).status == "none"


def test_the_reason_of_a_failed_migration():
    answer = {"status": "failed", "error-desc": "first\nsecond"}
    with pytest.raises(MachineError, match=r"failed: first.*second$"):
        finish(Answering(ANSWERS | {"query-migrate": answer}))


@pytest.mark.parametrize("events", [EVENTS[::-1], EVENTS[:1], EVENTS[1:], []])
def test_the_time_that_the_guest_was_stopped(events):
    """The duration needs both events. It is unknown if the clock was set back between them."""
    assert Answering(events=EVENTS).stop_duration_ns() == 2 * 10**9
    later = [event | {"timestamp": {"seconds": 10 - number, "microseconds": 0}}
             for number, event in enumerate(EVENTS)]  # fmt: skip
    assert Answering(events=later).stop_duration_ns() is None
    assert Answering(events=events).stop_duration_ns() == (2 * 10**9 if len(events) == 2 else None)


def test_events_with_other_types():
    refused = 0
    for where, events in wrong_types(EVENTS):
        objects = [event for event in events if type(event) is dict]
        duration = outcome(Answering(events=objects).stop_duration_ns)
        assert duration is None or (type(duration) is int and 0 <= duration < 1 << 63), where
        refused += duration is None
    assert refused > 20


@pytest.mark.parametrize("answer", [None, {}, {"fdset-id": "1"}, {"fdset-id": -1}, [1]])
def test_the_number_of_a_descriptor_set(answer):
    with pytest.raises(MachineError, match="add-fd"):
        Answering(events=answer).pass_file(0)
