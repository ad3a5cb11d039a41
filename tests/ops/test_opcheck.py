"""torch's own checks of the operators whose kernels Triton compiles."""
import pytest
import torch
from op_cases import DEVICE, PASSES

from mmseg_kn.ops import norm_operators, operators


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('formats', [('x', ), ('weight', ), ('x', 'weight')])
@pytest.mark.parametrize('kernel, groups', [(1, 1), (3, 1), (3, 4)])
def test_opcheck_of_kernels(kernel, groups, dtype, formats):
    """A compiler is told the memory format of what they put out, whatever those of x and W."""
    triton_passes = PASSES['triton']
    given = dict(x=torch.randn(2, 4, 6, 6, dtype=dtype),
                 weight=torch.randn(8, 4 // groups, kernel, kernel))
    x, weight = (
        tensor.to(DEVICE, memory_format=torch.channels_last if name in formats
                  else torch.contiguous_format).requires_grad_()
        for name, tensor in given.items())
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], groups)
    for dropout_p, training in ((0.1, True), (0.1, False), (0.0, True)):
        seed = triton_passes.draw_mask(x.detach(), dropout_p) if training and dropout_p else None
        for relu in (False, True):
            torch.library.opcheck(
                operators.kn_conv2d_op,
                (x, weight, None, None, seed, *geometry, dropout_p, training, False, 1e-5, relu,
                 relu, 'triton'),
                test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('impl', PASSES)
def test_opcheck_of_the_norm(impl, layout, dtype):
    device = DEVICE if impl == 'triton' else 'cpu'
    x = torch.randn(2, 5, 4, 3, dtype=dtype).to(device, memory_format=layout).requires_grad_()
    mask = PASSES[impl].draw_mask(x.detach(), 0.25)
    for args in ((mask, 0.25, True, 1e-5, True), (None, 0.25, False, 1e-5, False),
                 (None, 0.0, True, 1e-5, True)):
        torch.library.opcheck(norm_operators.pixel_norm_op, (x, *args, impl), test_utils=(
            'test_schema', 'test_autograd_registration', 'test_faketensor',
            'test_aot_dispatch_static'))
