"""Properties of log-probabilities restricted to the support that was sampled from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import POSITIVE, UNIT, gradient, tensors
from tests.core.subject import subject

SPECS = st.fixed_dictionaries(
    {"temperature": POSITIVE, "top_k": st.none() | st.integers(0, 6), "top_p": st.none() | UNIT}
)
# Eighths of small integers: ties are frequent.
LOGITS = st.tuples(st.integers(1, 3), st.integers(1, 6)).flatmap(
    lambda shape: tensors(*shape, numbers=st.integers(-8, 8).map(lambda n: n / 8))
)


def restrict(logits, spec):
    """The function under test."""
    return subject.logprobs.restrict_to_support(logits, **spec)


def warpers():
    """Those of transformers, which the core itself does without."""
    return pytest.importorskip("transformers.generation.logits_process", reason="absent: transformers, to compare with")


def support_of(logits, *, temperature, top_k, top_p):
    """Ids kept of one row, by counting, most likely first; which of equals are kept is nobody's business."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    if top_k:
        order = [v for v in order if scaled[v] >= scaled[order[min(top_k, len(order)) - 1]]]
    if top_p is None or top_p == 1:
        return set(order), False
    weights = {v: math.exp(scaled[v] - scaled[order[0]]) for v in order}
    total = math.fsum(weights.values())
    kept, reached, on_the_edge = set(), 0.0, False
    for v in order:
        # A token stays while less than top_p lies ahead of it.
        ahead = reached / total
        on_the_edge |= abs(ahead - top_p) < 1e-9
        if not kept or ahead < top_p:
            kept.add(v)
        reached += weights[v]
    return kept, on_the_edge


@given(logits=LOGITS, spec=SPECS)
def test_support_is_the_set_of_the_definition(logits, spec):
    """Finite entries are the top k (all that tie with the k-th), then the smallest set reaching top_p among them."""
    for row, restricted in zip(logits.tolist(), restrict(logits, spec), strict=True):
        kept, on_the_edge = support_of(row, **spec)
        if not on_the_edge:
            found = restricted.isfinite().nonzero().flatten().tolist()
            assert sorted(row[v] for v in found) == sorted(row[v] for v in kept)


@given(logits=LOGITS, spec=SPECS)
def test_equals_the_warpers_of_transformers(logits, spec):
    """What transformers samples from, its own warpers applied in its own order, is what is scored."""
    process = warpers()
    scores = process.TemperatureLogitsWarper(spec["temperature"])(None, logits)
    if spec["top_k"]:
        scores = process.TopKLogitsWarper(spec["top_k"])(None, scores)
    if spec["top_p"] is not None and spec["top_p"] < 1:
        scores = process.TopPLogitsWarper(spec["top_p"])(None, scores)
    torch.testing.assert_close(restrict(logits, spec), scores, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [2, 4, 64])
def test_half_of_a_uniform_distribution_is_half_of_the_tokens(vocab):
    """Probability that is reached exactly is enough; of equals the same ones are kept as in transformers."""
    process = warpers()
    logits = torch.zeros(1, vocab)
    restricted = restrict(logits, {"temperature": 1.0, "top_k": None, "top_p": 0.5})
    assert restricted.isfinite().sum() == vocab // 2
    assert torch.equal(restricted, process.TopPLogitsWarper(0.5)(None, logits))


@given(logits=LOGITS, spec=SPECS)
def test_renormalises_over_the_support(logits, spec):
    """Within the support, differences of log-probability are those of logits / temperature, and all sum to 1."""
    restricted = restrict(logits, spec)
    everything = torch.arange(logits.shape[-1]).expand(logits.shape)
    logprobs = subject.logprobs.token_logprobs(restricted.unsqueeze(1).expand(-1, logits.shape[-1], -1), everything)
    inside = restricted.isfinite()
    assert_close(logprobs.exp().sum(-1), torch.ones(len(logits)).double())
    scaled = logits / spec["temperature"]
    best = scaled.argmax(-1, keepdim=True)
    assert_close(
        torch.where(inside, logprobs - logprobs.amax(-1, keepdim=True), 0.0),
        torch.where(inside, scaled - scaled.gather(-1, best), 0.0),
        scale=1e2,
    )
    assert torch.isneginf(logprobs[~inside]).all()


@given(logits=LOGITS, spec=SPECS)
def test_entropy_only_shrinks_to_the_support(logits, spec):
    """The entropy is finite and at most the log of the size of the support."""
    restricted = restrict(logits, spec)
    entropy = subject.logprobs.token_entropy(restricted)
    assert (entropy <= restricted.isfinite().sum(-1).double().log() + 1e-9).all()
    assert (entropy >= -1e-9).all()


@given(logits=LOGITS, temperature=POSITIVE, top_k=st.sampled_from((None, 0, 99)), top_p=st.sampled_from((None, 1.0)))
def test_no_restriction_is_temperature_alone(logits, temperature, top_k, top_p):
    """None, 0 or more tokens than there are, and None or 1, restrict nothing."""
    assert_close(restrict(logits, {"temperature": temperature, "top_k": top_k, "top_p": top_p}), logits / temperature)


@given(logits=LOGITS, spec=SPECS)
def test_gradient_stays_inside(logits, spec):
    """The gradient is 1 / temperature inside the support, exactly 0 outside, and finite throughout."""
    inside = restrict(logits, spec).isfinite()
    by_logits = gradient(lambda x: torch.where(inside, restrict(x, spec), 0.0).sum(), logits)
    assert_close(by_logits, inside.double() / spec["temperature"])
    chosen = inside.double().argmax(-1)
    assert gradient(lambda x: subject.logprobs.token_logprobs(restrict(x, spec), chosen).sum(), logits).isfinite().all()


@given(logits=LOGITS, spec=SPECS)
def test_vmap_equals_batch(logits, spec):
    """Mapping over rows equals one call on the batch."""
    mapped = torch.func.vmap(lambda row: restrict(row, spec))(logits)
    torch.testing.assert_close(mapped, restrict(logits, spec), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.compiled
def test_compiled_equals_eager():
    """One graph gives the same support."""
    spec = {"temperature": 0.7, "top_k": 5, "top_p": 0.8}
    logits = torch.linspace(-1, 1, 24).sin().mul(7).reshape(3, 8)
    compiled = torch.compile(subject.logprobs.restrict_to_support, fullgraph=True)(logits, **spec)
    torch.testing.assert_close(compiled, restrict(logits, spec))


@pytest.mark.parametrize(
    ("logits", "changed", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, TypeError, "logits has dtype"),
        (torch.tensor(0.0), {}, ValueError, "logits has no axes"),
        (torch.zeros(3), {"temperature": 0.0}, ValueError, "temperature is 0.0"),
        (torch.zeros(3), {"top_k": -1}, ValueError, "top_k is -1"),
        (torch.zeros(3), {"top_p": 1.5}, ValueError, "top_p is 1.5"),
    ],
)
def test_bad_arguments(logits, changed, error, message):
    """Every unusable argument is refused by name."""
    with pytest.raises(error, match=message):
        restrict(logits, {"temperature": 1.0, "top_k": None, "top_p": None} | changed)
