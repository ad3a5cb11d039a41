"""Implementations against the authors' values, and against the definition in float64."""
import itertools

import golden
import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ALL_FORMS,
    BOTH_FORMS,
    DEVICE,
    EPILOGUES,
    IMPLS,
    OPTIONS,
    PASSES,
    TOLERANCE,
    make_case,
    relative_error,
    run,
)

from mmseg_kn.ops import kernel_norm2d, kn_conv2d
from mmseg_kn.ops.box_means import box_mean, box_mean_transpose
from mmseg_kn.ops.geometry import make_geometry

pytestmark = pytest.mark.usefixtures('full_float32', 'largest_tiny')


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


@pytest.mark.parametrize('epilogue', EPILOGUES)
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('options', OPTIONS)
def test_fused_equals_reference(options, dropout_p, epilogue, chunk):
    inputs, options = make_case(**options, **epilogue)
    expected = run(inputs, 'reference', dropout_p=dropout_p, **options)
    actual = run(inputs, 'fused', dropout_p=dropout_p, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('channels, layout, dtype', [
    *itertools.product([3, 33, 133], [torch.contiguous_format, torch.channels_last],
                       [torch.float32, torch.float16]),
    (300, torch.contiguous_format, torch.float32)])
def test_triton_equals_reference_at_ragged_shapes(channels, layout, dtype):
    """Blocks of pixels and of channels that are full, cut, or both; strides and dilations."""
    for size, options in (((3, 5), dict(padding=2, dilation=2)), ((16, 2), dict(stride=2)),
                          ((7, 9), dict(padding=(0, 1, 2, 0), stride=(1, 3)))):
        inputs, options = make_case(channels=channels, out=channels + 1, kernel=2, size=size,
                                    dtype=dtype, device=DEVICE, **options)
        inputs = [t.to(memory_format=layout) if t.dim() == 4 else t for t in inputs]
        expected = run([t.double() for t in inputs], 'reference', dropout_p=0.05, **options)
        for a, e in zip(run(inputs, 'triton', dropout_p=0.05, **options), expected, strict=True):
            assert relative_error(a, e) < (2e-6 if dtype == torch.float32 else TOLERANCE[dtype])
    results = []  # dropout counts elements alike in every layout
    for memory_format in (layout, torch.contiguous_format):
        torch.manual_seed(0)
        results.append(run([t.to(memory_format=memory_format) if t.dim() == 4 else t
                            for t in inputs], 'triton', dropout_p=0.05, training=True, **options))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e.double()) < TOLERANCE[dtype]


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
