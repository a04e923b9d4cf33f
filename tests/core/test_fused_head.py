"""Properties of the fused head: nothing but the dense head, in less memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, POSITIVE, UNIT, Case, gradient, tensors, turned_product
from tests.core.subject import only_ours, subject
from tests.operations import Operations

PLAIN = {"temperature": 1.0, "scale": 1.0, "softcap": None, "product": torch.mm}
either_way = pytest.mark.parametrize("keep_logits", [False, True])


@st.composite
def heads(draw, rows=None):
    """A head with a bias, some rows to score, and how they are scored."""
    n, width, vocab = rows or draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    small = NUMBERS.map(lambda x: x / 8)
    return Case(
        hidden=draw(tensors(n, width, numbers=small)),
        weight=draw(tensors(vocab, width, numbers=small)),
        tokens=torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))),
        bias=draw(tensors(vocab, numbers=small)),
        spec={
            "temperature": draw(POSITIVE),
            "scale": draw(POSITIVE),
            "softcap": draw(st.none() | POSITIVE),
        },
        tiles={
            "chunk_size": draw(st.sampled_from((1, n, n + 1, vocab, vocab + 1))),
            "keep_logits": draw(st.booleans()),
            "product": draw(st.sampled_from((torch.mm, turned_product))),
        },
    )


def score(case, **changed):
    """The function under test on a case, with some arguments changed."""
    given_ = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias} | changed
    return subject.fused_head.fused_logprobs(
        given_["hidden"], given_["weight"], case.tokens, given_["bias"], **case.spec, **case.tiles
    )


def dense(hidden, weight, tokens, bias, *, temperature, scale, softcap):
    """The same by explicit probabilities over the whole vocabulary."""
    logits = torch.einsum("nh,vh->nv", hidden, weight) + (0.0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (1 - 2 / (torch.exp(2 * logits / softcap) + 1))
    weights = torch.exp((logits - logits.detach().amax(1, keepdim=True)) / temperature)
    p = weights / weights.sum(1, keepdim=True)
    surprises = torch.where(p > 0, -p * torch.where(p > 0, p, 1.0).log(), 0.0)
    return p[torch.arange(len(tokens)), tokens].log(), surprises.sum(1)


@given(case=heads())
def test_chunked_equals_dense(case):
    """For every chunk size, 1, N and N + 1 among them, both outputs are those of the dense head."""
    assert_close(tuple(score(case)), dense(case.hidden, case.weight, case.tokens, case.bias, **case.spec), scale=1e2)


@given(case=heads(), incoming=tensors(2, 4))
def test_gradients_equal_dense(case, incoming):
    """The gradient of either output by hidden states, weight and bias is that of the dense head."""
    for name in ("hidden", "weight", "bias"):
        for output in (0, 1):
            factors = incoming[output, : len(case.tokens)]

            def fused(x, name=name, output=output, factors=factors):
                return (score(case, **{name: x})[output] * factors).sum()

            def full(x, name=name, output=output, factors=factors):
                given_ = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias} | {name: x}
                outputs = dense(given_["hidden"], given_["weight"], case.tokens, given_["bias"], **case.spec)
                return (outputs[output] * factors).sum()

            x = getattr(case, name)
            assert_close(gradient(fused, x), gradient(full, x), scale=1e3)


@given(case=heads(), incoming=tensors(2, 2, 4))
def test_kept_equals_recomputed(case, incoming):
    """Keeping the logits changes nothing, in value or gradient, nor in the gradient of a graph that is retained."""

    def run(keep_logits):
        case.tiles["keep_logits"] = keep_logits
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("hidden", "weight", "bias")}
        out = score(case, **leaves)
        factors = incoming[..., : len(case.tokens)]
        sums = [(out.logprobs * by[0]).sum() + (out.entropy * by[1]).sum() for by in factors]
        first = torch.autograd.grad(sums[0], leaves.values(), retain_graph=True)
        return (*out, *first, *torch.autograd.grad(sums[1], leaves.values()))

    assert_close(run(True), run(False), scale=1e3)


@given(case=heads())
def test_gradcheck(case):
    """Numerical and analytical derivatives agree in float64, for both outputs and all three inputs."""
    case.spec["temperature"], case.spec["scale"] = 1.25, 0.75
    inputs = [x.clone().requires_grad_(True) for x in (case.hidden, case.weight, case.bias)]
    assert gradcheck(lambda h, w, b: tuple(score(case, hidden=h, weight=w, bias=b)), inputs)


@given(case=heads())
def test_no_bias_is_a_zero_bias(case):
    """Without a bias the result is that of a bias of zeros."""
    assert_close(tuple(score(case, bias=None)), tuple(score(case, bias=torch.zeros_like(case.bias))))


@given(case=heads())
def test_bounds(case):
    """Log-probabilities are at most 0, and entropies lie in [0, log vocab]."""
    logprobs, entropy = score(case)
    assert (logprobs <= 1e-12).all()
    assert (entropy >= -1e-9).all()
    assert (entropy <= math.log(len(case.bias)) + 1e-9).all()


@given(case=heads(), shift=NUMBERS)
def test_shift_invariance(case, shift):
    """Without a softcap, adding one number to every bias changes nothing."""
    case.spec["softcap"] = None
    assert_close(tuple(score(case, bias=case.bias + shift)), tuple(score(case)), scale=1e4)


@given(case=heads(), data=st.data())
def test_row_order_and_shape(case, data):
    """Rows are scored independently: any order, and any leading shape, gives the same numbers."""
    order = torch.tensor(data.draw(st.permutations(range(len(case.tokens)))))
    shuffled = case.but(hidden=case.hidden[order], tokens=case.tokens[order])
    assert_close(score(shuffled).logprobs, score(case).logprobs[order])
    shaped = case.but(hidden=case.hidden[None, :, None], tokens=case.tokens[None, :, None])
    assert_close(score(shaped).entropy[0, :, 0], score(case).entropy)


@given(case=heads(rows=2))
def test_ruled_out_token(case):
    """A bias of -inf gives probability 0: the rest of the vocabulary is scored as if the entry were not there."""
    case.spec["softcap"] = None
    wide = case.but(
        weight=torch.cat((case.weight, torch.ones_like(case.weight[:1]))),
        bias=torch.cat((case.bias, torch.full_like(case.bias[:1], -torch.inf))),
    )
    assert_close(tuple(score(wide)), tuple(score(case)))
    assert_close(
        gradient(lambda w: sum(x.sum() for x in score(wide, weight=w)), wide.weight)[:-1],
        gradient(lambda w: sum(x.sum() for x in score(case, weight=w)), case.weight),
        scale=1e2,
    )
    assert (gradient(lambda w: sum(x.sum() for x in score(wide, weight=w)), wide.weight)[-1] == 0).all()


@given(case=heads(rows=2), offset=UNIT)
def test_function_transforms(case, offset):
    """Mapping over hidden states, over the weight, and the gradient or Jacobian of each, equal a loop."""
    hidden, weight = (torch.stack((x, x + offset, 0.5 * x)) for x in (case.hidden, case.weight))

    def entropies(h, w):
        return score(case, hidden=h, weight=w).entropy

    def weighted(h, w):
        out = score(case, hidden=h, weight=w)
        return out.logprobs.sum() + out.entropy.square().sum()

    for function in (entropies, torch.func.grad(weighted), torch.func.grad(weighted, 1), torch.func.jacrev(entropies)):
        both = torch.func.vmap(function)(hidden, weight)
        assert_close(both, torch.stack([function(h, w) for h, w in zip(hidden, weight, strict=True)]))
        shared = torch.func.vmap(function, in_dims=(0, None))(hidden, case.weight)
        assert_close(shared, torch.stack([function(h, case.weight) for h in hidden]))


@given(case=heads(), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_half_precision(case, dtype):
    """Half-precision inputs are widened first: the result is float32 and equals that of the widened inputs."""
    rounded = case.but(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype), bias=case.bias.to(dtype))
    exact = case.but(hidden=rounded.hidden.double(), weight=rounded.weight.double(), bias=rounded.bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = score(rounded)
    assert actual.logprobs.dtype == actual.entropy.dtype == torch.float32
    assert_close(tuple(actual), tuple(score(exact)), scale=1e3)


@either_way
def test_autocast_changes_nothing(keep_logits):
    """Under autocast float32 is not rounded to bfloat16: values and gradients are the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)

    def run(enabled):
        parts = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = subject.fused_head.fused_logprobs(
                *parts, torch.tensor([0, 4, 2]), **PLAIN, chunk_size=2, keep_logits=keep_logits
            )
            return [*out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), parts)]

    for inside, outside in zip(run(True), run(False), strict=True):
        assert torch.equal(inside, outside)


@either_way
def test_frozen_weight_gets_no_gradient(keep_logits):
    """Only what requires a gradient is given one, and the others' products are not computed."""
    hidden, weight = torch.randn(3, 2).requires_grad_(), torch.randn(5, 2)
    logprobs, _ = subject.fused_head.fused_logprobs(
        hidden, weight, torch.tensor([0, 4, 2]), **PLAIN, chunk_size=2, keep_logits=keep_logits
    )
    (by_hidden,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert by_hidden.shape == hidden.shape
    assert weight.grad is None


@either_way
def test_no_rows(keep_logits):
    """No rows give no numbers, and a weight gradient of zeros."""
    weight = torch.randn(5, 2).requires_grad_()
    out = subject.fused_head.fused_logprobs(
        torch.zeros(0, 2),
        weight,
        torch.zeros(0, dtype=torch.int64),
        **PLAIN,
        chunk_size=2,
        keep_logits=keep_logits,
    )
    assert out.logprobs.shape == out.entropy.shape == (0,)
    (by_weight,) = torch.autograd.grad(out.entropy.sum(), weight)
    assert (by_weight == 0).all()


@either_way
def test_second_derivative_is_refused(keep_logits):
    """A second derivative raises instead of being silently wrong."""
    hidden = torch.randn(3, 2).requires_grad_()
    logprobs, _ = subject.fused_head.fused_logprobs(
        hidden, torch.randn(5, 2), torch.tensor([0, 4, 2]), **PLAIN, chunk_size=2, keep_logits=keep_logits
    )
    (first,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def operations_of(rows, vocab, keep_logits, frozen=(), chunk_size=10):
    """What a forward and a backward pass ask of torch."""
    parts = {"hidden": torch.randn(rows, 2), "weight": torch.randn(vocab, 2)}
    for name, part in parts.items():
        part.requires_grad_(name not in frozen)
    with Operations() as operations:
        out = subject.fused_head.fused_logprobs(
            *parts.values(), torch.arange(rows), **PLAIN, chunk_size=chunk_size, keep_logits=keep_logits
        )
        (out.logprobs + out.entropy).sum().backward()
    return operations


def test_tiles_never_hold_the_whole_vocabulary():
    """No intermediate, forward or backward, has as many entries as [rows, vocab]."""
    assert operations_of(64, 100, keep_logits=False).largest().numel <= 64 * 10


def test_kept_logits_are_held_once():
    """Kept logits are the one tensor with as many entries as [rows, vocab], forward and backward."""
    made = [shape.numel() for operation in operations_of(64, 100, keep_logits=True).ran for shape in operation.made]
    assert [numel for numel in made if numel > 64 * 10] == [64 * 100]


@only_ours
@pytest.mark.parametrize(("frozen", "products"), [((), 4), (("weight",), 3), (("hidden",), 3)])
def test_products_for_a_frozen_part_are_not_made(frozen, products):
    """One product per tile forward, and backward one to have the logits again and one for each part that learns."""
    operations = operations_of(3, 5, keep_logits=False, frozen=frozen, chunk_size=5)
    assert operations.count("mm", "addmm", "addmm_") == products


@only_ours
def test_kept_logits_save_a_product():
    """Where the logits are kept, no product is made to have them again."""
    for frozen, products in {(): 3, ("weight",): 2, ("hidden",): 2}.items():
        operations = operations_of(3, 5, keep_logits=True, frozen=frozen, chunk_size=5)
        assert operations.count("mm", "addmm", "addmm_") == products


@only_ours
def test_products_are_made_by_what_is_given():
    """Every product of a forward and a backward pass is made by the function that the caller names."""
    hidden, weight = torch.randn(3, 2).requires_grad_(), torch.randn(5, 2).requires_grad_()
    shapes = []

    def product(a, b, *, out=None):
        shapes.append((*a.shape, b.shape[1]))
        found = (a.unsqueeze(2) * b).sum(1)
        return found if out is None else out.copy_(found)

    with Operations() as operations:
        out = subject.fused_head.fused_logprobs(
            hidden, weight, torch.tensor([0, 4, 2]), **PLAIN | {"product": product}, chunk_size=5, keep_logits=False
        )
        (out.logprobs + out.entropy).sum().backward()
    assert shapes == [(3, 2, 5), (3, 2, 5), (3, 5, 2), (5, 3, 2)]
    assert operations.count("mm", "addmm", "addmm_", "bmm") == 0


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "hidden has dtype"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight has shape \(5, 3\), expected \(vocab, 2\) like hidden"),
        ({"weight": torch.zeros(2)}, ValueError, "weight has shape"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens has dtype"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, ValueError, "tokens has shape"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, TypeError, "bias has dtype"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ],
)
def test_bad_arguments(changed, error, message):
    """Every unusable argument is refused by name."""
    data = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "tokens": torch.tensor([0, 1, 2]), "bias": None}
    given_ = data | PLAIN | {"chunk_size": 2, "keep_logits": False} | changed
    with pytest.raises(error, match=message):
        subject.fused_head.fused_logprobs(*[given_.pop(name) for name in data], **given_)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.compiled
@either_way
def test_compiled_equals_eager(keep_logits):
    """One graph gives the same outputs and gradients as eager execution."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 4), torch.randn(11, 4), torch.randn(11)
    tokens = torch.tensor([0, 3, 10, 5, 4, 7])

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        spec = {"temperature": 0.7, "scale": 1.0, "softcap": 2.0, "chunk_size": 4, "keep_logits": keep_logits}
        spec["product"] = torch.mm
        out = function(*leaves[:2], tokens, leaves[2], **spec)
        return out, torch.autograd.grad(out.logprobs.sum() + out.entropy.square().sum(), leaves)

    function = subject.fused_head.fused_logprobs
    (compiled, compiled_grads), (eager, eager_grads) = run(torch.compile(function, fullgraph=True)), run(function)
    assert_close(tuple(compiled), tuple(eager))
    assert_close(compiled_grads, eager_grads)
