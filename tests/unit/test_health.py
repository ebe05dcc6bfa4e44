"""The life of a rollout worker as a state machine, and its budget of restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_dist.config.workers import Cluster
from ppo_dist.rollout.health import FOLLOWS, Life, Restarts

EVENTS = {
    "started": Life.started,
    "received": lambda life: life.received(1),
    "failed": Life.failed,
    "lost": Life.lost,
    "lost for good": lambda life: life.lost(for_good=True),
    "left out": Life.left_out,
    "restarted": Life.restarted,
}


def lived(*events: str) -> Life:
    life = Life()
    for event in events:
        life = EVENTS[event](life)
    return life


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=20))
def test_nobody_serves_before_it_received_whole_in_this_life(events: list[str]) -> None:
    """The order test: whatever happens, between the last death or failure and serving there is a
    version received whole, and an engine that has started.
    """
    life, has_received, has_started = Life(), False, False
    for event in events:
        try:
            life = EVENTS[event](life)
        except (ValueError, AssertionError):
            continue  # it cannot happen now, and changes nothing
        if event in ("lost", "lost for good", "restarted"):
            has_received = has_started = False
        has_received = (has_received or event == "received") and event != "failed"
        has_started |= event == "started"
        assert life.serves(1) == (life.state == "healthy") == (has_received and has_started)
        assert not (life.serves(1) and life.is_out)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "starting"),
        (["started"], "stale"),
        (["received", "started"], "healthy"),  # weights travel while the first engine starts
        (["started", "received"], "healthy"),
        (["started", "received", "failed"], "suspect"),
        (["started", "received", "failed", "received"], "healthy"),
        (["started", "received", "lost"], "dead"),
        (["started", "received", "lost", "restarted"], "starting"),
        (["started", "received", "lost", "restarted", "started"], "stale"),
        (["started", "received", "lost", "restarted", "started", "received"], "healthy"),
        (["received", "failed", "started"], "stale"),
        (["lost"], "dead"),
    ],
)
def test_states(events: list[str], state: str) -> None:
    assert lived(*events).state == state


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], "restarted"),
        (["started"], "started"),
        (["started"], "restarted"),
        (["lost"], "lost"),
        (["lost"], "received"),
        (["lost"], "started"),
        (["lost"], "failed"),
        (["lost for good"], "restarted"),
        (["lost", "left out"], "restarted"),
    ],
)
def test_what_cannot_follow_is_refused(before: list[str], event: str) -> None:
    with pytest.raises(ValueError, match="cannot become"):
        EVENTS[event](lived(*before))


def test_dead_leads_to_starting_alone_and_all_lead_to_dead() -> None:
    assert FOLLOWS["dead"] == {"starting"}
    assert all("dead" in after for state, after in FOLLOWS.items() if state != "dead")


def test_weights_are_sent_to_who_is_there() -> None:
    assert lived().takes_weights and lived("started").takes_weights
    assert not lived("lost").takes_weights and not lived("lost", "restarted").takes_weights
    assert lived("started", "failed").takes_weights


def test_news_of_an_earlier_process_can_be_told() -> None:
    assert lived("lost", "restarted").starts == 1 and lived("started").starts == 0


def test_so_many_versions_missed_in_a_row_are_hopeless() -> None:
    life = Life().started().failed(1).failed(2)
    assert not life.is_hopeless and life.failed(3).is_hopeless
    assert not life.failed(2).is_hopeless, "the same version again, which is tried at once"
    assert not life.failed().is_hopeless, "nor what has to do with none"
    assert not life.received(3).failed(4).is_hopeless
    assert not life.lost().restarted().started().failed(3).is_hopeless


def test_versions_that_are_no_longer_kept_are_forgotten() -> None:
    life = Life().started().received(1).received(2, kept={1, 2})
    assert life.serves(1) and life.serves(2)
    assert life.received(3, kept={2, 3}).versions == {2, 3}


def test_pauses_double_and_a_window_holds_so_many_restarts() -> None:
    restarts = Restarts(Cluster(restarts=3, restart_window_s=100, backoff_s=2))
    assert [restarts.pause(now) for now in (0, 10, 20, 30)] == [2, 4, 8, None]
    assert restarts.pause(101) == 8, "the first one is out of the window"
    assert restarts.pause(105) is None
    assert restarts.pause(500) == 2
    assert Restarts(Cluster(restarts=0)).pause(0) is None
