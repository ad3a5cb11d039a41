import copy
import pickle

import pytest
import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule, build_conv_layer, build_norm_layer
from mmengine.model import ExponentialMovingAverage

from mmseg_kn import KernelNorm2d, KNConv2d, ops


@pytest.mark.parametrize('name', ['KN', 'KernelNorm2d', 'mmengine.KN'])
def test_mmcv_builds_the_norm(name):
    key, norm = build_norm_layer(dict(type=name), 8, postfix=1)
    assert key == 'kn1' and isinstance(norm, KernelNorm2d) and norm.eps == 1e-5
    x = torch.randn(2, 8, 5, 6)
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize('name', ['KNConv', 'KNConv2d', 'mmengine.KNConv'])
def test_mmcv_builds_the_conv(name):
    conv = build_conv_layer(dict(type=name, dropout_p=0.1), 4, 6, 3, padding=1, bias=False)
    assert isinstance(conv, KNConv2d) and conv.bias is None and conv.dropout_p == 0.1


def test_conv_module_with_knconv_and_no_norm():
    torch.manual_seed(0)
    module = ConvModule(4, 6, 3, padding=2, dilation=2, conv_cfg=dict(type='KNConv')).eval()
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    y = module(x)  # mmcv's activation works in place
    conv = module.conv
    expected = ops.kn_conv2d(x, conv.weight, conv.bias, padding=2, dilation=2, dropout_p=0.05)
    torch.testing.assert_close(y, expected.relu())
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_conv_module_with_kn_after_the_conv():
    module = ConvModule(4, 6, 3, norm_cfg=dict(type='KN', dropout_p=0.))
    y = module(torch.randn(2, 4, 9, 8))
    assert isinstance(module.norm, KernelNorm2d) and (y >= 0).all()


def test_depthwise_separable():
    module = DepthwiseSeparableConvModule(4, 6, 3, padding=1, conv_cfg=dict(type='KNConv'))
    assert module.depthwise_conv.conv.groups == 4
    assert module(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)


def test_initial_weights():
    torch.manual_seed(0)
    conv = KNConv2d(32, 64, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9))**0.5, rel=0.05)  # fan out
    assert (conv.bias == 0).all()


def test_training_draws_dropout_and_evaluation_does_not():
    torch.manual_seed(0)
    x = torch.rand(2, 8, 10, 10)
    for layer in (KNConv2d(8, 6, 3, dropout_p=0.2), KernelNorm2d(8, 2, 2, dropout_p=0.2)):
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))
    conv = KNConv2d(8, 6, 3, dropout_p=0.)
    assert torch.equal(conv(x), conv(x))


def test_state_pickle_and_deepcopy():
    conv = KNConv2d(4, 6, (3, 2), padding=(1, 0, 2, 1), dropout_p=0.1, eps=1e-3).eval()
    assert list(conv.state_dict()) == ['weight', 'bias']
    assert not KernelNorm2d(4).state_dict()
    x = torch.randn(1, 4, 7, 7)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), conv(x))


def test_repr_names_what_matters():
    assert repr(KNConv2d(4, 6, 3, padding=(1, 0, 1, 0), dilation=2)) == (
        'KNConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 0, 1, 0), '
        'dilation=(2, 2), dropout_p=0.05, eps=1e-05)')
    assert repr(KernelNorm2d(4, 2, 2)) == (
        'KernelNorm2d(4, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), '
        'dropout_p=0.05, eps=1e-05)')


def test_same_padding_is_nn_conv2ds():
    x = torch.randn(1, 4, 9, 8)
    assert KNConv2d(4, 6, 4, padding='same', dilation=3)(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize('call, message', [
    (lambda: KNConv2d(4, 6, 3, padding_mode='reflect'), "'zeros', got 'reflect'"),
    (lambda: KNConv2d(4, 6, 3, groups=3), 'in_channels=4 and .* divisible by groups=3'),
    (lambda: KNConv2d(4, 6, 3, groups=0), 'groups must be an int >= 1, got 0'),
    (lambda: KNConv2d(0, 6, 3), 'in_channels must be an int >= 1, got 0'),
    (lambda: KNConv2d(4, None, 3), 'out_channels must be an int >= 1, got None'),
    (lambda: KNConv2d(4, 6, 3, eps=float('nan')), 'eps must be > 0, got nan'),
    (lambda: KNConv2d(4, 6, 3, dropout_p=None), r'dropout_p must be in \[0, 1\), got None'),
    (lambda: KNConv2d(4, 6, 3, dtype=torch.int32), 'dtype must be floating point'),
    (lambda: KNConv2d(4, 6, 3, dropout_p=1), r'dropout_p must be in \[0, 1\), got 1'),
    (lambda: KNConv2d(4, 6, 3, padding=(1, 2, 3)), 'padding must be'),
    (lambda: KernelNorm2d(4, dropout_p=-1), 'dropout_p must be'),
    (lambda: KernelNorm2d('4'), "num_features must be an int >= 1, got '4'"),
    (lambda: KernelNorm2d(4, eps=-1), 'eps must be > 0, got -1'),
    (lambda: KernelNorm2d(4, kernel_size=0), 'kernel_size must be'),
    (lambda: KernelNorm2d(4)(torch.randn(2, 5, 3, 3)), r'num_features=4 .* \(2, 5, 3, 3\)'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluation_follows_the_weight_however_it_changes():
    """Nothing derived from the weight is kept: mean teachers write to weight.data, unseen."""
    conv, x = KNConv2d(4, 6, 3).eval(), torch.rand(1, 4, 7, 7)
    teacher = ExponentialMovingAverage(conv, momentum=0.5).eval()
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)

    def is_current(conv):
        with torch.no_grad():
            expected = ops.kn_conv2d(x, conv.weight, conv.bias, dropout_p=0.05, impl='reference')
            torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)

    is_current(conv), is_current(teacher.module)
    conv(x).square().sum().backward()
    optimizer.step()
    is_current(conv)
    teacher.update_parameters(conv)
    teacher.update_parameters(conv)
    is_current(teacher.module)
    conv.weight.data.copy_(torch.randn_like(conv.weight))
    is_current(conv)
    conv.load_state_dict(teacher.module.state_dict())
    is_current(conv), is_current(copy.deepcopy(conv))
