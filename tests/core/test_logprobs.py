"""Properties of log-probabilities and entropies from logits."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, Case, cases, gradient, tensors
from tests.core.subject import subject


@st.composite
def rows(draw, **more):
    """Logits [batch, time, vocab] with a token id for each position."""
    case = draw(cases(logits="logits"))
    batch, time, vocab = case.logits.shape
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=batch * time, max_size=batch * time))
    return Case(
        logits=case.logits,
        tokens=torch.tensor(ids).reshape(batch, time),
        **{name: draw(strategy) for name, strategy in more.items()},
    )


def softmax(logits):
    """Probabilities of a list of logits."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def surprise(probabilities):
    """Entropy of a list of probabilities, in nats."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


@given(case=rows())
def test_logprob_is_log_softmax_at_the_token(case):
    """token_logprobs[t] is log softmax(logits[t])[tokens[t]]: position t scores token t."""
    expected = [
        [math.log(softmax(logits)[token]) for logits, token in zip(*row, strict=True)]
        for row in zip(case.logits.tolist(), case.tokens.tolist(), strict=True)
    ]
    assert_close(subject.logprobs.token_logprobs(case.logits, case.tokens), expected)


@given(case=rows())
def test_logprobs_normalise(case):
    """Over the whole vocabulary the probabilities add up to 1, and none is above 1."""
    vocab = case.logits.shape[-1]
    every = [
        subject.logprobs.token_logprobs(case.logits, torch.full_like(case.tokens, token)) for token in range(vocab)
    ]
    assert_close(torch.stack(every).exp().sum(0), torch.ones(case.tokens.shape).double())
    assert all((x <= 1e-12).all() for x in every)


def test_one_distribution_needs_no_other_axes():
    """A vector of logits with one token gives one log-probability and one entropy."""
    logits, token = torch.tensor([0.0, math.log(3.0)]), torch.tensor(1)
    assert_close(subject.logprobs.token_logprobs(logits, token), torch.tensor(math.log(0.75)))
    assert subject.logprobs.token_entropy(logits).shape == ()


@given(case=rows(shift=NUMBERS))
def test_shift_invariance(case):
    """Adding one number to all logits of a position changes neither log-probability nor entropy."""
    moved = case.logits + case.shift
    token_logprobs, token_entropy = subject.logprobs.token_logprobs, subject.logprobs.token_entropy
    assert_close(token_logprobs(moved, case.tokens), token_logprobs(case.logits, case.tokens))
    assert_close(token_entropy(moved), token_entropy(case.logits))


@given(case=rows())
def test_entropy_is_the_expected_surprise(case):
    """token_entropy is -sum_v p_v log p_v, in nats, within [0, log V]."""
    got = subject.logprobs.token_entropy(case.logits)
    assert_close(got, [[surprise(softmax(logits)) for logits in row] for row in case.logits.tolist()])
    assert (got >= -1e-12).all()
    assert (got <= math.log(case.logits.shape[-1]) + 1e-12).all()


@given(vocab=st.integers(1, 50))
def test_entropy_of_the_uniform_distribution(vocab):
    """Equal logits have entropy log V."""
    assert_close(subject.logprobs.token_entropy(torch.zeros(1, vocab).double()), [math.log(vocab)])


@given(case=rows(scale=st.sampled_from((1.0, 1e3, 1e30))))
def test_extreme_logits_stay_finite(case):
    """Huge logits give no NaN and no infinite entropy."""
    logits = case.logits * case.scale
    assert not subject.logprobs.token_logprobs(logits, case.tokens).isnan().any()
    assert subject.logprobs.token_entropy(logits).isfinite().all()


@given(case=rows(), data=st.data())
def test_ruled_out_tokens_are_not_there(case, data):
    """A logit of -inf is as if its token were not in the vocabulary: in value, entropy and gradient."""
    vocab = case.logits.shape[-1]
    out = data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab).filter(lambda x: not all(x)), label="out")
    possible = [v for v in range(vocab) if not out[v]]
    tokens = torch.tensor([possible[i % len(possible)] for i in case.tokens.view(-1).tolist()]).view_as(case.tokens)
    ruled = case.logits.masked_fill(torch.tensor(out), -math.inf)
    smaller = case.logits[..., possible]
    renamed = torch.tensor([possible.index(i) for i in tokens.view(-1).tolist()]).view_as(tokens)
    token_logprobs, token_entropy = subject.logprobs.token_logprobs, subject.logprobs.token_entropy
    assert_close(token_logprobs(ruled, tokens), token_logprobs(smaller, renamed))
    assert_close(token_entropy(ruled), token_entropy(smaller))
    for with_all, without in (
        (lambda x: token_logprobs(x, tokens).sum(), lambda x: token_logprobs(x, renamed).sum()),
        (lambda x: token_entropy(x).sum(), lambda x: token_entropy(x).sum()),
    ):
        slope = gradient(with_all, ruled)
        assert_close(slope[..., possible], gradient(without, smaller))
        assert not slope[..., out].any()


@given(case=rows())
def test_gradient_of_the_logprob(case):
    """The gradient of a log-probability by its logits is onehot(token) - p."""
    slope = gradient(lambda x: subject.logprobs.token_logprobs(x, case.tokens).sum(), case.logits)
    expected = [
        [[float(v == token) - p for v, p in enumerate(softmax(logits))] for logits, token in zip(*row, strict=True)]
        for row in zip(case.logits.tolist(), case.tokens.tolist(), strict=True)
    ]
    assert_close(slope, expected)


@given(case=rows())
def test_gradient_of_the_entropy(case):
    """The gradient of the entropy by its logits is -p_v (log p_v + H): an entropy bonus pushes."""
    slope = gradient(lambda x: subject.logprobs.token_entropy(x).sum(), case.logits)
    expected = [
        [[-p * (math.log(p) + surprise(softmax(logits))) for p in softmax(logits)] for logits in row]
        for row in case.logits.tolist()
    ]
    assert_close(slope, expected)


@given(logits=tensors(1, 200), token=st.integers(0, 199), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_half_precision_logits_are_scored_in_float32(logits, token, dtype):
    """Half-precision logits are taken as they are and scored with float32's accuracy."""
    half = logits.to(dtype)
    tokens = torch.tensor([token])
    token_logprobs, token_entropy = subject.logprobs.token_logprobs, subject.logprobs.token_entropy
    assert_close(token_logprobs(half, tokens), token_logprobs(half.double(), tokens), dtype=torch.float32)
    assert_close(token_entropy(half), token_entropy(half.double()), dtype=torch.float32)
