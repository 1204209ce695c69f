"""timeline: few points, whatever the run's length."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from md3cli.run.run_info import MAX_POINTS, RunCounts, RunDocument, Timeline


@pytest.mark.parametrize("num_notes", [0, 10, 10_000])
def test_a_timeline_is_short_even_and_ends_with_the_run(num_notes):
    timeline = Timeline()
    for number in range(1, num_notes + 1):
        timeline.note(number, 3 * number, is_last=number == num_notes)
    points = timeline.points
    assert len(points) == min(num_notes, len(points)) <= MAX_POINTS
    assert all(earlier < later for earlier, later in pairwise(points))
    assert all(done == 3 * at_s for at_s, done in points)
    if points:
        assert points[-1] == (num_notes, 3 * num_notes)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(points[:-1])]
    assert not gaps or max(gaps) <= 2.1 * min(gaps)


def test_points_closer_than_the_spacing_are_left_out():
    timeline = Timeline()
    for number in range(100):
        timeline.note(number / 100, number)
    assert timeline.points == [(0.0, 0), (0.5, 50)]


def test_what_comes_after_the_last_record_does_not_count():
    timeline = Timeline()
    timeline.note(1.0, 10)
    timeline.note(1.1, 12, is_last=True)
    timeline.note(60.0, 12, is_last=True)
    assert timeline.points == [(1.0, 10), (1.1, 12)]


def test_a_later_start_goes_on_where_the_earlier_ended():
    timeline = Timeline([(0.0, 0), (10.0, 40)])
    timeline.note(5.0, 20)
    assert timeline.points[-1] == (15.0, 60)


@pytest.mark.parametrize("damage", [None, "x", [[1]], [["a", 2]]])
def test_run_json_hands_the_timeline_on_to_the_next_start(tmp_path, damage):
    path = tmp_path / "run.json"

    def begin():
        return RunDocument.begin(path, identity={"model": "m"}, arguments=[], root=".", is_resume=True)

    run = begin()
    assert run.timeline == []
    run.finish(RunCounts(ok=3), {"decode": 1.0}, None, [(1.5, 3)])
    assert begin().timeline == [(1.5, 3)]
    if damage is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timeline": damage}))
        assert begin().timeline == []
