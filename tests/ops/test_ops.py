import golden
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmseg_kn.ops import (
    chosen_impl,
    cpu_chunks,
    dispatch,
    fused,
    kernel_norm2d,
    kn_conv2d,
    unfolded,
)
from mmseg_kn.ops.box_means import box_mean, box_mean_transpose
from mmseg_kn.ops.geometry import make_geometry
from mmseg_kn.ops.passes import MomentGrads
from mmseg_kn.ops.precision import accumulate_dtype

triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')
triton_backward, triton_forward = triton_passes.triton_backward, triton_passes.triton_forward

torch.backends.cudnn.allow_tf32 = False  # GPUs would round what is compared in float32
IMPLS = ('reference', 'fused')
PASSES = dict(fused=fused, triton=triton_passes)
# Without a GPU, triton's interpreter runs the kernels on the CPU (conftest.py).
DEVICE = 'cpu' if triton_passes.INTERPRETED else 'cuda'
# One of each: dilation, groups, strides, 4-sided padding, kernels from 1x1 to 7x7.
OPTIONS = [
    dict(kernel=3, padding=1),
    dict(kernel=1),
    dict(kernel=2, padding=(2, 0, 0, 1)),
    dict(kernel=7, padding=3, stride=2),
    dict(kernel=3, padding=2, dilation=2),
    dict(kernel=(3, 2), padding=(1, 2), stride=(2, 1), dilation=(1, 2)),
    dict(kernel=(2, 3), padding=(1, 2, 0, 3), stride=(1, 2), dilation=(2, 1), groups=2),
    dict(kernel=3, padding='same', dilation=2, groups=4),
]


# Inputs are tiny here, and the closed form is what most tests are about.
@pytest.fixture(autouse=True)
def largest_tiny(request, monkeypatch):
    """Elements of the largest input of which 'fused' builds the units."""
    monkeypatch.setattr(unfolded, 'LARGEST', getattr(request, 'param', 0))


ALL = 2**40
ALL_FORMS = pytest.mark.parametrize(
    'largest_tiny, impl', [(0, 'fused'), (ALL, 'fused'), (0, 'triton')],
    indirect=['largest_tiny'], ids=['fused', 'units', 'triton'])
BOTH_FORMS = pytest.mark.parametrize('largest_tiny', [0, ALL], indirect=True,
                                     ids=['closed form', 'units'])


def make_case(kernel=3, groups=1, dtype=torch.float64, channels=4, out=8, size=(11, 9),
              device='cpu', residual=False, **options):
    torch.manual_seed(0)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(2, channels, *size, dtype=dtype)
    weight = torch.randn(out, channels // groups, kh, kw, dtype=dtype)
    bias = torch.randn(out, dtype=dtype)
    inputs = [x, weight, bias]
    if residual:
        with torch.no_grad():
            inputs.append(torch.randn_like(kn_conv2d(x, weight, groups=groups, **options)))
    inputs = tuple(t.to(device).requires_grad_() for t in inputs)
    return inputs, dict(groups=groups, **options)


def run(inputs, impl, **options):
    """Output and gradients under a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    if len(leaves) == 4:
        options['residual'] = leaves[3]
    y = kn_conv2d(*leaves[:3], impl=impl, **options)
    y.backward(golden.signal(y.shape, seed=1).to(y))
    return [y.detach(), *(t.grad for t in leaves)]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('name', golden.KN_CONV)
def test_kn_conv2d_equals_the_authors(name, impl):
    case = golden.KN_CONV[name]
    c, o, kernel, stride, padding, groups, has_bias = case['args']
    x = golden.signal((2, c, 11, 9)).requires_grad_()
    weight = golden.parameter(f'{name}.weight', (o, c // groups, *kernel)).requires_grad_()
    bias = golden.parameter(f'{name}.bias', (o, )).requires_grad_() if has_bias else None
    y = kn_conv2d(x, weight, bias, stride, padding, groups=groups, impl=impl)
    y.backward(golden.signal(y.shape, seed=1))
    results = dict(y=y, grad_x=x.grad, grad_weight=weight.grad)
    if has_bias:
        results['grad_bias'] = bias.grad
    for key, value in results.items():
        assert golden.fingerprint(value) == pytest.approx(case[key], abs=1e-9, rel=1e-9), key


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('name', golden.KERNEL_NORM)
def test_kernel_norm2d_equals_the_authors(name, impl):
    case = golden.KERNEL_NORM[name]
    x = golden.signal((2, 5, 9, 8)).requires_grad_()
    y = kernel_norm2d(x, *case['args'], impl=impl)
    y.backward(golden.signal(y.shape, seed=1))
    assert golden.fingerprint(y) == pytest.approx(case['y'], abs=1e-9, rel=1e-9)
    assert golden.fingerprint(x.grad) == pytest.approx(case['grad_x'], abs=1e-9, rel=1e-9)


@pytest.mark.parametrize('impl', IMPLS)
def test_evaluation_is_the_mean_of_training_passes(impl):
    weight = golden.parameter('expect.weight', (8, 16, 3, 3)).float()
    bias = golden.parameter('expect.bias', (8, )).float()
    x = golden.signal((1, 16, 12, 12), seed=3).float().relu()
    y = kn_conv2d(x, weight, bias, padding=1, dropout_p=0.25, impl=impl)
    plain = kn_conv2d(x, weight, bias, padding=1, impl=impl)
    centre = torch.tensor(golden.EXPECT_CENTRE)
    corner = torch.tensor(golden.EXPECT_CORNER)

    def error(y):
        return torch.cat([y[0, :, 5, 5] - centre, y[0, 0, 0, :4] - corner]).abs().mean()

    assert error(y) < 0.02
    assert error(plain) > 10 * error(y)
    assert torch.equal(y, kn_conv2d(x, weight, bias, padding=1, dropout_p=0.25, impl=impl))


@pytest.fixture(params=[2**20, 50, 'units'], ids=['whole', 'chunks', 'units'])
def chunk(request, monkeypatch, largest_tiny):
    """The CPU's passes over the whole tensor, and in chunks; or no passes, but units."""
    if request.param == 'units':
        monkeypatch.setattr(unfolded, 'LARGEST', ALL)
        return
    monkeypatch.setattr(cpu_chunks, 'CHUNK', request.param)
    monkeypatch.setattr(fused, '_WIDE', request.param)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# What surrounds the operation, and what backward keeps of it
EPILOGUES = [
    dict(),
    dict(residual=True, keep_output=True),
    dict(activation='relu'),
    dict(keep_output=True, input_activation='relu'),
    dict(activation='relu', input_activation='relu'),
    dict(residual=True, keep_output=True, input_activation='relu'),
    dict(residual=True),
]


@pytest.mark.parametrize('epilogue', EPILOGUES)
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('options', OPTIONS)
def test_fused_equals_reference(options, dropout_p, epilogue, chunk):
    inputs, options = make_case(**options, **epilogue)
    expected = run(inputs, 'reference', dropout_p=dropout_p, **options)
    actual = run(inputs, 'fused', dropout_p=dropout_p, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


def kept_elements(passes, x, dropped, p):
    """The mask of a dropout, as backward sees it: dx of a loss that weighs all x alike."""
    n, c, h, w = x.shape
    one = torch.full((n, h, w), c, dtype=accumulate_dtype(x.dtype), device=x.device)
    return passes.add_moment_grads(torch.zeros_like(x), x, make_geometry(1), dropped, p,
                                   MomentGrads(one, torch.zeros_like(one), None), False)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('chunk, impl, dtype, p, options', [
    *((2**20, 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *((50, 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *(('units', 'fused', torch.float64, 0.3, options) for options in OPTIONS),
    *((2**20, 'triton', torch.float32, 0.3, options) for options in OPTIONS),
    # below 0.01 other random numbers (fused), and in float32 a centred kernel
    *((chunk, impl, dtype, p, options)
      for chunk, impl in ((50, 'fused'), ('units', 'fused'), (2**20, 'triton'))
      for dtype, p in ((torch.float32, 0.005), (torch.float16, 0.3), (torch.bfloat16, 0.3))
      for options in OPTIONS[2:7:2]),  # relu, with a rectified input, residual
], indirect=['chunk'])
def test_dropout_of_the_statistics_by_definition(options, impl, dtype, p, channels_last, chunk,
                                                 monkeypatch):
    """With an implementation's own mask, as its backward sees it, the definition agrees."""
    epilogue = EPILOGUES[OPTIONS.index(options) % len(EPILOGUES)]
    inputs, options = make_case(**options, **epilogue,
                                device=DEVICE if impl == 'triton' else 'cpu')
    inputs = [t.detach().to(dtype) for t in inputs]
    if channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    drawn, passes = [], PASSES[impl]
    draw = passes.draw_mask
    monkeypatch.setattr(passes, 'draw_mask',
                        lambda x, p: drawn.append((x, draw(x, p))) or drawn[-1][1])
    actual = run(inputs, impl, dropout_p=p, training=True, **options)
    (x, dropped), = drawn
    padding = make_geometry(inputs[1].shape[2:], options.get('stride', 1),
                            options.get('padding', 0), options.get('dilation', 1)).padding
    if x.shape == inputs[0].shape:
        scale = F.pad(kept_elements(passes, inputs[0], dropped, p), padding)
    else:  # elements of the padding are counted where the sides differ
        scale = kept_elements(passes, F.pad(inputs[0], padding), dropped, p)
    scale = scale.double() / (1 - p)
    monkeypatch.setattr(F, 'dropout', lambda input, p: input * scale)
    expected = run([t.double() for t in inputs], 'reference', dropout_p=p, training=True,
                   **options)
    for a, e in zip(actual, expected, strict=True):
        # in half, rounding moves an output or two to the other side of the relu
        flips = dtype.itemsize == 2 and 'activation' in epilogue
        assert relative_error(a, e) < (0.1 if flips else TOLERANCE[dtype])


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('impl', PASSES)
def test_dropout_rate_and_independence(impl, channels_last, chunk):
    passes = PASSES[impl]
    device = DEVICE if impl == 'triton' else 'cpu'
    x = torch.ones(2, 70, 12, 11, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for p in (1e-3, 0.05, 0.5):
        masks = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            masks.append(kept_elements(passes, x, passes.draw_mask(x, p), p))
        again = kept_elements(passes, x, passes.draw_mask(x, p), p)
        assert set(masks[0].unique().tolist()) == {0.0, 1.0}
        assert torch.equal(masks[0], masks[1])
        for mask in (masks[0], masks[2], again):  # seeds, then draws from one seed
            lost = 1 - mask.double()
            assert abs(lost.sum() - x.numel() * p) < 4 * (x.numel() * p * (1 - p))**0.5
            # neighbours of each kind drop together at rate p * p
            for dim in (0, 1, 2, 3):
                size = x.size(dim) - 1
                pairs = (lost.narrow(dim, 0, size) * lost.narrow(dim, 1, size)).sum()
                expected = x.numel() / (size + 1) * size * p * p
                assert abs(pairs - expected) < 4 * expected**0.5 + 4
        for a, b in ((masks[0], masks[2]), (masks[2], again)):
            both = ((1 - a) * (1 - b)).sum()
            assert abs(both - x.numel() * p * p) < 4 * (x.numel() * p * p)**0.5 + 4


@pytest.mark.parametrize('p', [0.05, 1e-4, 1e-19])
def test_drawn_positions(p):
    torch.manual_seed(0)
    for shape in ((4, 64, 50, 50), (1, 4, 6, 6), (0, 4, 5, 5)):
        x = torch.empty(shape)
        positions = fused.draw_mask(x, p)
        inside = positions[positions < x.numel()]
        assert positions.dtype == torch.int32 and (inside.diff() > 0).all()
        assert (inside >= 0).all() and (positions <= x.numel()).all()
        assert abs(len(inside) - x.numel() * p) <= 4 * (x.numel() * p)**0.5
        # long enough that dropout reaches the end
        assert len(positions) > x.numel() * p + 8 * (x.numel() * p)**0.5


@pytest.mark.parametrize('channels_last', [False, True])
def test_dropped_and_kept_elements_count_as_scaled(channels_last):
    """Under p = 0.75 every kept element counts exactly four times."""
    for impl, passes in PASSES.items():
        x = torch.randint(-8, 8, (2, 70, 5, 3)).float()
        x = x.to(DEVICE if impl == 'triton' else 'cpu')
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        dropped = passes.draw_mask(x, 0.75)
        mask = kept_elements(passes, x, dropped, 0.75)
        moments = passes.unit_moments(x, make_geometry(1), dropped, 0.75, 1.0, 1e-5, True, True)
        torch.testing.assert_close(moments.mean.float(), (4 * mask * x).mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.undropped_mean.float(), x.mean(1), rtol=1e-6, atol=1e-7)


GRADCHECKS = [
    dict(padding=2, dilation=2, dropout_p=0.2, training=True),
    dict(kernel=(2, 3), groups=2, padding=(1, 2, 0, 3), stride=(1, 2), dilation=(2, 1),
         dropout_p=0.3, training=True),
    dict(padding=1, dropout_p=0.2),
    dict(kernel=2, groups=2, stride=2, dropout_p=0.2),
    dict(padding=1, groups=2),
]


@pytest.mark.parametrize('epilogue', EPILOGUES)
@pytest.mark.parametrize('options', GRADCHECKS)
def test_gradcheck(options, epilogue):
    inputs, options = make_case(out=4, size=(5, 6), **options, **epilogue)

    def seeded(*inputs):
        torch.manual_seed(1)
        return kn_conv2d(*inputs[:3], residual=inputs[3] if inputs[3:] else None, **options)

    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize('options', [
    dict(kernel_size=1, dropout_p=0.1, training=True),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0, 2, 1), dropout_p=0.25, training=True),
    dict(kernel_size=2, stride=2, dropout_p=0.25),
])
def test_gradcheck_kernel_norm2d(options):
    x = make_case(size=(5, 6))[0][0]

    def seeded(x):
        torch.manual_seed(1)
        return kernel_norm2d(x, **options)

    assert torch.autograd.gradcheck(seeded, (x, ))
    if not options.get('training'):
        torch.testing.assert_close(seeded(x), kernel_norm2d(x, impl='reference', **options))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@ALL_FORMS
def test_error_is_within_twice_torchs_own(impl, dtype, relu, channels_last):
    (x, weight, bias), _ = make_case(channels=64, out=48, size=(8, 7),
                                     device=DEVICE if impl == 'triton' else 'cpu')
    inputs = [(x.relu() if relu else x).to(dtype), (weight / 24).to(dtype), bias.to(dtype)]
    if channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)

    def conv_norm(inputs, dtype):
        x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in inputs)
        y = F.group_norm(F.conv2d(x, weight, padding=1), 1) + bias.view(1, -1, 1, 1)
        y.backward(golden.signal(y.shape, seed=1).to(y))
        return [y.detach(), x.grad, weight.grad, bias.grad]

    doubles = [t.detach().double() for t in inputs]
    bounds = [relative_error(a, e) for a, e in zip(
        conv_norm(inputs, dtype), conv_norm(doubles, torch.float64), strict=True)]
    # the interpreter cuts bfloat16 off where hardware rounds
    slack = 4 if impl == 'triton' and dtype == torch.bfloat16 and DEVICE == 'cpu' else 2
    for options in (dict(), dict(dropout_p=0.1)):
        actual = run(inputs, impl, padding=1, **options)
        expected = run(doubles, 'reference', padding=1, **options)
        for a, e, bound in zip(actual, expected, bounds, strict=True):
            assert a.dtype == dtype
            # torch's figure has no dropout: its largest stands for all four there
            assert relative_error(a, e) <= slack * (max(bounds) if options else bound)


@pytest.mark.parametrize('residual', [0.3, 3., None])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('impl', PASSES)
def test_keeping_the_output_in_half_precision(impl, dtype, residual):
    """Errors stay within twice torch's own, also under a residual larger than the rest."""
    inputs, _ = make_case(channels=32, out=24, size=(8, 7), padding=1, residual=bool(residual),
                          device=DEVICE if impl == 'triton' else 'cpu')
    inputs = [t.detach() for t in inputs]
    inputs[1] /= 17
    if residual:
        inputs[3] *= residual
    inputs = [t.to(dtype) for t in inputs]

    def conv_norm(inputs):
        x, weight, bias, *rest = leaves = [t.detach().requires_grad_() for t in inputs]
        y = F.group_norm(F.conv2d(x.relu(), weight, padding=1), 1) + bias.view(1, -1, 1, 1)
        y = y + rest[0] if rest else y
        y.backward(golden.signal(y.shape, seed=1).to(y))
        return [y.detach(), *(t.grad for t in leaves)]

    doubles = [t.double() for t in inputs]
    bounds = [relative_error(a, e) for a, e in zip(conv_norm(inputs), conv_norm(doubles),
                                                   strict=True)]
    # the interpreter cuts bfloat16 off where hardware rounds
    slack = 4 if impl == 'triton' and dtype == torch.bfloat16 and DEVICE == 'cpu' else 2
    options = dict(padding=1, input_activation='relu', keep_output=True)
    for a, e, bound in zip(run(inputs, impl, **options), run(doubles, 'reference', **options),
                           bounds, strict=True):
        assert relative_error(a, e) <= slack * bound


@pytest.mark.parametrize('impl', IMPLS)
def test_autocast(impl):
    (x, weight, bias), options = make_case(dtype=torch.float32, padding=1)
    with torch.autocast('cpu', torch.bfloat16):
        y = kn_conv2d(x, weight, bias, impl=impl, **options)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    expected = kn_conv2d(x.double(), weight.double(), bias.double(), **options)
    assert relative_error(y, expected) < 0.02


@pytest.mark.parametrize('impl', [*IMPLS, 'triton'])
def test_autocast_never_takes_statistics_in_half(impl):
    """bfloat16 (8 bits) would lose a deviation of 1 from a mean of 100 altogether."""
    device = DEVICE if impl == 'triton' else 'cpu'
    (x, weight, bias), options = make_case(dtype=torch.float32, padding=1, device=device)
    x, inner = x.detach() + 100, (..., slice(1, -1), slice(1, -1))
    rounded = x.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        y = kn_conv2d(x, weight, bias, impl=impl, **options)
        norm = kernel_norm2d(x, 3, dropout_p=0.0, impl=impl)
        norm_of_half = kernel_norm2d(rounded, 3, dropout_p=0.0, impl=impl)
    assert y.dtype == norm_of_half.dtype == torch.bfloat16 and norm.dtype == torch.float32
    expected = kn_conv2d(rounded.double(), weight.double(), bias.double(), impl='reference',
                         **options)
    assert relative_error(y[inner], expected[inner]) < 0.05
    assert relative_error(norm, kernel_norm2d(x.double(), 3, impl='reference')) < 1e-5
    expected = kernel_norm2d(rounded.double(), 3, impl='reference')
    assert relative_error(norm_of_half, expected) < 0.008


@BOTH_FORMS
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('layout', [
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: t.repeat_interleave(2, 3)[..., ::2],
    lambda t: t[:1].expand(len(t), -1, -1, -1),
], ids=['channels_last', 'strided', 'expanded'])
def test_memory_layouts(layout, groups):
    """Of input and weight."""
    (x, weight, bias), options = make_case(padding=1, groups=groups)
    x, weight = layout(x.detach()), layout(weight.detach())
    assert not x.is_contiguous() and not weight.is_contiguous()
    expected = run((x.contiguous(), weight.contiguous(), bias), 'reference', **options)
    for a, e in zip(run((x, weight, bias), 'fused', **options), expected, strict=True):
        torch.testing.assert_close(a, e)
    dropped = run((x, weight, bias), 'fused', dropout_p=0.1, training=True, **options)
    assert all(value.isfinite().all() for value in dropped)


def gradients_through(activation, inputs, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    activation(kn_conv2d(*leaves, **options)).square().sum().backward()
    return [t.grad for t in leaves]


@BOTH_FORMS
def test_inplace_activation_after_it():
    inputs, options = make_case(padding=1)
    for a, b in zip(gradients_through(torch.relu_, inputs, **options),
                    gradients_through(torch.relu, inputs, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('impl', PASSES)
@pytest.mark.parametrize('kept', [dict(keep_output=True), dict(activation='relu'),
                                  dict(keep_output=True, residual=True)])
def test_what_is_kept_and_overwritten_stops_backward(kept, impl):
    """An error and no wrong gradient: torch counts the versions of what is saved."""
    (x, weight, bias, *rest), options = make_case(
        kernel=1, dtype=torch.float32, device=DEVICE if impl == 'triton' else 'cpu', **kept)
    residual = rest[0] + 0 if rest else None
    options['residual'] = residual
    y = kn_conv2d(x, weight, bias, impl=impl, **options)
    (residual if rest else y).detach().mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


@pytest.mark.parametrize('impl', PASSES)
def test_what_is_kept(impl):
    """The maps of the neighbours, and no other map."""
    (x, weight, bias, residual), options = make_case(
        kernel=1, dtype=torch.float32, channels=8, residual=True,
        device=DEVICE if impl == 'triton' else 'cpu')
    for own, call in ((1, dict()), (0, dict(keep_output=True)), (0, dict(activation='relu')),
                      (0, dict(keep_output=True, residual=residual)),
                      (0, dict(keep_output=True, input_activation='relu'))):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = kn_conv2d(x, weight, bias, impl=impl, **options, **call)
        known = {t.data_ptr() for t in (x, residual, y)}
        maps = [t for t in saved if t.shape == y.shape and t.data_ptr() not in known]
        assert len(maps) == own, call


@ALL_FORMS
@pytest.mark.parametrize('activation', [None, 'relu'])
@pytest.mark.parametrize('keep_output', [False, True])
def test_gradients_of_parameters_alone(keep_output, activation, impl):
    """The first layer of a network keeps no output, because its image needs no gradient."""
    inputs, options = make_case(kernel=3, padding=1, dtype=torch.float32,
                                device=DEVICE if impl == 'triton' else 'cpu')
    _, _, *expected = run(inputs, impl, activation=activation, **options)
    weight, bias = (t.detach().requires_grad_() for t in inputs[1:])
    y = kn_conv2d(inputs[0].detach(), weight, bias, impl=impl, activation=activation,
                  keep_output=keep_output, **options)
    y.backward(golden.signal(y.shape, seed=1).to(y))
    for a, e in zip((weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(a, e)


@ALL_FORMS
def test_gradient_checkpointing_draws_the_same_dropout(impl):
    inputs, options = make_case(padding=1, impl=impl, dtype=torch.float32,
                                device=DEVICE if impl == 'triton' else 'cpu')

    def gradients(call):
        torch.manual_seed(3)
        leaves = [t.detach().requires_grad_() for t in inputs]
        call(lambda *t: kn_conv2d(*t, dropout_p=0.3, training=True, **options), *leaves
             ).square().sum().backward()
        return [t.grad for t in leaves]

    plain = gradients(lambda f, *t: f(*t))
    recomputed = gradients(lambda f, *t: checkpoint(f, *t, use_reentrant=False))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


@ALL_FORMS
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('value', [255., 254.3, 0., 3e4, 1e30, 1e-30])
def test_constant_input_gives_the_bias(value, dtype, impl):
    if value > torch.finfo(dtype).max:
        pytest.skip('beyond the dtype')
    inputs, _ = make_case(channels=64, size=(5, 4), dtype=dtype,
                          device=DEVICE if impl == 'triton' else 'cpu')
    inputs = (torch.full_like(inputs[0], value), *inputs[1:])
    y, *grads = run(inputs, impl)
    torch.testing.assert_close(y, inputs[2].detach().view(1, -1, 1, 1).expand_as(y))
    assert all(g.isfinite().all() for g in grads)


@ALL_FORMS
@pytest.mark.parametrize('activation', [None, 'relu'])
@pytest.mark.parametrize('channels', [4, 64])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_very_small_and_large_inputs_stay_finite(scale, training, channels, activation, impl):
    inputs, options = make_case(dtype=torch.float32, channels=channels, size=(5, 4), padding=1,
                                device=DEVICE if impl == 'triton' else 'cpu')
    inputs = (inputs[0] * scale, *inputs[1:])
    for value in run(inputs, impl, dropout_p=0.05, training=training, activation=activation,
                     **options):
        assert value.isfinite().all()


@pytest.mark.parametrize('impl', [*IMPLS, 'triton'])
@pytest.mark.parametrize('shape', [(0, 4, 6, 5), (2, 4, 1, 1), (0, 4, 150, 150)])
@pytest.mark.filterwarnings('ignore:var_mean')
def test_empty_batch_and_single_pixel(shape, impl):
    device, dtype = (DEVICE, torch.float32) if impl == 'triton' else ('cpu', torch.float64)
    _, weight, bias = make_case(kernel=1, device=device, dtype=dtype)[0]
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    if len(x) == 0:
        with torch.no_grad():
            assert kn_conv2d(x, weight, bias, dropout_p=0.05, impl=impl).shape[2:] == shape[2:]
    for y in (kn_conv2d(x, weight, bias, dropout_p=0.05, training=True, impl=impl),
              kernel_norm2d(x, dropout_p=0.05, training=True, impl=impl)):
        assert y.shape[0] == shape[0] and y.shape[2:] == shape[2:]
        y.sum().backward()
    assert x.grad.shape == shape and weight.grad.isfinite().all()


@BOTH_FORMS
def test_batch_independence():
    inputs, options = make_case(padding=1)
    x, *parameters = inputs
    y, dx, dweight, dbias = run(inputs, 'fused', dropout_p=0.1, **options)
    alone = [run((row[None], *parameters), 'fused', dropout_p=0.1, **options)[0] for row in x]
    torch.testing.assert_close(y, torch.cat(alone), atol=1e-12, rtol=0)

    def loss_gradient(x):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        kn_conv2d(*leaves, dropout_p=0.1, **options).square().mean().backward()
        return leaves[1].grad

    mean_of_two = (loss_gradient(x[:1]) + loss_gradient(x[1:])) / 2
    torch.testing.assert_close(loss_gradient(x), mean_of_two, atol=1e-12, rtol=0)


def test_deterministic_algorithms_and_repeatability():
    inputs, options = make_case(padding=1, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        for impl in PASSES:
            leaves = [t.to(DEVICE if impl == 'triton' else 'cpu') for t in inputs]
            torch.manual_seed(2)
            first = run(leaves, impl, dropout_p=0.2, training=True, **options)
            torch.manual_seed(2)
            for a, b in zip(first, run(leaves, impl, dropout_p=0.2, training=True, **options),
                            strict=True):
                assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('channels', [3, 33, 300])
def test_triton_equals_reference_at_ragged_shapes(channels):
    """Blocks of pixels and of channels that are full, cut, or both; strides and dilations."""
    for size, options in (((3, 5), dict(padding=2, dilation=2)), ((16, 2), dict(stride=2)),
                          ((7, 9), dict(padding=(0, 1, 2, 0), stride=(1, 3)))):
        inputs, options = make_case(channels=channels, out=channels + 1, kernel=2, size=size,
                                    dtype=torch.float32, device=DEVICE, **options)
        expected = run([t.double() for t in inputs], 'reference', dropout_p=0.05, **options)
        for a, e in zip(run(inputs, 'triton', dropout_p=0.05, **options), expected, strict=True):
            assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('impl', PASSES)
def test_kernel_norm2d_equals_reference(impl, dtype, channels_last):
    x = make_case(channels=33, dtype=dtype, device=DEVICE if impl == 'triton' else 'cpu')[0][0]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def run_norm(x, kernel, impl):
        x = x.detach().requires_grad_()
        y = kernel_norm2d(x, kernel, kernel, padding=(1, 0, 0, 1), dropout_p=0.1, impl=impl)
        y.backward(golden.signal(y.shape, seed=1).to(y))
        return y, x.grad

    for kernel in (1, 2):
        for a, e in zip(run_norm(x, kernel, impl), run_norm(x.double(), kernel, 'reference'),
                        strict=True):
            assert a.dtype == dtype and relative_error(a, e) < TOLERANCE[dtype]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('activation', [None, 'relu'])
@pytest.mark.parametrize('impl', PASSES)
def test_kernel_norm2d_with_dropout_by_definition(impl, activation, channels_last, monkeypatch):
    passes, drawn = PASSES[impl], []
    draw = passes.draw_mask
    monkeypatch.setattr(passes, 'draw_mask',
                        lambda x, p: drawn.append(draw(x, p)) or drawn[-1])
    for channels in (3, 70):
        x = make_case(channels=channels, dtype=torch.float32, size=(5, 4),
                      device=DEVICE if impl == 'triton' else 'cpu')[0][0].detach() + 2
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)

        def run_norm(x, impl):
            x = x.detach().requires_grad_()
            y = kernel_norm2d(x, dropout_p=0.3, training=True, activation=activation, impl=impl)
            y.backward(golden.signal(y.shape, seed=1).to(y))
            return y.detach(), x.grad

        actual = run_norm(x, impl)
        scale = kept_elements(passes, x, drawn.pop(), 0.3).double() / 0.7
        monkeypatch.setattr(F, 'dropout', lambda input, p, scale=scale: input * scale)
        for a, e in zip(actual, run_norm(x.double(), 'reference'), strict=True):
            assert relative_error(a, e) < 2e-6
        with torch.no_grad():  # takes another way
            torch.manual_seed(0)
            y = kernel_norm2d(x, dropout_p=0.3, activation=activation, impl=impl)
        expected = kernel_norm2d(x.double(), dropout_p=0.3, activation=activation,
                                 impl='reference')
        assert relative_error(y, expected) < 2e-6


@ALL_FORMS
def test_an_outlier_does_not_bring_back_the_cancellation(impl):
    inputs, _ = make_case(kernel=1, channels=2048, size=(3, 2), dtype=torch.float32,
                          device=DEVICE if impl == 'triton' else 'cpu')
    for outlier in (0, 5, 100):
        x = inputs[0].detach().clone()
        x[:, outlier] += 1000
        leaves = (x, *inputs[1:])
        expected = run([t.double() for t in leaves], 'reference')
        for a, e in zip(run(leaves, impl), expected, strict=True):
            assert relative_error(a, e) < 5e-6


@pytest.mark.parametrize('p', [1e-6, 1e-7])
@ALL_FORMS
def test_expected_variance_of_a_constant_at_small_p(impl, p, monkeypatch):
    """float32, as which compiled kernels take numbers, knows 1 + p to 6e-8 only."""
    launch = triton_passes._launch
    monkeypatch.setattr(triton_passes, '_launch', lambda kernel, x, grid, *args, **constants: (
        launch(kernel, x, grid, *(torch.tensor(a, dtype=torch.float32).item()
                                  if isinstance(a, float) else a for a in args), **constants)))
    x = torch.full((1, 64, 2, 2), 100., device=DEVICE if impl == 'triton' else 'cpu')
    rstd = kn_conv2d(x, torch.ones(1, 64, 1, 1, device=x.device), dropout_p=p, impl=impl,
                     return_moments=True)[2].double()
    variance = rstd**-2 - 1e-5
    torch.testing.assert_close(variance, torch.full_like(variance, 1e4 * p / (1 - p) * 63 / 64),
                               rtol=1e-3, atol=0)


def test_units_of_more_elements_than_float32_counts():
    many = 2**24 + 2**20
    with torch.no_grad():
        for shape, kernel in (((1, many, 1, 1), 1), ((1, 1, 4200, 4200), 4200)):
            x = torch.randn(shape).add_(3)
            y = kernel_norm2d(x, kernel)
            var, mean = torch.var_mean(x.double(), correction=0)
            expected = ((x.flatten()[:99].double() - mean) / (var + 1e-5).sqrt())
            assert relative_error(y.flatten()[:99], expected) < 1e-5


def test_triton_index_beyond_int32():
    """641 * 6700417 = 2 ** 32 + 1: an image of that area, of which two pixels are computed."""
    height, width = 6700417, 641
    maps = torch.tensor([[2., 9.], [5., 99.], [0., 0.]], dtype=torch.float64, device=DEVICE)
    mean, rstd = torch.empty(2, 2, device=DEVICE)
    live = torch.empty(2, dtype=torch.int8, device=DEVICE)
    # strides of 0: all units of a sample read its first pixel
    triton_forward.moments[(1, )](
        maps, mean, rstd, live, None, None, 2, 1, 1, 2, height, width, 1, 1, 0, 0, 0, 0, 1, 1, 1,
        0.0, 1e-5, UNDROPPED=False, WIDE=True, P=128, LIVE=1e-14)
    assert mean.tolist() == [2, 2] and live.tolist() == [1, 1]

    x = torch.tensor([10., 20., 30., 40.], device=DEVICE)
    dx, constant, slope = torch.zeros_like(x), torch.zeros_like(x), torch.arange(1., 5).to(DEVICE)
    triton_backward.add_moment_grads[(1, )](
        dx, x, constant, slope, None, None, 2, height, width, 1, 3, 1, 2, 1, 1, 1, 1, 0, 0, 1, 1,
        1.0, 0, DROPOUT=False, UNMASKED=False, RECTIFIED=False, STRIDED=False, LAST=False, V=1,
        WIDE=True, P=16, C4=1)
    assert dx.tolist() == [10, 40, 0, 0]


@pytest.mark.parametrize('geometry', [
    make_geometry((3, 2), (2, 1), (1, 2, 0, 3), (1, 2)), make_geometry((3, 2), (2, 1), (1, 0)),
    make_geometry(2, padding=2), make_geometry(1)])
def test_box_means(geometry):
    """Those of unfolded windows; the transpose is the adjoint."""
    a = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    means = box_mean(a, geometry)
    windows = F.unfold(F.pad(a, geometry.padding).flatten(0, 1).unsqueeze(1), geometry.kernel,
                       geometry.dilation, stride=geometry.stride)
    torch.testing.assert_close(means.flatten(), windows.mean(1).flatten())
    b = torch.randn_like(means)
    back = box_mean_transpose(b, geometry, 9, 8)
    torch.testing.assert_close((means * b).sum(), (a * back).sum())


@ALL_FORMS
def test_odd_tensors(impl):
    """A strided bias, an expanded gradient and a residual in another layout."""
    device = DEVICE if impl == 'triton' else 'cpu'
    (x, weight, bias), _ = make_case(kernel=1, dtype=torch.float32, device=device)
    wide = torch.stack([bias.detach(), bias.detach() + 9], 1).flatten()
    residual = torch.randn(2, 8, 11, 9, device=device).contiguous(
        memory_format=torch.channels_last)
    y = kn_conv2d(x, weight, wide[::2], residual=residual, impl=impl)
    expected = kn_conv2d(x, weight, bias, impl='reference') + residual
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for a, e in zip(torch.autograd.grad(y.sum(), (x, weight)),
                    torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, e, atol=2e-4, rtol=1e-4)


@BOTH_FORMS
def test_backward_under_autocast_and_twice():
    inputs, options = make_case(padding=1, dtype=torch.float32)
    y = kn_conv2d(*inputs, **options)
    grad = torch.ones_like(y).cumsum(1)
    plain = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        for a, b in zip(torch.autograd.grad(y, inputs, grad), plain, strict=True):
            assert torch.equal(a, b)


@BOTH_FORMS
def test_gradient_of_the_residual_alone():
    (x, weight, bias, residual), _ = make_case(residual=True)
    y = kn_conv2d(x.detach(), weight.detach(), bias.detach(), residual=residual)
    assert torch.equal(torch.autograd.grad(y.sum(), residual)[0], torch.ones_like(residual))


def test_dilation_of_a_single_column_means_nothing():
    """torch's own convolution crashes on this one, with the probability of an overrun."""
    assert make_geometry((3, 1), dilation=3).dilation == (3, 1)
    assert make_geometry((1, 2), dilation=(2, 3)).dilation == (1, 3)
    x = torch.randn(3, 8, 9, 1).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 4, 3, 1)
    for _ in range(20):
        y = kn_conv2d(x, weight, stride=3, padding=(2, 2), dilation=3, groups=2)
    expected = kn_conv2d(x, weight, stride=3, padding=(2, 2), dilation=3, groups=2,
                         impl='reference')
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_what_auto_runs():
    x = make_case()[0][0]
    assert chosen_impl(x) == 'fused' and chosen_impl(x, 'reference') == 'reference'
    if torch.cuda.is_available():
        assert chosen_impl(x.float().cuda()) == 'triton'
        assert chosen_impl(x.cuda()) == 'fused'  # float64


@pytest.mark.filterwarnings('ignore:triton')
def test_only_a_definite_obstacle_is_remembered(monkeypatch):
    device, answers, zeros = torch.device('cuda', 0), [], torch.zeros
    capturing = [True]

    def moments(*args):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(triton_passes, 'INTERPRETED', False)
    monkeypatch.setattr(triton_passes, 'unit_moments', moments)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device, dtype: zeros(size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing[0])
    dispatch._find_triton_obstacle.cache_clear()
    try:
        assert 'captured' in dispatch._triton_obstacle(device, torch.float32)
        capturing[0] = False
        answers += [torch.OutOfMemoryError('CUDA out of memory'), None]
        assert 'out of memory' in dispatch._triton_obstacle(device, torch.float32)
        assert [dispatch._triton_obstacle(device, torch.float32) for _ in range(2)] == [None, None]
        capturing[0] = True  # known by now
        assert dispatch._triton_obstacle(device, torch.float32) is None
        capturing[0] = False
        answers.append(RuntimeError('Failed to find C compiler'))
        for _ in range(2):
            assert 'C compiler' in dispatch._triton_obstacle(device, torch.float16)
    finally:
        dispatch._find_triton_obstacle.cache_clear()


def test_the_trial_is_real_where_tensors_are_fake(monkeypatch):
    """Else it would fail, and 'fused' be remembered for the tensors that follow."""
    tried, zeros = [], torch.zeros
    monkeypatch.setattr(triton_passes, 'INTERPRETED', False)
    monkeypatch.setattr(triton_passes, 'unit_moments', lambda x, *_: tried.append(type(x)))
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device, dtype: zeros(size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    dispatch._find_triton_obstacle.cache_clear()
    try:
        with FakeTensorMode():
            assert chosen_impl(torch.empty(1, 3, 2, 2, device='cuda')) == 'triton'
    finally:
        dispatch._find_triton_obstacle.cache_clear()
    assert tried == [torch.Tensor]


def test_default_device_does_not_matter():
    def call():
        x = torch.randn(2, 64, 160, 160, device='cpu')  # in chunks
        weight = torch.randn(8, 64, 1, 1, device='cpu', requires_grad=True)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = kn_conv2d(x, weight, dropout_p=0.05, training=True, activation='relu')
                kernel_norm2d(x, dropout_p=0.05, training=True)
        y.sum().backward()
        assert y.device == weight.grad.device == torch.device('cpu')

    cpu_chunks._scratch.stores.clear()
    with torch.device('meta'):
        call()
    call()


X = torch.zeros(1, 4, 8, 8)
W = torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize('call, message', [
    (lambda: kn_conv2d(X[0], W), r'4-D .*\(4, 8, 8\)'),
    (lambda: kn_conv2d(X.byte(), W), 'floating point, got torch.uint8'),
    (lambda: kn_conv2d(X[..., :2], W), r'larger than the padded input 8 x 2'),
    (lambda: kn_conv2d(X, W, dilation=4), r'dilation=\(4, 4\) is larger'),
    (lambda: kn_conv2d(X, W[:, :3]), 'input has 4 channels'),
    (lambda: kn_conv2d(X, W, groups=4), 'out_channels=6 must be divisible by groups=4'),
    (lambda: kn_conv2d(X, W, torch.zeros(4)), r'bias must have shape \(6,\), got \(4,\)'),
    (lambda: kn_conv2d(X, W, dropout_p=1.0), r'dropout_p must be in \[0, 1\), got 1.0'),
    (lambda: kn_conv2d(X, W, dropout_p=-0.1), 'dropout_p must be'),
    (lambda: kn_conv2d(X, W, eps=0), 'eps must be > 0'),
    (lambda: kn_conv2d(X, W, eps=float('nan')), 'eps must be > 0, got nan'),
    (lambda: kn_conv2d(X.numpy(), W), 'input must be a torch.Tensor, got ndarray'),
    (lambda: kn_conv2d(X, W, 0.5), 'bias must be a torch.Tensor, got float'),
    (lambda: kn_conv2d(X, W[:0]), 'out_channels=0 must be'),
    (lambda: kn_conv2d(X[:, :0], W[:, :0]), 'must have channels and pixels'),
    (lambda: kernel_norm2d(X[..., :0], padding=1), r'pixels, got shape \(1, 4, 8, 0\)'),
    (lambda: kn_conv2d(X, W, groups=None), 'groups must be an int >= 1, got None'),
    (lambda: kn_conv2d(X, W[0]), 'weight must be 4-D'),
    (lambda: kn_conv2d(X, W.to('meta')), 'weight must be on one device, got cpu and meta'),
    (lambda: kn_conv2d(X, W, torch.zeros(6).to('meta')), 'bias must be on one device, got cpu'),
    (lambda: kn_conv2d(X, W, residual=torch.zeros(1, 6, 6, 6).to('meta')),
     'residual must be on one device, got cpu and meta'),
    (lambda: kn_conv2d(X, W.double()), 'one dtype, got torch.float32 and torch.float64'),
    (lambda: kn_conv2d(X, W, stride=0), 'stride must be .* got 0'),
    (lambda: kn_conv2d(X, W, stride=1.5), 'stride must be .* got 1.5'),
    (lambda: kn_conv2d(X, W, padding=(1, 2, 3)), r'padding must be .* got \(1, 2, 3\)'),
    (lambda: kn_conv2d(X, W, padding=(0, 0, 0, -1)), 'padding must be'),
    (lambda: kn_conv2d(X, W, padding='reflect'), "padding must be .* got 'reflect'"),
    (lambda: kn_conv2d(X, W, padding='same', stride=2), "padding='same' needs stride 1"),
    (lambda: kn_conv2d(X, W, impl='cudnn'), "impl must be one of .* got 'cudnn'"),
    (lambda: kn_conv2d(X.double(), W.double(), impl='triton'),
     r"impl='triton' cannot run here: .* got torch.float64; use impl='auto'"),
    (lambda: kn_conv2d(X, W, activation='gelu'), "activation must be None or 'relu', got 'gelu'"),
    (lambda: kn_conv2d(X, W, residual=X), r'shape of the output, \(1, 6, 6, 6\), got \(1, 4,'),
    (lambda: kn_conv2d(X, W, residual=X, activation='relu'), 'exclude each other'),
    (lambda: kernel_norm2d(X, kernel_size=9), 'larger than the padded input 8 x 8'),
    (lambda: kernel_norm2d(X, kernel_size=(1, 2, 3)), 'kernel_size must be'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What only a GPU can show

def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(
        not torch.cuda.is_available(), reason='needs a GPU')(test))


def gpu_case(device='cuda', dtype=torch.float32, size=(11, 9)):
    (x, weight, bias), _ = make_case(channels=64, dtype=dtype, size=size)
    return [t.detach().to(device) for t in (x, weight, bias)]


@on_gpu
def test_another_stream():
    leaves = gpu_case(size=(200, 200))
    expected = run(leaves, 'triton', padding=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # the default stream would run ahead of what follows
        late = [t * 1 for t in leaves]
        actual = run(late, 'triton', padding=1)
    torch.cuda.current_stream().wait_stream(stream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_a_device_that_is_not_the_current_one():
    expected = run(gpu_case(), 'triton', padding=1)
    leaves = gpu_case('cuda:1')
    assert torch.cuda.current_device() == 0 and chosen_impl(leaves[0]) == 'triton'
    for a, e in zip(run(leaves, 'triton', padding=1), expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), e.cpu())
    with pytest.raises(ValueError, match='bias must be on one device, got cuda:1 and cuda:0'):
        kn_conv2d(*leaves[:2], leaves[2].to('cuda:0'))


@on_gpu
@pytest.mark.parametrize('impl', PASSES)
def test_cuda_graph_of_an_evaluation(impl):
    x, weight, bias = gpu_case()

    def forward(x):
        with torch.no_grad():
            return kn_conv2d(x, weight, bias, padding=1, dropout_p=0.05, activation='relu',
                             impl=impl)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(x)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x)
    for scale in (1, 3):
        x.copy_(torch.randn_like(x) * scale + scale)
        graph.replay()
        torch.testing.assert_close(y, forward(x))


@on_gpu
@pytest.mark.parametrize('channels_last', [False, True])
def test_more_elements_than_int32_counts(channels_last):
    n, c, size = 3, 64, 3400  # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip('needs 24 GiB')
    x = torch.zeros(n, c, size, size, dtype=torch.bfloat16, device='cuda', memory_format=(
        torch.channels_last if channels_last else torch.contiguous_format))
    corner = torch.randn(c, 8, 8, device='cuda')
    x[-1, :, -8:, -8:] = corner
    weight = torch.randn(2, c, 1, 1, device='cuda', dtype=torch.bfloat16)
    with torch.no_grad():
        for training in (False, True):
            y = kn_conv2d(x, weight, dropout_p=0.0, training=training, impl='triton')
            expected = kn_conv2d(x[-1:, :, -8:, -8:].double(), weight.double(), impl='reference')
            assert relative_error(y[-1:, :, -8:, -8:], expected) < TOLERANCE[torch.bfloat16]
            assert not y[0, :, :8].any()  # units of zeros, and no bias
