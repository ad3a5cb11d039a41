"""cuDNN's TF32, emulated: operands of a float32 convolution rounded to 10 bits of mantissa."""
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmseg_kn.ops import kn_conv2d, precision, unfolded


def allows_tf32():
    if hasattr(torch.backends.cudnn, 'conv'):
        return torch.backends.cudnn.conv.fp32_precision == 'tf32'
    return torch.backends.cudnn.allow_tf32


@contextmanager
def allow_tf32(allow):
    flags, name, value = (
        (torch.backends.cudnn.conv, 'fp32_precision', 'tf32' if allow else 'ieee')
        if hasattr(torch.backends.cudnn, 'conv')
        else (torch.backends.cudnn, 'allow_tf32', allow))
    before = getattr(flags, name)
    setattr(flags, name, value)
    yield
    setattr(flags, name, before)


def rounded(x):
    """To the nearest number of 10 bits of mantissa, if torch's flags let cuDNN do that."""
    if x.dtype != torch.float32 or not allows_tf32():
        return x
    return ((x.detach().view(torch.int32) + 0xFFF + (x.detach().view(torch.int32) >> 13 & 1))
            & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32(monkeypatch):
    """A CPU that computes as a GPU with torch's default flags."""
    monkeypatch.setattr(unfolded, 'LARGEST', 0)  # there tiny inputs go through a convolution too
    conv, backward = F.conv2d, torch.ops.aten.convolution_backward
    monkeypatch.setattr(F, 'conv2d', lambda x, w, *args, **options: conv(
        rounded(x), rounded(w), *args, **options))
    monkeypatch.setattr(torch.ops.aten, 'convolution_backward',
                        lambda h, x, w, *args: backward(rounded(h), rounded(x), rounded(w), *args))
    monkeypatch.setattr(precision, '_may_use_tf32', lambda x: x.dtype == torch.float32)
    with allow_tf32(True):
        yield
        assert allows_tf32()


def errors(deviation, **options):
    """Of output and gradients against the definition in float64, of bright and flat input."""
    torch.manual_seed(0)
    x = 1 + deviation * torch.randn(1, 64, 12, 12)
    weight, bias = torch.randn(32, 64, 2, 2) / 16, torch.zeros(32)

    def run(x, weight, bias, impl):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = kn_conv2d(*leaves, impl=impl, **options)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
        return [y.detach(), leaves[0].grad, leaves[1].grad]

    expected = run(x.double(), weight.double(), bias.double(), 'reference')
    return [((a - e).norm() / e.norm()).item()
            for a, e in zip(run(x, weight, bias, 'fused'), expected, strict=True)]


@pytest.mark.parametrize('options', [dict(dropout_p=0.05), dict(), dict(training=True)])
def test_flat_bright_input_is_as_exact_as_in_float32(options, tf32, monkeypatch):
    for deviation in (0.01, 0.003):
        actual = errors(deviation, **options)
        with allow_tf32(False):
            bounds = errors(deviation, **options)
        assert all(a <= 2 * bound for a, bound in zip(actual, bounds, strict=True))
        with monkeypatch.context() as patch:  # what this is worth
            patch.setattr(precision, '_may_use_tf32', lambda x: False)
            assert errors(deviation, **options)[0] > 100 * actual[0]


def test_training_keeps_tf32(tf32, monkeypatch):
    """Under dropout nothing cancels: TF32 costs there what it costs a plain convolution."""
    seen = []
    emulated = F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *args: seen.append(allows_tf32()) or emulated(*args))
    x, weight = torch.rand(1, 8, 6, 6), torch.rand(4, 8, 2, 2, requires_grad=True)
    for training, dropout_p, dtype in ((True, 0.05, None), (False, 0.05, None), (True, 0, None),
                                       (True, 0.05, torch.float64), (False, 0, torch.float64)):
        kn_conv2d(x.to(dtype), weight.to(dtype), dropout_p=dropout_p, training=training)
    assert seen == [True, False, False, True, True]
    assert allows_tf32()


def test_threads_that_convolve_at_once_leave_the_flag_as_it_was():
    """One leaves while another is still inside, as with a backward thread for each GPU."""
    context = precision.unrounded_convolution
    setting = SimpleNamespace(cancels=True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with allow_tf32(True), ExitStack() as one, ExitStack() as other:
        one.enter_context(context(x, setting))
        other.enter_context(context(x, setting))
        one.close()
        assert not allows_tf32()
        other.close()
        assert allows_tf32()
