"""Errors of float32 and of half precision; constant, very small and very large input."""
import golden
import pytest
import torch
import torch.nn.functional as F
from op_cases import ALL_FORMS, DEVICE, IMPLS, PASSES, make_case, relative_error, run

from mmseg_kn.ops import kernel_norm2d, kn_conv2d

pytestmark = pytest.mark.usefixtures('full_float32', 'largest_tiny')


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


def test_units_of_more_elements_than_float32_counts():
    many = 2**24 + 2**20
    with torch.no_grad():
        for shape, kernel in (((1, many, 1, 1), 1), ((1, 1, 4200, 4200), 4200)):
            x = torch.randn(shape).add_(3)
            y = kernel_norm2d(x, kernel)
            var, mean = torch.var_mean(x.double(), correction=0)
            expected = ((x.flatten()[:99].double() - mean) / (var + 1e-5).sqrt())
            assert relative_error(y.flatten()[:99], expected) < 1e-5
