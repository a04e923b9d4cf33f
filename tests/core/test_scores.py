"""Properties of running score scaling."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_core.moments import Moments
from ppo_core.scores import ScoreState
from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, POSITIVE
from tests.core.subject import subject

BATCHES = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4)
EMPTY = ScoreState(0.0, 0.0, 0.0)


def moments_of(batch):
    """Moments of a list, by definition."""
    mean = statistics.fmean(batch)
    fields = (len(batch), mean, math.fsum((x - mean) ** 2 for x in batch))
    return Moments(*(torch.tensor(x, dtype=torch.float64) for x in fields))


def after(batches, state=EMPTY):
    """The state after a list of batches."""
    for batch in batches:
        state = subject.scores.update_score_state(state, moments_of(batch))
    return state


def scale(batch, state, **changed):
    settings = {"use_scaling": True, "use_norm": False, "clip": None} | changed
    return subject.scores.scale_scores(torch.tensor(batch, dtype=torch.float64), state, **settings)


def fields(state):
    return [state.count, state.mean, state.m2]


@given(batches=BATCHES)
def test_state_is_that_of_all_scores(batches):
    """However the scores were split, the state holds count, mean and squared deviations of all of them."""
    everything = [x for batch in batches for x in batch]
    assert_close(fields(after(batches)), fields(after([everything])), scale=1e2)
    assert_close(after(batches).mean, statistics.fmean(everything), scale=10)
    if len(everything) > 1:
        assert_close(after(batches).std, statistics.stdev(everything), scale=10)


@given(batches=BATCHES, cut=st.integers(0, 4))
def test_resume_in_the_middle(batches, cut):
    """Going on from a stored state is the same as never having stopped."""
    stored = ScoreState(*fields(after(batches[:cut])))
    assert after(batches[cut:], stored) == after(batches)


@given(batches=BATCHES)
def test_nothing_changes_nothing(batches):
    """An empty batch leaves the state as it is, an empty state included."""
    nothing = Moments(*(torch.zeros(()) for _ in range(3)))
    state = after(batches)
    assert fields(subject.scores.update_score_state(state, nothing)) == fields(state)
    assert subject.scores.update_score_state(EMPTY, nothing) == EMPTY


@given(batches=BATCHES, position=st.integers(0, 2), poison=st.sampled_from((math.nan, math.inf)))
def test_non_finite_moments_are_refused(batches, position, poison):
    """A moment that is not finite raises, and the state given is untouched."""
    state = after(batches)
    before = fields(state)
    bad = [torch.tensor(1.0) for _ in range(3)]
    bad[position] = torch.tensor(poison)
    with pytest.raises(ValueError, match="expected finite numbers"):
        subject.scores.update_score_state(state, Moments(*bad))
    assert fields(state) == before


@given(batches=BATCHES)
def test_scaling_divides_by_the_running_deviation(batches):
    """Scores are divided by the deviation of all scores so far, and keep their size while there is none."""
    std = after(batches).std
    assert_close(scale(batches[-1], after(batches)), [x / (std or 1.0) for x in batches[-1]])


@given(batch=st.lists(NUMBERS, min_size=2, max_size=6).filter(lambda x: len(set(x)) > 1))
def test_norm_centres_on_the_running_mean(batch):
    """With use_norm a first batch comes out with mean 0 and variance 1."""
    scaled = scale(batch, after([batch]), use_norm=True).tolist()
    assert_close(statistics.fmean(scaled), 0.0)
    assert_close(statistics.variance(scaled), 1.0)


@given(score=NUMBERS, use_norm=st.booleans())
def test_first_batch_of_one(score, use_norm):
    """A first batch of one is defined: the score itself, or 0 with use_norm."""
    assert_close(scale([score], after([[score]]), use_norm=use_norm), [0.0 if use_norm else score])


@given(score=NUMBERS, size=st.integers(2, 5))
def test_equal_scores_keep_their_size(score, size):
    """Scores without any spread are not blown up."""
    assert_close(scale([score] * size, after([[score] * size])), [score] * size)


@given(
    batches=BATCHES,
    clip=POSITIVE,
    settings=st.fixed_dictionaries({k: st.booleans() for k in ("use_scaling", "use_norm")}),
)
def test_clip_bounds_the_result(batches, clip, settings):
    """clip bounds what comes out, after scaling, and changes nothing within the bounds."""
    free = scale(batches[-1], after(batches), **settings)
    clipped = scale(batches[-1], after(batches), clip=clip, **settings)
    assert_close(clipped, [min(max(x, -clip), clip) for x in free.tolist()])


@given(batches=BATCHES, use_norm=st.booleans())
def test_without_scaling_only_the_clip_is_left(batches, use_norm):
    """use_scaling=False leaves raw scores, whatever the state."""
    assert_close(scale(batches[-1], after(batches), use_scaling=False, use_norm=use_norm), batches[-1])


def test_bad_arguments():
    """Integer scores and a clip that bounds nothing are refused by name."""
    settings = {"use_scaling": True, "use_norm": False}
    with pytest.raises(TypeError, match="scores has dtype"):
        subject.scores.scale_scores(torch.tensor([1, 2]), EMPTY, **settings, clip=None)
    with pytest.raises(ValueError, match=r"clip is 0\.0"):
        subject.scores.scale_scores(torch.tensor([1.0]), EMPTY, **settings, clip=0.0)
