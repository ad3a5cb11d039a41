"""A BatchNorm network that becomes a KernelNorm network stays near its function."""
import copy
import warnings

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
from mmseg_kn.models.calibrate import _fit_filters, _windows


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
    assert distance(net, fitted, held_out) < 0.5 * distance(net, folded, held_out)
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


@pytest.mark.parametrize('kwargs', [
    dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(1, 3), padding='same'),
    dict(kernel_size=3, padding=2, dilation=2, groups=2)])
def test_windows_are_what_the_layer_convolves(kwargs):
    layer = KNConv2d(4, 6, **kwargs).double().eval()
    x = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    y = layer(x)
    places = tuple(torch.randint(side, (20, )) for side in (3, *y.shape[2:]))
    windows = _windows(layer, x, places).unflatten(1, (layer.groups, -1))
    filters = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    found = torch.einsum('mgk,gok->mgo', windows, filters).flatten(1) + layer.bias
    torch.testing.assert_close(found, y[places[0], :, places[1], places[2]])


@pytest.mark.parametrize('positions, groups', [(200, 1), (15, 1), (200, 4)])
def test_filters_are_those_of_least_squares(positions, groups):
    """With more positions than values of a window or fewer, solved by torch another way."""
    layer = KNConv2d(4, 8, 3, groups=groups).double()
    old = layer.weight.detach().clone().view(groups, 8 // groups, -1)
    x, y = (torch.randn(positions, n, dtype=torch.float64) for n in (36 // groups * groups, 8))
    with torch.no_grad():
        _fit_filters(layer, x, y)
    x, y = ((part - part.mean(0)).view(positions, groups, -1) for part in (x, y))
    for group in range(groups):
        a, b, start = x[:, group], y[:, group], old[group].T
        guess = a @ start
        start = start * (guess * b).sum(0) / guess.square().sum(0)
        ridge = (0.3 * a.square().sum() / a.size(1)).sqrt() * torch.eye(a.size(1)).double()
        wanted = torch.linalg.lstsq(torch.cat([a, ridge]), torch.cat([b, ridge @ start])).solution
        torch.testing.assert_close(layer.weight.view(groups, 8 // groups, -1)[group].T, wanted)


def test_the_same_however_the_images_are_split(net):
    x = images(4, 10)
    nets = [kernelize(copy.deepcopy(net), calibrate=batches) for batches in ([x], x.split(1))]
    assert all(torch.equal(a, b) for a, b in
               zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    with pytest.raises(ValueError, match='calibrate must hold images, got an empty iterable'):
        kernelize(copy.deepcopy(net), calibrate=[])
    with pytest.raises(ValueError, match='must run on the images of calibrate, got RuntimeError'):
        kernelize(copy.deepcopy(net), calibrate=[torch.zeros(1, 4, 8, 8)])


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Calls the tool in a folder with the configs, as a user does."""
    generate(tmp_path / 'scenes', train=2, val=1, size=(64, 128))
    write_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    tool = load_tool(ROOT / 'tools/model_converters/batchnorm2kernelnorm.py')

    def call(config, checkpoint, out, *args):
        options = options_for(tmp_path / 'scenes', config == 'kn.py')
        monkeypatch.setattr('sys.argv', ['tool', config, checkpoint, out, *args, *options])
        tool.main()

    return call


def build(config, **kwargs):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(Config.fromfile(config).model, default_args=kwargs)


def test_converter(converter, tmp_path, capsys):
    """OUT loads into KernelNormalized around the model of CONFIG."""
    torch.save(dict(meta=dict(dataset_meta=dict(classes=['road'])),
                    state_dict=build('bn.py').state_dict()), 'bn.pth')
    for config in ('bn.py', 'kn.py'):
        converter(config, 'bn.pth', f'out_{config}.pth', '--num-images', '3')
    said = capsys.readouterr().out
    assert 'calibrated on 3 images' in said and 'if they are private' in said
    found, same = (torch.load(f'out_{name}.py.pth', weights_only=True) for name in ('bn', 'kn'))
    assert found['meta'] == dict(dataset_meta=dict(classes=['road']))
    assert all(torch.equal(value, same['state_dict'][name])
               for name, value in found['state_dict'].items())
    model = build('kn.py')
    model.load_state_dict(found['state_dict'])
    layer = model.backbone.layer1[0].conv1
    assert isinstance(layer, KNConv2d) and layer.bias.any()  # BatchNorm's shift was 0
    with pytest.raises(SystemExit, match='missing keys'):
        converter('bn.py', 'out_bn.py.pth', 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_a_pretrained_backbone_becomes_pretrained_of_the_converted_model(converter, tmp_path):
    """With the names of open-mmlab://resnet50_v1c, which is a classifier's checkpoint."""
    (tmp_path / 'r50.py').write_text(
        "_base_ = 'bn.py'\nmodel = dict(backbone=dict(depth=50), "
        'decode_head=dict(in_channels=256), auxiliary_head=dict(in_channels=128))\n')
    (tmp_path / 'r50_kn.py').write_text(
        "_base_ = 'r50.py'\nmodel = dict(_delete_=True, type='KernelNormalized', "
        "model=dict(_base_.model, pretrained='r50_kn.pth'))\n")
    state = build('r50.py').backbone.state_dict()
    assert {'stem.0.weight', 'stem.1.running_var', 'layer4.2.bn3.bias'} <= state.keys()
    torch.save({**state, 'fc.weight': torch.zeros(10, 256), 'fc.bias': torch.zeros(10)}, 'r50.pth')
    converter('r50.py', 'r50.pth', 'r50_kn.pth', '--num-images', '2', '--backbone')
    model = build('r50_kn.py')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'the checkpoint is that of a BatchNorm network')
        model.init_weights()
    saved = torch.load('r50_kn.pth', weights_only=True)['state_dict']
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert saved.keys() == model.backbone.state_dict().keys()
    assert saved['layer4.2.conv3.bias'].any()
    with pytest.raises(SystemExit, match='must hold the backbone of CONFIG, got none of .*stem.1'):
        converter('r50.py', 'r50_kn.pth', 'out.pth', '--backbone')
