"""What a job of a comparison keeps in its folder, and what of it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipn_core.comparison.job import Job, run_job
from ipn_core.comparison.kept import read_kept, write_kept
from ipn_core.errors import CheckpointError, TrainingError


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"seed": "0"}', '{"right": [1'])
def test_what_is_damaged_in_a_job_is_named_with_what_to_remove(
    tmp_path: Path, content: str
) -> None:
    job = Job("one", str(tmp_path), {}, 0, {}, [], 1, 1)
    for path in (job.result, job.path):
        path.write_text(content)
    damaged = r"is damaged or of an earlier version \(.+\)\."
    said = rf"', kept of a comparison, {damaged} Remove its folder, so that the job is"
    with pytest.raises(CheckpointError, match=f"'{job.result}{said}"):
        job.found()
    with pytest.raises(CheckpointError, match=f"'{job.path}{said}"):
        Job.read(job.path)
    with pytest.raises(CheckpointError, match=rf"{damaged} Do\.$"):
        read_kept(job.path, {"seed": int}, "Do.")


def test_a_process_left_behind_does_nothing_where_the_job_is_asked_something_else(
    tmp_path: Path,
) -> None:
    mine, other = (Job("one", str(tmp_path), {}, 0, {}, [{"limit": n}], 1, 1) for n in (3, 4))
    other.write()
    run_job(mine)
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "lock"}
    score = {"asked": {"limit": 4}, "shuffled": False, "cpu_s": 1.0, "guess_by_type": {}}
    lists: dict[str, Any] = {"right": [], "types": [], "pictures": []}
    found = {"seed": 0, "arm": {}, "training": {}, "measured": {}, "cpu_s": 1.0}
    write_kept(other.result, {**found, "scores": [{**score, **lists}]})
    assert other.answers()["scores"][0]["asked"] == {"limit": 4}
    assert not mine.is_done()
    with pytest.raises(TrainingError, match="answers other questions: another comparison runs in"):
        mine.answers()


@pytest.mark.parametrize("scores", [[3], [{}], [{"shuffled": False, "right": []}]])
def test_answers_of_an_earlier_version_are_no_result(tmp_path: Path, scores: list[Any]) -> None:
    job = Job("one", str(tmp_path), {}, 0, {}, [], 1, 1)
    found = {"seed": 0, "arm": {}, "training": {}, "measured": {}, "cpu_s": 1.0}
    write_kept(job.result, {**found, "scores": []})
    assert job.is_done()
    write_kept(job.result, {**found, "scores": scores})
    with pytest.raises(CheckpointError, match=r"of an earlier version .* Remove its folder"):
        job.is_done()
