"""The properties bite: each kills the mistakes it is there for, and none kills the truth."""

import pytest

from tests.core.contracts import FUNCTIONS
from tests.core.subject import only_ours
from tests.meta.mutants import MUTANTS, killed, run_property

pytestmark = only_ours


def test_there_are_many():
    assert len(MUTANTS) >= 100
    assert {entry.target for entry in MUTANTS.values()} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", MUTANTS)
def test_no_mutant_survives(name):
    assert killed(MUTANTS[name]), f"{name} survives {MUTANTS[name].killer}"


@pytest.mark.parametrize("place", sorted({entry.killer for entry in MUTANTS.values()}))
def test_the_truth_is_not_killed(place):
    run_property(place)
