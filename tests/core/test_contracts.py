"""What every function of a kind has in common. The functions are discovered: see contracts.py."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import contracts
from tests.core.close import assert_close
from tests.core.contracts import FUNCTIONS, calls, gradients, leaves, magnitude, weighted_sum

GARBAGE = (1e30, math.inf, -math.inf, math.nan)

# Forty functions share each contract, and a contract is about shapes, of which there are few.
FEW = settings(max_examples=max(8, settings().max_examples // 8))
FEWER = settings(max_examples=max(4, settings().max_examples // 20))


def of_kind(paths):
    return pytest.mark.parametrize("path", paths)


def same(left, right, scale=None):
    """Results equal up to rounding, entry by entry, infinities included."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        infinite = b.isinf() if b.dtype.is_floating_point else torch.zeros_like(b, dtype=torch.bool)
        assert a.shape == b.shape
        assert torch.equal(a[infinite].double(), b[infinite].double())
        assert_close(
            a.masked_fill(infinite, 0) if a.dtype.is_floating_point else a,
            b.masked_fill(infinite, 0),
            scale=magnitude(right) if scale is None else scale,
        )


def identical(left, right):
    """Results equal to the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_public_function_is_under_contract():
    """Every public function of ppo_core takes tensors and so is under contract, or is exempt for a stated reason."""
    assert set(FUNCTIONS) == set(contracts.NUMERIC) | set(contracts.EXEMPT)
    assert len(contracts.NUMERIC) > 20
    assert {"advantages.gae", "masking.masked_mean"} <= set(contracts.MASKED)
    assert "scan.linear_recurrence" in contracts.STEPWISE


# Masks


@of_kind(contracts.MASKED)
@FEW
@given(data=st.data())
def test_deletion(path, data):
    """A masked position is deleted: f(x, mask)[mask] == f(x[mask])."""
    call = data.draw(calls(path, batch=()), label="call")
    kept = call.mask.nonzero().view(-1)
    deleted = call.but(lambda x: x.index_select(0, kept), where=call.function.has_steps)
    selected = [x[call.mask] if call.is_stepwise(x) else x for x in call()]
    same(selected, deleted())


@of_kind(contracts.MASKED)
@FEW
@given(data=st.data(), front=st.integers(0, 3), back=st.integers(0, 3), garbage=st.sampled_from(GARBAGE))
def test_padding(path, data, front, back, garbage):
    """Masked columns in front of a batch or behind it change nothing, whatever is in them."""
    call = data.draw(calls(path), label="call")
    at = len(call.batch)

    def pad(x):
        def fill(columns):
            shape = (*x.shape[:at], columns, *x.shape[at + 1 :])
            return x.new_full(shape, garbage if x.dtype.is_floating_point else False)

        return torch.cat((fill(front), x, fill(back)), dim=at)

    padded = call.but(pad, where=call.function.has_steps)
    padded = contracts.replace(padded, time=call.time + front + back)
    cut = [x.narrow(at, front, call.time) if padded.is_stepwise(x) else x for x in padded()]
    same(cut, call())


@of_kind(contracts.MASKED)
@FEW
@given(data=st.data())
def test_nothing_under_the_mask(path, data):
    """What is answered at a masked position is exactly 0, or False."""
    call = data.draw(calls(path), label="call")
    for result in call():
        if call.is_stepwise(result):
            assert not result[~call.mask].any()


@of_kind(contracts.MASKED)
@FEW
@given(data=st.data(), garbage=st.sampled_from(GARBAGE))
def test_garbage_under_the_mask(path, data, garbage):
    """1e30, inf and NaN under the mask change no result, get exactly no gradient and leave that of the others alone."""
    call = data.draw(calls(path), label="call")

    def spoil(x):
        hidden = ~call.mask.view(*call.mask.shape, *[1] * (x.ndim - call.mask.ndim))
        return x.masked_fill(hidden, garbage)

    spoilt = call.but(spoil, where=lambda p: call.function.has_steps(p) and p.what == "float")
    identical(spoilt(), call())
    before, after = gradients(call), gradients(spoilt)
    for p in call.function.tensors:
        if p.name in after:
            identical(after[p.name], before[p.name])
            if call.function.has_steps(p):
                assert not after[p.name][0][~call.mask].any()


@of_kind(contracts.MASKED)
@FEWER
@given(data=st.data())
def test_an_empty_mask_is_defined(path, data):
    """Where nothing is kept the results are finite, and so are the gradients, which are 0."""
    call = data.draw(calls(path, density=0.0), label="call")
    assert all(x.isfinite().all() for x in call() if x.dtype.is_floating_point)
    for name, slopes in gradients(call).items():
        assert all(slope.isfinite().all() for slope in slopes), name


# Axes


@of_kind(contracts.STEPWISE)
@FEWER
@given(data=st.data())
def test_no_steps_are_defined(path, data):
    """An empty time axis, or a batch without rows, gives empty results or the defined value of nothing: never NaN."""
    for batch, time in ((data.draw(st.sampled_from(((), (2,)))), 0), ((0,), 3)):
        call = data.draw(calls(path, batch=batch, time=time), label="call")
        assert all(x.isfinite().all() for x in call() if x.dtype.is_floating_point)
        assert all(slope.isfinite().all() for slopes in gradients(call).values() for slope in slopes)


@of_kind(contracts.BATCHED)
@FEW
@given(data=st.data(), order=st.permutations(range(3)))
def test_order_of_rows_does_not_matter(path, data, order):
    """Rows given in another order are answered in that order, and what is reduced over rows stays the same."""
    call = data.draw(calls(path, batch=(3,)), label="call")
    permuted = call.but(
        lambda x: x[list(order)], where=lambda p: p.many or (p.what == "bundle" and not call.function.tensors)
    )
    same(permuted(), [x[list(order)] if x.ndim and x.shape[0] == 3 else x for x in call()])


@of_kind(contracts.BATCHED)
@FEW
@given(data=st.data())
def test_vmap_batch_and_loop_agree(path, data):
    """A function of one sequence, mapped by vmap, run in a loop or given the batch at once, answers the same."""
    rows = data.draw(st.sampled_from((3, 1)), label="rows")
    call = data.draw(calls(path, batch=(rows,)), label="call")

    def is_mapped(p):
        is_given = isinstance(call.arguments[p.name], (torch.Tensor, tuple))
        return is_given and (p.many or (p.what == "bundle" and not call.function.tensors))

    names = [p.name for p in call.function.parameters if is_mapped(p)]

    def one(*mapped):
        return tuple(call(**dict(zip(names, mapped, strict=True))))

    mapped = [call.arguments[name] for name in names]
    loop = [
        list(
            one(
                *(
                    value[row] if isinstance(value, torch.Tensor) else type(value)(*(x[row] for x in value))
                    for value in mapped
                )
            )
        )
        for row in range(rows)
    ]
    stacked = [torch.stack(results) for results in zip(*loop, strict=True)]
    same(list(torch.func.vmap(one)(*mapped)), stacked)
    whole = call()
    if all(x.shape == y.shape for x, y in zip(whole, stacked, strict=True)):
        same(whole, stacked)


@of_kind(contracts.BATCHED)
@FEWER
@given(data=st.data())
def test_strides_do_not_matter(path, data):
    """Views with any strides are answered like fresh tensors."""
    call = data.draw(calls(path), label="call")

    def view(x):
        return torch.stack((x, torch.zeros_like(x)), dim=-1).flip(0)[..., 0].flip(0) if x.ndim else x

    same(call.but(view, where=lambda p: p.is_tensor)(), call())


# Purity


@of_kind(contracts.NUMERIC)
@FEWER
@given(data=st.data())
def test_arguments_are_left_alone(path, data):
    """No argument is changed, in the forward pass or in the backward pass."""
    call = data.draw(calls(path), label="call")
    before = [x.clone() for value in call.arguments.values() for x in leaves(value)]
    versions = [x._version for value in call.arguments.values() for x in leaves(value)]
    call()
    gradients(call)
    after = [x for value in call.arguments.values() for x in leaves(value)]
    identical(after, before)
    assert [x._version for x in after] == versions


@of_kind(contracts.NUMERIC)
@FEWER
@given(data=st.data())
def test_no_random_number_is_drawn(path, data):
    """The random state is as it was, and a second call answers the same to the last bit."""
    call = data.draw(calls(path), label="call")
    before = torch.get_rng_state()
    first = call()
    assert torch.equal(torch.get_rng_state(), before)
    identical(call(), first)


@of_kind(contracts.NUMERIC)
def test_the_device_is_that_of_the_arguments(path):
    """Arguments on another device are answered there, in the same shapes, and no value is asked for on the way."""
    call = example(path)
    moved = call.but(lambda x: x.to("meta"), where=lambda p: p.is_tensor or p.what == "bundle")
    for there, here in zip(moved(), call(), strict=True):
        assert there.device.type == "meta"
        assert there.shape == here.shape


# Precision


@of_kind(contracts.DIFFERENTIABLE)
@FEW
@given(data=st.data(), dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
def test_narrow_inputs_are_computed_in_float32(path, data, dtype):
    """bfloat16, float16 and float32 are answered in float32, within its tolerance of float64 on the same input."""
    call = data.draw(calls(path, rounded=True), label="call")
    narrow = call.but(
        lambda x: x.to(dtype if x.dtype.is_floating_point else x.dtype), where=lambda p: p.what == "float"
    ).but(lambda x: x.float(), where=lambda p: p.what == "bundle")
    got = narrow()
    assert all(x.dtype in (torch.float32, torch.bool) for x in got)
    same(got, call())


@of_kind(contracts.DIFFERENTIABLE)
def test_dtypes_can_be_mixed(path):
    """One argument in bfloat16 beside others in float64 is widened to theirs, in value and in the gradient's sense."""

    def is_float(p):
        return p.what == "float"

    call = example(path).but(lambda x: x.bfloat16().double(), where=is_float)
    narrow = [p.name for p in call.function.parameters if is_float(p)]
    for name in narrow if len(call.floats) > 1 else ():
        mixed = call.but(lambda x: x.bfloat16(), where=lambda p, name=name: p.name == name)
        same(mixed(), call())
        # Statistics in a bundle may be wider than what they are applied to.
        assert len(narrow) == 1 or all(x.dtype in (torch.float64, torch.bool) for x in mixed())
        gradients(mixed)


@of_kind(contracts.DIFFERENTIABLE)
@FEWER
@given(data=st.data())
def test_float64_stays_float64(path, data):
    """float64 is answered in float64, and as accurately: float64 beside it does not lose to anything narrower."""
    call = data.draw(calls(path), label="call")
    assert all(x.dtype in (torch.float64, torch.bool) for x in call())


# Derivatives


@of_kind(contracts.DIFFERENTIABLE)
@FEWER
@given(data=st.data(), time=st.integers(1, 3))
def test_gradient_is_that_of_the_value(path, data, time):
    """Gradients agree with finite differences in float64 and with torch.func.grad; those by a target are exactly 0."""
    call = data.draw(calls(path, batch=(2,), time=time), label="call")
    slopes = gradients(call)
    targets = contracts.TARGETS.get(path, ())
    assert not any(slope.any() for name in targets for slope in slopes[name])
    tracked = {
        name: contracts.map_tensors(lambda x: x.clone().requires_grad_(True), x) for name, x in call.floats.items()
    }
    differentiable = [i for i, result in enumerate(call(**tracked)) if result.requires_grad]
    moving = [name for name in slopes if name not in targets]
    if not differentiable:
        return

    def total(*inputs):
        position = iter(inputs)
        rebuilt = {name: contracts.map_tensors(lambda _: next(position), call.floats[name]) for name in moving}
        results = call(**rebuilt)
        return weighted_sum([results[i] for i in differentiable])

    inputs = [x for name in moving for x in leaves(call.floats[name])]
    by_func = torch.func.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
    same(list(by_func), [slope for name in moving for slope in slopes[name]])
    if path in contracts.STRAIGHT_THROUGH:
        return
    assert torch.autograd.gradcheck(total, [x.clone().requires_grad_(True) for x in inputs])


# Bad input. Each argument is spoilt in turn, and the message has to name it.


def example(path):
    """One fixed call with two rows of three steps, every optional argument given."""
    return contracts.example(path, batch=(2,), time=3)


def refuses(path, kinds, spoil, error):
    """Every argument of some kinds, once spoilt, is refused with an error that names it. Answers how many were.

    With all optional arguments given, and with none.
    """
    refused, whole = 0, example(path)
    bare = contracts.replace(
        whole, arguments={p.name: None if p.optional else whole.arguments[p.name] for p in whole.function.parameters}
    )
    for call, p in itertools.product((whole, bare), FUNCTIONS[path].parameters):
        is_there = p.what in kinds and call.arguments[p.name] is not None
        for wrong in spoil(p, call.arguments[p.name]) if is_there else ():
            with pytest.raises(error, match=rf"^{p.name} (is|has) | like {p.name}\b") as caught:
                call(**{p.name: wrong})
            says_what_to_do(path, str(caught.value))
            kind = f" is a {type(wrong).__name__}, expected a torch.Tensor"
            assert isinstance(wrong, torch.Tensor) or kind in str(caught.value)
            refused += 1
    return refused


def says_what_to_do(path, message):
    """An error names an argument, what it is and what was expected, and so another argument to be like, or an axis."""
    names = "|".join(re.escape(p.name) for p in FUNCTIONS[path].parameters)
    assert re.match(rf"({names})(\.\w+)? (is|has) .*expected ", message), message
    _, _, other = message.partition(" like ")
    field = r"(\.\w+)?"
    advice = rf"; move it with \w+{field}\.to\(({names}){field}\.device\)"
    assert not other or re.match(rf"({names}){field}( without its \w+ axis)?({advice})?$", other), message
    axes = {p.name: p.dims[-1] for p in FUNCTIONS[path].tensors if p.dims}
    for name, axis in re.findall(r"(\w+) without its (\w+) axis", message):
        assert axis == axes[name], message
    for axis, name in re.findall(r"expected \[\*batch, (\w+)\]; add one with (\w+)\[None\]", message):
        assert axis == axes[name], message


@of_kind(contracts.NUMERIC)
def test_wrong_dtype_is_refused(path):
    """Integers for numbers, numbers or integers for a mask, floats or int32 for token ids: TypeError, by name."""
    wrong = {
        "float": (torch.int64, torch.bool, torch.complex64),
        "bool": (torch.int64, torch.uint8, torch.float32),
        "int": (torch.int32, torch.float32, torch.bool),
    }
    refuses(path, wrong, lambda p, x: [x.to(dtype) for dtype in wrong[p.what]], TypeError)


@of_kind(contracts.NUMERIC)
def test_what_is_no_tensor_is_refused(path):
    """A list or a number where a tensor belongs: TypeError, by name."""
    refuses(path, ("float", "bool", "int"), lambda p, x: [] if p.or_number else [x.tolist(), 1.0], TypeError)


@of_kind(contracts.NUMERIC)
def test_wrong_shape_is_refused(path):
    """One entry more, one less, or a length of 1 that could be broadcast, along any axis: ValueError, by name."""

    tensors = FUNCTIONS[path].tensors

    def spoil(p, x):
        for axis in range(x.ndim):
            dim = p.dims[max(0, len(p.dims) - x.ndim + axis)]
            for other in (x.shape[axis] + 1, x.shape[axis] - 1, 1):
                if other != x.shape[axis] and any(dim in q.dims for q in tensors if q is not p and not q.optional):
                    yield torch.cat((x, x), dim=axis).narrow(axis, 0, other)

    assert refuses(path, ("float", "bool", "int"), spoil, ValueError) or len(tensors) < 2


@of_kind(contracts.NUMERIC)
def test_wrong_rank_is_refused(path):
    """An axis too many or too few: ValueError, by name, unless a single tensor may have any shape."""
    tensors = FUNCTIONS[path].tensors
    if len(tensors) > 1:
        assert refuses(
            path, ("float", "bool", "int"), lambda _, x: [x[None], x.new_zeros(())][: 1 + x.ndim], ValueError
        )
    elif tensors and len(tensors[0].dims) > 1:
        assert refuses(path, ("float", "bool", "int"), lambda _, x: [x.new_zeros(())], ValueError)


@of_kind(contracts.INWARD)
def test_numbers_in_place_of_all_tensors_are_refused(path):
    """Where one argument has an axis that another lacks, tensors without any axes have no such axis: ValueError."""
    call, axis = example(path), FUNCTIONS[path].inner_axis
    numbers = {p.name: call.arguments[p.name].new_zeros(()) for p in FUNCTIONS[path].tensors if p.many}
    bare = {p.name: None for p in FUNCTIONS[path].parameters if p.optional}
    for arguments in (numbers, numbers | bare):
        with pytest.raises(ValueError, match=rf" has no axes, expected \[\*batch, {axis}\]") as caught:
            call(**arguments)
        says_what_to_do(path, str(caught.value))


@of_kind(contracts.NUMERIC)
def test_wrong_device_is_refused(path):
    """A tensor on another device than the others: ValueError, by name."""
    if len(FUNCTIONS[path].tensors) > 1:
        assert refuses(path, ("float", "bool", "int"), lambda _, x: [x.to("meta")], ValueError)


@of_kind([path for path in contracts.NUMERIC if any(p.what == "bundle" for p in FUNCTIONS[path].parameters)])
def test_broken_bundles_are_refused(path):
    """A field of a bundle that is no number, has another shape or is on another device: refused, by name."""
    for p in FUNCTIONS[path].parameters:
        if p.what != "bundle":
            continue
        call = example(path)
        bundle = call.arguments[p.name]
        for field in bundle._fields:
            for change, error in (
                (lambda x: x.long(), TypeError),
                (lambda x: x.tolist(), TypeError),
                (lambda x: x.new_zeros((5, 4)), ValueError),
                (lambda x: x.to("meta"), ValueError),
            ):
                broken = bundle._replace(**{field: change(getattr(bundle, field))})
                with pytest.raises(error, match=rf"\b{p.name}\.{field}\b"):
                    call(**{p.name: broken})
        for wrong in (tuple(bundle), list(bundle), None):
            with pytest.raises(TypeError, match=rf"^{p.name} is a {type(wrong).__name__}, expected "):
                call(**{p.name: wrong})
        # Fields that agree with one another, but not with the other arguments.
        if len(call.floats) > 1:
            for change in (lambda x: x.to("meta"), lambda x: x.new_ones((5, 4))):
                with pytest.raises(ValueError, match=rf"\b{p.name}\.\w+ (is|has) |\blike {p.name}\b") as caught:
                    call(**{p.name: contracts.map_tensors(change, bundle)})
                says_what_to_do(path, str(caught.value))
