"""Properties of kernel normalization over its whole argument space, checked on drawn cases.

The cases are the same in every run. PROPERTY_CASES sets how many there are, 2000 by default.
"""
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mmseg_kn import KernelNorm2d, KNConv2d
from mmseg_kn.ops import fused, kernel_norm2d, kn_conv2d, unfolded
from mmseg_kn.ops.geometry import make_geometry
from mmseg_kn.ops.memory_format import dense_like
from mmseg_kn.ops.passes import MomentGrads

CASES = int(os.environ.get('PROPERTY_CASES', 2000))
LAYOUTS = ('contiguous', 'channels_last', 'columns', 'rows and columns', 'transposed')
DATA = ('normal', 'shifted', 'ties')
FINISHES = (None, 'relu', 'residual')
HALVES = (torch.bfloat16, torch.float16)
DROPOUT = st.sampled_from([0.0, 0.05, 0.3, 0.9])


@pytest.fixture(autouse=True, params=[0, 2**40], ids=['closed form', 'units'])
def largest_tiny(request, monkeypatch):
    """All inputs here are tiny: 'fused' takes them in closed form, and by their units."""
    monkeypatch.setattr(unfolded, 'LARGEST', request.param)


def cases_of(share, *strategies):
    """Runs the test on ``share`` percent of the cases."""
    def decorate(test):
        return settings(max_examples=max(1, CASES * share // 100), deadline=None, derandomize=True,
                        database=None, suppress_health_check=list(HealthCheck))(
                            given(*strategies)(test))
    return decorate


# Cases: plain values, from which tensors are made, so that a failure prints all that it needs.


def one_or_two(minimum, maximum):
    number = st.integers(minimum, maximum)
    return number | st.tuples(number, number)


@st.composite
def windows(draw, dilated=True, paddings=None):
    """Arguments of a window and a size of image on which it has one unit or more."""
    kernel = draw(one_or_two(1, 4))
    options = dict(stride=draw(one_or_two(1, 3)))
    if dilated:
        options['dilation'] = draw(one_or_two(1, 3))
    side = st.integers(0, 3)
    words = ['valid', 'same'] if options['stride'] in (1, (1, 1)) else ['valid']
    if paddings is None:
        paddings = one_or_two(0, 3) | st.tuples(side, side, side, side)
        paddings = paddings | st.sampled_from(words) if dilated else paddings
    options['padding'] = draw(paddings)
    geometry = make_geometry(kernel, **options)
    left, right, top, bottom = geometry.padding
    size = [max(1, d * (k - 1) + 1 - pad) + draw(st.integers(0, 5)) for k, d, pad in
            zip(geometry.kernel, geometry.dilation, (top + bottom, left + right), strict=True)]
    return dict(kernel=kernel, size=tuple(size), options=options)


@st.composite
def cases(draw, finishes=FINISHES, layouts=LAYOUTS, data=DATA, **kwargs):
    """A convolution. In training dropout is left to the tests: each call draws its own."""
    case = draw(windows(**kwargs))
    training = draw(st.booleans())
    case.update(
        batch=draw(st.integers(1, 3)), groups=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 4)), filters=draw(st.integers(1, 3)),  # of each group
        bias=draw(st.booleans()), finish=draw(st.sampled_from(finishes)),
        layout=draw(st.sampled_from(layouts)), data=draw(st.sampled_from(data)),
        training=training, seed=draw(st.integers(0, 2**31)),
        dropout_p=0.0 if training else draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])))
    return case


def laid_out(x, layout):
    """The values of ``x`` in another order in memory, or with gaps."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'columns':
        return x.repeat_interleave(2, 3)[..., ::2]
    if layout == 'rows and columns':
        return F.pad(x, (1, 2, 3, 1), value=7.)[..., 3:-1, 1:-2]
    if layout == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def images(case, generator, channels):
    shape = (case['batch'], channels, *case['size'])
    if case['data'] == 'ties':  # units that are constant among them
        return torch.randint(-1, 1, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 5 * (
        case['data'] == 'shifted')


def make(case, dtype=torch.float64, **changes):
    """Input, weight, bias and residual of a case (or None), and the arguments of kn_conv2d."""
    generator = torch.Generator().manual_seed(case['seed'])
    groups, filters = case['groups'], case['groups'] * case['filters']
    kernel = make_geometry(case['kernel']).kernel

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [images(case, generator, groups * case['channels']),
               randn(filters, case['channels'], *kernel),
               randn(filters) if case['bias'] else None, None]
    options = dict(case['options'], groups=groups, dropout_p=case['dropout_p'],
                   training=case['training'], **changes)
    if case['finish'] == 'residual':
        rows, columns = make_geometry(kernel, **case['options']).output_size(*case['size'])
        tensors[3] = laid_out(randn(case['batch'], filters, rows, columns), case['layout'])
    elif case['finish']:
        options['activation'] = case['finish']
    tensors[0] = laid_out(tensors[0], case['layout'])
    return [None if t is None else t.to(dtype) for t in tensors], options


def call(tensors, options):
    return kn_conv2d(*tensors[:3], residual=tensors[3], **options)


def output_and_gradients(tensors, options, grad=None):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = call(leaves, options)
    y.backward(torch.ones_like(y) if grad is None else grad)
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def upstream(tensors, options):
    """A gradient of the output, 0 where a ReLU is at its kink: rounding decides what passes it."""
    y = call(tensors, dict(options, activation=None, impl='reference'))
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    return (grad * (y.abs() > 1e-6)).to(y.dtype)


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=tolerance, rtol=tolerance)


def moments(x, case):
    """1 / sqrt(var + eps) of each unit, (N, 1, Ho, Wo), by definition."""
    geometry, p = make_geometry(case['kernel'], **case['options']), case['dropout_p']
    units = F.unfold(F.pad(x.double(), geometry.padding), geometry.kernel, geometry.dilation,
                     stride=geometry.stride)
    factor = 1.0 if case['training'] else (1 - p / units.size(1)) / (1 - p)
    var = factor * units.square().mean(1) - units.mean(1).square()
    return (var.clamp(min=0) + 1e-5).rsqrt().view(
        len(x), 1, *geometry.output_size(*case['size']))


def mask(x, dropped, p):
    """What fused keeps of ``x``, 1 or 0, as its backward sees it."""
    n, c, h, w = x.shape
    one = torch.full((n, h, w), c, dtype=x.dtype)
    return fused.add_moment_grads(torch.zeros_like(x), x, make_geometry(1), dropped, p,
                                  MomentGrads(one, torch.zeros_like(one), None), False)


@contextmanager
def dropping_the_same(x, padding, p, run):
    """Every call drops the same in it, the definition too: what fused draws in ``run()``."""
    drawn, draw = [], fused.draw_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, 'draw_mask',
                      lambda x, p: drawn.append((x, draw(x, p))) or drawn[-1][1])
        run()
        if drawn:
            (seen, dropped), = drawn
            if seen.shape == x.shape:
                scale = F.pad(mask(seen.detach(), dropped, p), padding) / (1 - p)
            else:  # elements of the padding are counted where the sides differ
                padded = F.pad(dense_like(x.detach(), x), padding)
                scale = mask(padded, dropped, p) / (1 - p)
            patch.setattr(fused, 'draw_mask', lambda x, p: dropped)
            patch.setattr(F, 'dropout', lambda x, p: x * scale)
        yield bool(drawn)


# Properties


@cases_of(10, cases())
def test_size_is_nn_conv2ds(case):
    (x, weight, *_), _ = make(case, torch.float32)
    args = (x.size(1), weight.size(0), case['kernel'])
    options, padded = dict(case['options'], groups=case['groups'], bias=case['bias']), x
    own = dict(options)
    if isinstance(options['padding'], tuple) and len(options['padding']) == 4:
        padded, own['padding'] = F.pad(x, options['padding']), 0
    with warnings.catch_warnings():  # torch on 'same' and an even kernel
        warnings.simplefilter('ignore')
        conv = nn.Conv2d(*args, **own, device='meta')
        expected = conv(padded.to('meta')).shape
    layer = KNConv2d(*args, **options, dropout_p=0.2).train(case['training'])
    assert layer(x).shape == expected
    with torch.no_grad():
        assert layer(x).shape == expected
    assert layer.weight.shape == conv.weight.shape


@cases_of(20, cases(), DROPOUT)
def test_fused_equals_reference(case, dropout_p):
    """Under dropout, in training too."""
    tensors, options = make(dict(case, dropout_p=dropout_p))
    plain = [None if t is None else t.contiguous() for t in tensors]
    fast, slow = dict(options, impl='fused'), dict(options, impl='reference')
    torch.manual_seed(case['seed'])
    padding = make_geometry(case['kernel'], **case['options']).padding
    with dropping_the_same(tensors[0], padding, dropout_p, lambda: call(tensors, fast)) as drops:
        assert drops == (case['training'] and dropout_p > 0)
        grad = upstream(tensors, options)
        assert_close(output_and_gradients(tensors, fast, grad),
                     output_and_gradients(plain, slow, grad), 1e-9)
        with torch.no_grad():  # another way through the code
            assert_close([call(tensors, fast)], [call(plain, slow)], 1e-9)


@cases_of(8, cases(dilated=False, finishes=(None, )), DROPOUT)
def test_fused_equals_reference_in_kernel_norm2d(case, dropout_p):
    (x, *_), _ = make(case)

    def norm(x, impl='fused'):
        return kernel_norm2d(x, case['kernel'], **case['options'], dropout_p=dropout_p,
                             training=case['training'], impl=impl)

    results = []
    torch.manual_seed(case['seed'])
    padding = make_geometry(case['kernel'], **case['options']).padding
    with dropping_the_same(x, padding, dropout_p, lambda: norm(x)) as drops:
        assert drops == (case['training'] and dropout_p > 0)
        for impl in ('fused', 'reference'):
            leaf = x.detach().requires_grad_()
            y = norm(leaf, impl)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape))
            results.append([y.detach(), leaf.grad])
    assert_close(*results, 1e-9)
    geometry = make_geometry(case['kernel'], **case['options'])
    units = geometry.output_size(*case['size'])
    assert results[0][0].shape[2:] == tuple(
        n * k for n, k in zip(units, geometry.kernel, strict=True))


@cases_of(10, cases(), st.sampled_from([torch.float32, *HALVES]), st.sampled_from(
    ['auto', 'fused', 'reference']))
def test_rounding_stays_within_that_of_one_convolution(case, dtype, impl):
    """|error| <= some roundings of sum |W x| * rstd + |y|, element by element."""
    tensors, options = make(case, dtype)
    exact = [None if t is None else t.double() for t in tensors]
    y, *grads = output_and_gradients(tensors, dict(options, impl=impl))
    expected = call(exact, dict(options, impl='reference'))
    x, weight, bias, residual = (None if t is None else t.abs() for t in exact)
    geometry = make_geometry(case['kernel'], **case['options'])
    size = F.conv2d(F.pad(x, geometry.padding), weight, None, geometry.stride, 0,
                    geometry.dilation, case['groups']) * moments(exact[0], case)
    size = size + expected.abs() + (0 if bias is None else bias.view(-1, 1, 1)) + (
        0 if residual is None else residual)
    assert y.dtype == dtype and ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * size).all()
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


@cases_of(7, cases(finishes=(None, 'relu')),
          st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(any))
def test_where_the_image_begins_is_seen_near_the_border_only(case, shift):
    """Translation equivariance: by ``shift`` strides, of the units that lie in both images."""
    geometry = make_geometry(case['kernel'], **case['options'])
    left, right, top, bottom = geometry.padding
    # Large enough for one common unit, and up to five pixels more.
    size = [n + pad + s * (by + 1) for n, pad, s, by in zip(
        case['size'], (top + bottom, left + right), geometry.stride, shift, strict=True)]
    pixels = [s * by for s, by in zip(geometry.stride, shift, strict=True)]
    (x, *others), options = make(dict(case, size=[sum(v) for v in zip(size, pixels, strict=True)]))
    here, there = (call([x[:, :, i:i + size[0], j:j + size[1]], *others], options)
                   for i, j in ((0, 0), pixels))
    # Rows and columns of the units that see no padding.
    inner = [(-(-pad // s), (n + pad - d * (k - 1) - 1) // s + 1) for n, pad, s, d, k in zip(
        size, (top, left), geometry.stride, geometry.dilation, geometry.kernel, strict=True)]
    assert all(end - first > by for (first, end), by in zip(inner, shift, strict=True))
    (y0, y1), (x0, x1) = inner
    assert_close([there[:, :, y0:y1 - shift[0], x0:x1 - shift[1]]],
                 [here[:, :, y0 + shift[0]:y1, x0 + shift[1]:x1]], 1e-9)


@cases_of(6, cases(paddings=st.just(0), data=('normal', 'ties')), st.sampled_from([-7., 1., 300.]))
def test_adding_a_constant_changes_nothing(case, constant):
    tensors, options = make(dict(case, dropout_p=0.))
    moved = [tensors[0] + constant, *tensors[1:]]
    grad = upstream(tensors, options)
    assert_close(output_and_gradients(moved, options, grad),
                 output_and_gradients(tensors, options, grad), 1e-5)


@cases_of(6, cases(), st.sampled_from([1e-3, 0.5, 30.]), st.sampled_from([0., 0.05, 0.5]))
def test_scaling_the_input_and_eps_changes_nothing(case, factor, dropout_p):
    """y(a * x, a ** 2 * eps) = y(x, eps), with the same dropout in training too."""
    tensors, options = make(dict(case, dropout_p=dropout_p))
    outputs = []
    for scale in (1., factor):
        torch.manual_seed(case['seed'])
        outputs.append(call([tensors[0] * scale, *tensors[1:]],
                            dict(options, eps=1e-3 * scale**2)))
    assert_close(*([y] for y in outputs), 1e-9)


@cases_of(8, cases(), st.randoms(use_true_random=False))
def test_samples_do_not_see_each_other(case, random):
    """A permuted batch gives permuted results, a sample alone its own; gradients add up."""
    tensors, options = make(case)
    x, weight, bias, residual = tensors
    grad = upstream(tensors, options)
    y, dx, *sums = output_and_gradients(tensors, options, grad)
    order = random.sample(range(len(x)), len(x))

    def part(index):
        return output_and_gradients(
            [x[index], weight, bias, None if residual is None else residual[index]], options,
            grad[index])

    permuted = part(order)
    assert_close(permuted[:2], [y[order], dx[order]], 1e-10)
    alone = [part([i]) for i in range(len(x))]
    assert_close([torch.cat(v) for v in list(zip(*alone, strict=True))[:2]], [y, dx], 1e-10)
    # of the weight, and of the bias where there is one
    shared = slice(2, 3 + (bias is not None))
    added = [sum(v) for v in list(zip(*alone, strict=True))[shared]]
    assert_close(added, sums[:len(added)], 1e-9)


@cases_of(8, cases(), st.sampled_from([torch.float64, torch.float32, *HALVES]),
          st.sampled_from([None, 0., 1., 254.3, 1e4]), st.sampled_from([0., 0.05, 0.9]))
def test_output_and_gradients_are_finite(case, dtype, constant, dropout_p):
    tensors, options = make(dict(case, dropout_p=dropout_p), dtype)
    if dtype == torch.float16 and constant:  # up to 65504, here the bound of every intermediate
        constant = None if dropout_p else min(constant, 254.3)
    if constant is not None:
        tensors[0] = torch.full_like(tensors[0], constant)
    y = call(tensors, options)
    y, *grads = output_and_gradients(tensors, options, torch.full_like(y, 2**-8))
    assert y.dtype == dtype and y.isfinite().all()
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)
    if constant is not None and options['padding'] in (0, 'valid') and dropout_p == 0:
        # A constant unit is normalized to 0.
        expected = torch.zeros_like(y)
        expected += 0 if tensors[2] is None else tensors[2].view(-1, 1, 1)
        expected += 0 if tensors[3] is None else tensors[3]
        torch.testing.assert_close(y, expected.relu() if case['finish'] == 'relu' else expected)


# Arguments that do not fit


NAN, INF = float('nan'), float('inf')
COUNTS = [0, -1, 1.5, None, '4', (4, ), NAN]
SIDES = [0, -1, 1.5, None, '3', (), (1, 2, 3), (3, 0), (3, 1.5), (3, None), [[3]]]
NUMBERS = dict(
    stride=SIDES,
    padding=[-1, 1.5, None, 'reflect', (), (1, 2, 3), (0, 0, 0, -1), (1, None), [0] * 5],
    dropout_p=[-0.1, 1, 1.5, NAN, INF, None, '0.1', (0.1, )],
    eps=[0, -1e-5, NAN, INF, None, '1e-5'],
    impl=['cudnn', None, 1, []])
LAYER = dict(
    NUMBERS, in_channels=COUNTS, out_channels=COUNTS, kernel_size=SIDES, dilation=SIDES,
    groups=[*COUNTS, 7], activation=['gelu', 1, []], padding_mode=['reflect', None],
    dtype=[torch.int32, torch.bool, torch.complex64])
X, W = torch.zeros(2, 4, 8, 7), torch.zeros(6, 2, 3, 3)
INPUTS = [None, 1., [[0.]], X.numpy(), X[0], X[None], X[:, :3], X[:, :0], X[:, :, :1], X[:, :, :0],
          X[..., :0], X.int(), X.bool(), X.to(torch.complex64), X.double(), X.half()]
FUNCTION = dict(
    NUMBERS, dilation=SIDES, groups=[*COUNTS, 3, 4], activation=['gelu', 1, []], input=INPUTS,
    weight=[None, 1., W.numpy(), W[0], W[None], W[:0], W[:, :0], W[:, :1], W[:5], W[..., :0],
            W.int(), W.double(), W.expand(6, 2, 3, 3).repeat(1, 1, 3, 3)],
    bias=[1., [0.] * 6, torch.zeros(5), torch.zeros(1, 6), torch.zeros(()), W],
    residual=[1., X, torch.zeros(2, 6, 6, 6), torch.zeros(6, 6, 5)])
NORM = dict(NUMBERS, num_features=[*COUNTS, 3], kernel_size=[*SIDES, 9], input=[
    value for value in INPUTS if not isinstance(value, torch.Tensor) or value.dtype not in (
        torch.float16, torch.float64)])


def spoilt(bad):
    """(name, value) of one argument that does not fit, others with it or not."""
    one = st.sampled_from([(name, value) for name, values in bad.items() for value in values])
    return st.dictionaries(st.sampled_from(list(bad)), st.just(None), max_size=1).flatmap(
        lambda more: st.tuples(one, *(st.tuples(st.just(name), st.sampled_from(bad[name]))
                                      for name in more)))


@cases_of(7, spoilt(LAYER))
def test_a_layer_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError):
        KNConv2d(**dict(dict(in_channels=4, out_channels=6, kernel_size=3), **dict(bad)))


@cases_of(6, spoilt(FUNCTION), st.booleans())
def test_kn_conv2d_refuses_what_does_not_fit(bad, training):
    good = dict(input=X, weight=W, bias=torch.zeros(6), groups=2, training=training)
    with pytest.raises(ValueError):
        kn_conv2d(**dict(good, **dict(bad)))


@cases_of(4, spoilt(NORM), st.booleans())
def test_kernel_norm2d_refuses_what_does_not_fit(bad, training):
    options = dict(dict(num_features=4, kernel_size=2, input=X), **dict(bad))
    x = options.pop('input')
    with pytest.raises(ValueError):
        KernelNorm2d(**options).train(training)(x)
