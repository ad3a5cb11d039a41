"""max_pool2d: the values and gradients of torch, with two bytes for each maximum."""
import pytest
import torch
import torch.nn.functional as F

from mmseg_kn.models.max_pool import max_pool2d

WINDOWS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=2, stride=2, ceil_mode=True),
    dict(kernel_size=2, stride=1, dilation=4),
    dict(kernel_size=3, stride=1, padding=1, dilation=2),
]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('window', WINDOWS)
def test_equals_torchs(window, dtype, channels_last):
    x = torch.randint(-9, 9, (2, 3, 9, 11)).to(dtype)  # with ties
    x[0, 0, :, 8:] = -torch.inf
    x[1, 0, 3, 3] = torch.nan
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours, theirs = max_pool2d(a, **window), F.max_pool2d(b, **window)
    assert ours.stride() == theirs.stride()
    grad = torch.rand_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    assert torch.equal(max_pool2d(a.detach().nan_to_num(), **window),
                       F.max_pool2d(a.detach().nan_to_num(), **window))


def test_keeps_two_bytes_for_each_maximum():
    saved = []
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = max_pool2d(x, 2, 2)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int16, y.shape)]
