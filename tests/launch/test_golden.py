"""Launches of the examples stay what tests/golden/launch says, and the trainer accepts what they give it."""

from __future__ import annotations

import pytest

from megatron.config.parser import ConfigError
from megatron.config.rules import NOT_YET
from megatron.launch.__main__ import resolve
from megatron.launch.families import FAMILIES
from tests.launch.cases import CASES, FOLDER
from tests.launch.recorded import written


@pytest.mark.parametrize("name", CASES)
def test_launch_is_the_kept_one(name, tmp_path):
    kept = (FOLDER / f"{name}.txt").read_text()
    assert written(CASES[name].launch(tmp_path)) == kept, "python -m tests.launch.cases writes the files anew"


@pytest.mark.parametrize("name", CASES)
def test_trainer_accepts_the_launch_or_says_what_is_not_there_yet(name, tmp_path):
    launch = CASES[name].launch(tmp_path)
    plan = launch.plan()
    assert plan.world_size == CASES[name].world_size
    try:
        run = resolve(plan, launch.environ)
    except ConfigError as problem:
        features = {row.feature for row in NOT_YET}
        for sentence in problem.problems:
            assert any(f"not implemented yet ({feature})" in sentence for feature in features), sentence
        code, out, err = launch.dry_run()
        assert (code, out, err) == (2, "", f"error: {problem}\n")
    else:
        assert run.parallel.world_size == plan.world_size
        code, out, err = launch.dry_run()
        assert (code, err) == (0, "") and "== settings" in out


def test_no_launch_waits_for_something(tmp_path):
    waiting = set()
    for name, case in CASES.items():
        folder = tmp_path / name
        folder.mkdir()
        if case.launch(folder).dry_run()[0]:
            waiting.add(name)
    assert not waiting


def test_every_kept_launch_has_a_case():
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_family_are_distinct_and_explained(family):
    rows = [(row.name, row.decides) for row in FAMILIES[family].variables if row.decides]
    assert len(rows) == len(set(rows))
    explained = {row.name for row in FAMILIES[family].variables if row.help}
    assert explained == {row.name for row in FAMILIES[family].variables}
