"""Kernel normalization in networks that are not mmseg's, in the style of torchvision and timm."""
import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_kn import KernelNorm2d, KNConv2d, kernelize


class NormAct(nn.BatchNorm2d):
    """As timm has it: the activation is inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Excite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * self.expand(F.relu(self.reduce(self.pool(x)))).sigmoid()


class Bottleneck(nn.Module):
    """The norms are made before the convolutions, one ReLU serves all."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c) for c in (width, width, 4 * width))
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False),
                                        nn.BatchNorm2d(4 * width))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += self.downsample(x)
        return self.relu(out)


class Inverted(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, 24, 1, bias=False), NormAct(24),
                         nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False), NormAct(24),
                         Excite(24), nn.Conv2d(24, channels, 1, bias=False),
                         nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + super().forward(x)


class Segmenter(nn.Module):
    """Returns a dict, as torchvision's do; a transposed convolution stays what it is."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8),
                                  nn.ReLU6(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList([Bottleneck(8, 4, 2), Inverted(16)])
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.SiLU())
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        size = x.shape[2:]
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return dict(out=F.interpolate(self.classifier(self.up(x)), size, mode='bilinear'))


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return kernelize(Segmenter(), example=torch.zeros(1, 3, 32, 48))


def test_all_of_it_is_converted(net):
    assert not any(isinstance(module, _BatchNorm) for module in net.modules())
    became = {row.name: row.became for row in net.conversion}
    assert became['stages.0.bn2'] == 'KNConv2d stages.0.conv2'
    assert became['stages.1.3'] == 'KNConv2d stages.1.2'
    assert became['up.1'] == 'KernelNorm2d' and isinstance(net.up[1], KernelNorm2d)
    assert sum(isinstance(module, KNConv2d) for module in net.modules()) == 8
    # attention and classifier, which had no normalization, still have none
    assert sorted(name for name, what in became.items() if what.startswith('as it was')) == [
        'classifier', 'stages.1.4.expand', 'stages.1.4.reduce', 'up.0']


def test_one_image_trains_it(net):
    net = copy.deepcopy(net).train()
    label = torch.randint(5, (1, 32, 48))
    F.cross_entropy(net(torch.rand(1, 3, 32, 48))['out'], label).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.any() for p in net.parameters())


def test_an_image_does_not_see_its_neighbour(net):
    """In training mode, with the same random numbers; and BatchNorm does."""
    images = torch.rand(3, 3, 32, 48)

    def distance(net):
        seen = []
        for pair in ([0, 1], [0, 2]):
            torch.manual_seed(0)
            seen.append(net.train()(images[pair])['out'][0])
        return (seen[0] - seen[1]).abs().max().item()

    with torch.no_grad():
        assert distance(copy.deepcopy(net)) < 1e-6 < 1e-3 < distance(Segmenter())


def test_its_weights_load_back(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    other = kernelize(Segmenter(), example=torch.zeros(1, 3, 32, 48))
    other.load_state_dict(torch.load(tmp_path / 'net.pth', weights_only=True))
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(net.eval()(x)['out'], other.eval()(x)['out'])


def test_onnx_runtime_computes_the_same(net, tmp_path):
    net, file = net.eval(), tmp_path / 'net.onnx'
    torch.onnx.export(net, (torch.rand(1, 3, 32, 48), ), file, dynamo=True, verbose=False,
                      input_names=['image'], output_names=['out'])
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    x = torch.rand(1, 3, 32, 48)
    found, = session.run(None, dict(image=x.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(x)['out'], rtol=1e-3, atol=1e-4)
