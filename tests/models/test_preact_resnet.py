"""PreActResNet against its formula, and its sizes."""
import pytest
import torch
import torch.nn.functional as F

from mmseg_kn.models.preact_resnet import PreActBlock, PreActResNetCls

GN = dict(type='GN', num_groups=1)


@pytest.mark.parametrize('bottleneck, stride', [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_a_block_is_the_formula(bottleneck, stride):
    torch.manual_seed(0)
    block = PreActBlock(4, 4, stride, GN, bottleneck).double()
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    first = F.relu(F.group_norm(x, 1))
    y, strides = first, (1, stride, 1) if bottleneck else (stride, 1)
    for i, (conv, step) in enumerate(zip(block.convs, strides, strict=True)):
        y = y if i == 0 else F.relu(F.group_norm(y, 1))
        y = F.conv2d(y, conv.weight, stride=step, padding=conv.weight.shape[-1] // 2)
    identity = x
    if bottleneck or stride == 2:
        identity = F.conv2d(first, block.shortcut.weight, stride=stride)
    else:
        assert block.shortcut is None
    torch.testing.assert_close(block(x), identity + y)


@pytest.mark.parametrize('depth, blocks, channels', [(18, 8, 512), (34, 16, 512), (50, 16, 2048)])
def test_sizes(depth, blocks, channels):
    with torch.device('meta'):
        net = PreActResNetCls(depth, GN)
        small = PreActResNetCls(depth, GN, low_resolution=True)
        assert net(torch.zeros(1, 3, 64, 64))[0].shape == (1, channels, 2, 2)
        assert small(torch.zeros(1, 3, 32, 32))[0].shape == (1, channels, 4, 4)
    assert len(net.blocks) == blocks and net.feat_dim == channels
    with pytest.raises(ValueError, match=r'depth must be one of \(18, 34, 50\), got 101'):
        PreActResNetCls(101, GN)


def test_first_weights_and_the_rectified_output():
    torch.manual_seed(0)
    net = PreActResNetCls(18, dict(type='BN'), low_resolution=True)
    net.init_weights()
    conv = net.blocks[6].convs[1].weight
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    y, = net(torch.rand(2, 3, 32, 32))
    assert y.min() == 0 and y.max() > 0
