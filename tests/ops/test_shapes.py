"""Shapes at the limits of what is valid."""
import pytest
import torch
from op_cases import DEVICE, IMPLS, make_case

from mmseg_kn.ops import kernel_norm2d, kn_conv2d
from mmseg_kn.ops.geometry import make_geometry

triton_backward = pytest.importorskip('mmseg_kn.ops.triton_backward')
triton_forward = pytest.importorskip('mmseg_kn.ops.triton_forward')
pytestmark = pytest.mark.usefixtures('full_float32', 'largest_tiny')


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
