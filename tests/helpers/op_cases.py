"""Cases of the operation, and what runs and compares them."""
import golden
import pytest
import torch

from mmseg_kn.ops import fused, kn_conv2d
from mmseg_kn.ops.geometry import make_geometry
from mmseg_kn.ops.passes import MomentGrads
from mmseg_kn.ops.precision import accumulate_dtype

triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')

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
# For `largest_tiny` (tests/ops/conftest.py): 'fused' builds the units of all inputs.
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


def kept_elements(passes, x, dropped, p):
    """The mask of a dropout, as backward sees it: dx of a loss that weighs all x alike."""
    n, c, h, w = x.shape
    one = torch.full((n, h, w), c, dtype=accumulate_dtype(x.dtype), device=x.device)
    return passes.add_moment_grads(torch.zeros_like(x), x, make_geometry(1), dropped, p,
                                   MomentGrads(one, torch.zeros_like(one), None), False)
