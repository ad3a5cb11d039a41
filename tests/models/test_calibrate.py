"""A BatchNorm network that becomes a KernelNorm network stays near its function."""
import copy

import pytest
import torch
import torch.nn.functional as F
from converted import options_for, write_configs
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from program import ROOT, load_tool
from torch import nn
from toy_cityscapes import generate

from mmseg_kn import KNConv2d, kernelize


def scenes(n, seed, size=(48, 48)):
    """Regions of five colours and textures, under a tint; images and labels."""
    rng = torch.Generator().manual_seed(seed)
    rough = torch.randn(n, 5, size[0] // 8, size[1] // 8, generator=rng)
    label = F.interpolate(rough, size, mode='bilinear').argmax(1)
    colours = torch.tensor([[.7, 0, 0], [0, .7, 0], [0, 0, .7], [.7, .7, 0], [.4, .4, .4]])
    roughness = torch.tensor([.1, .3, .5, .2, .8])[label][:, None]
    return (colours[label].permute(0, 3, 1, 2)
            + roughness * torch.randn(n, 3, *size, generator=rng)
            + 0.3 * torch.randn(n, 3, 1, 1, generator=rng)), label


def images(n, seed):
    return scenes(n, seed)[0]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


@pytest.fixture(scope='module')
def net():
    """Trained for 30 iterations."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                        *(Block(16) for _ in range(3)), nn.Conv2d(16, 5, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i in range(30):
        x, label = scenes(8, 1000 + i)
        optimizer.zero_grad()
        F.cross_entropy(net(x), label).backward()
        optimizer.step()
    return net.eval()


def distance(net, other, x):
    with torch.no_grad():
        a, b = net(x), other(x)
    return ((a - b).norm() / (a - a.mean((0, 2, 3), keepdim=True)).norm()).item()


def test_nearer_than_folding_on_images_that_were_not_seen(net):
    folded = kernelize(copy.deepcopy(net))
    fitted = kernelize(copy.deepcopy(net), calibrate=[images(8, 10), (images(8, 11), 'labels')])
    held_out = images(8, 20)
    assert distance(net, fitted, held_out) < 0.7 * distance(net, folded, held_out)
    assert not fitted.training


def test_moments_are_those_of_the_batchnorm_network(net):
    x = images(8, 10)
    fitted = kernelize(copy.deepcopy(net), calibrate=[x])
    seen = {}
    for model, layers in ((copy.deepcopy(net), ('1', '3.norm1', '5.norm2')),
                          (fitted, ('0', '3.conv1', '5.conv2'))):
        for name in layers:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, y, key=(model, name): seen.update({key: y.double()}))
        model(x)
    for a, b in zip(list(seen.values())[:3], list(seen.values())[3:], strict=True):
        torch.testing.assert_close(a.mean((0, 2, 3)), b.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.std((0, 2, 3)), b.std((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_same_however_the_images_are_split(net):
    x = images(4, 10)
    nets = [kernelize(copy.deepcopy(net), calibrate=batches) for batches in ([x], x.split(1))]
    assert all(torch.equal(a, b) for a, b in
               zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    with pytest.raises(ValueError, match='calibrate must hold images, got an empty iterable'):
        kernelize(copy.deepcopy(net), calibrate=[])
    with pytest.raises(ValueError, match='must run on the images of calibrate, got RuntimeError'):
        kernelize(copy.deepcopy(net), calibrate=[torch.zeros(1, 4, 8, 8)])


def test_converter(tmp_path, monkeypatch, capsys):
    """OUT loads into KernelNormalized around the model of CONFIG."""
    generate(tmp_path / 'scenes', train=2, val=1, size=(64, 128))
    write_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile('bn.py').model)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=['road'])),
                    state_dict=model.state_dict()), 'bn.pth')
    tool = load_tool(ROOT / 'tools/model_converters/batchnorm2kernelnorm.py')

    def call(config, checkpoint, out, *args):
        options = options_for(tmp_path / 'scenes', config == 'kn.py')
        monkeypatch.setattr('sys.argv', ['tool', config, checkpoint, out, *args, *options])
        tool.main()

    for config in ('bn.py', 'kn.py'):
        call(config, 'bn.pth', f'out_{config}.pth', '--num-images', '3')
    said = capsys.readouterr().out
    assert 'calibrated on 3 images' in said and 'if they are private' in said
    found, same = (torch.load(f'out_{name}.py.pth', weights_only=True) for name in ('bn', 'kn'))
    assert found['meta'] == dict(dataset_meta=dict(classes=['road']))
    assert all(torch.equal(value, same['state_dict'][name])
               for name, value in found['state_dict'].items())
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile('kn.py').model)
    model.load_state_dict(found['state_dict'])
    layer = model.backbone.layer1[0].conv1
    assert isinstance(layer, KNConv2d) and layer.bias.any()  # BatchNorm's shift was 0
    with pytest.raises(SystemExit, match='missing keys'):
        call('bn.py', 'out_bn.py.pth', 'out.pth')
    assert not (tmp_path / 'out.pth').exists()
