"""Whom a rank blames, and when, by the clock that it is given."""

from __future__ import annotations

import pytest

from moescale.runtime.judge import FAILED_PREFIX, Beat, Judge
from moescale.runtime.ranks import Ranks

HANG, LOST = 100.0, 20.0


def beat(count: int = 1, **fields: object) -> Beat:
    known = {"progress": 0, "step": 6, "phase": "micro-batch 2", "place": "at moe.py:5", "in_collective": False}
    return Beat(count=count, **(known | fields))


MINE = beat(place="in the collective all_reduce, at zero.py:9", in_collective=True)


class Run:
    """Rank 0 of three, as it sees the others: they beat every second, and ``clock`` is the time."""

    def __init__(self, store_held_by_first: bool = True) -> None:
        self.clock = 0.0
        self.count = 0
        self.judge = Judge(
            Ranks(rank=0, size=3),
            hang_seconds=HANG,
            lost_seconds=LOST,
            store_held_by_first=store_held_by_first,
            now=self.clock,
        )

    def run(self, seconds: int, others: dict[int, dict | None]) -> list[str]:
        """Let time pass, one beat a second; ``others``: fields of each one's beats, None for a rank without any."""
        for _ in range(seconds):
            self.clock += 1.0
            self.count += 1
            for rank, fields in others.items():
                if fields is not None:
                    fields = {name: value(self.count) if callable(value) else value for name, value in fields.items()}
                    self.judge.note_beat(rank, beat(self.count, **fields), self.clock)
            self.judge.note_answer(self.clock)
            verdict = self.judge.find_failure(MINE, self.clock)
            if verdict is not None:
                return [verdict]
        return []


def test_ranks_that_wait_for_a_slow_one_wait_as_long_as_it_gets_on():
    run = Run()
    getting_on = {"progress": lambda count: count // 99, "phase": "loading the checkpoint"}
    assert run.run(1000, {1: getting_on, 2: {"in_collective": True}}) == []


def test_a_rank_that_hangs_is_named_once_nothing_has_progressed_for_so_long():
    run = Run()
    hanging = {1: {"place": "at loader.py:7"}, 2: {"in_collective": True}}
    assert run.run(100, hanging) == []
    (verdict,) = run.run(1, hanging)
    assert verdict == (
        "rank 0 of 3, step 7 (micro-batch 2), in the collective all_reduce, at zero.py:9: rank 1 hangs; last seen in "
        "step 7 (micro-batch 2), at loader.py:7. The same command resumes from the newest checkpoint"
    )


def test_of_ranks_that_all_wait_the_one_furthest_behind_is_to_blame():
    (verdict,) = Run().run(101, {1: {"in_collective": True}, 2: {"in_collective": True, "step": 5}})
    assert "rank 2 hangs; last seen in step 6" in verdict


def test_progress_of_this_rank_counts_too():
    run = Run()
    others = {1: {}, 2: {}}
    run.run(90, others)
    run.judge.note_progress(run.clock)
    assert run.run(100, others) == []
    assert run.run(1, others) != []


def test_a_rank_whose_beats_end_is_named_with_where_it_was_last():
    run = Run()
    assert run.run(5, {1: {}, 2: {"step": 3, "phase": "checkpoint"}}) == []
    assert run.run(20, {1: {}, 2: None}) == []
    (verdict,) = run.run(1, {1: {}, 2: None})
    assert "rank 2 died or is out of reach; last seen in step 4 (checkpoint)" in verdict


def test_a_rank_that_left_and_fell_silent_is_named_with_its_reason():
    run = Run()
    run.run(1, {1: {}, 2: {"left": "DataError: the corpus has changed"}})
    (verdict,) = run.run(21, {1: {}, 2: None})
    assert "rank 2 has left: DataError: the corpus has changed. The same" in verdict


@pytest.mark.parametrize(
    ("held_by_first", "failed", "message"),
    [
        (True, False, "rank 0 died or is frozen: the store that it holds has not answered for 20 s"),
        (True, True, "rank 0 died or is frozen: the store that it holds is gone"),
        (False, False, "the machine of torchrun's store died or is frozen: the store has not answered for 20 s"),
    ],
)
def test_a_store_that_does_not_answer_is_blamed_on_its_holder_and_no_rank(held_by_first, failed, message):
    run = Run(held_by_first)
    run.run(5, {1: {}, 2: {}})
    if failed:
        run.judge.note_store_failure()
    assert run.judge.find_failure(MINE, run.clock + LOST) is None
    verdict = run.judge.find_failure(MINE, run.clock + LOST + 1)
    assert verdict is not None and message in verdict


def test_the_time_in_which_the_store_did_not_answer_is_not_held_against_the_ranks():
    run = Run()
    run.run(5, {1: {}, 2: {}})
    run.clock += LOST
    assert run.run(1, {1: {}, 2: {}}) == []


def test_a_failed_collective_is_explained_by_the_rank_that_left_first_and_not_by_its_victims():
    run = Run()
    run.run(1, {1: {"left": f"{FAILED_PREFIX}rank 2 is gone"}, 2: {}})
    assert run.judge.explain_failure(MINE, MINE.place, "closed", 5.0) is None
    run.run(1, {1: None, 2: {"left": "DataError: no"}})
    verdict = run.judge.explain_failure(MINE, MINE.place, "Connection closed by peer\nmore", 5.0)
    assert verdict is not None and "rank 2 has left: DataError: no [Connection closed by peer]" in verdict


def test_a_failed_collective_is_explained_by_the_rank_that_fell_silent():
    run = Run()
    run.run(2, {1: {}, 2: {}})
    run.run(6, {1: {}, 2: None})
    verdict = run.judge.explain_failure(MINE, MINE.place, "closed", 5.0)
    assert verdict is not None and "rank 2 died or is out of reach" in verdict


def test_a_collective_that_failed_for_no_reason_that_is_known_says_so():
    run = Run()
    run.run(2, {1: {}, 2: {}})
    text = run.judge.explain_without_culprit(MINE, MINE.place, "closed", run.clock)
    assert "a collective failed, though every rank answers [closed]" in text
    text = run.judge.explain_without_culprit(MINE, MINE.place, "closed", run.clock + LOST)
    assert "the store that it holds does not answer" in text


def test_all_have_left_once_each_beat_says_so():
    run = Run()
    run.run(1, {1: {"left": "a"}, 2: {}})
    assert not run.judge.have_all_left()
    run.run(1, {1: {"left": "a"}, 2: {"left": "a"}})
    assert run.judge.have_all_left()
