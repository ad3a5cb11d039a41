"""Conversion of ConvNeXt and of the authors' KNConvNeXt: all that fits, or a clear error."""
import re

import golden
import pytest
import torch
from pretrain import import_mmpretrain
from program import ROOT, execute

from mmseg_kn import KNConvNeXt, KNConvNeXtClassifier
from mmseg_kn.checkpoints.convnext import SOURCES, convnext_arch, convnext_source
from mmseg_kn.checkpoints.norm_torch import convert_file, convert_norm_torch

TOOL = ROOT / 'tools/model_converters/norm_torch2mmseg.py'


def weights_of(source, arch='tiny', **changes):
    """Different constants that take no memory, so that every tensor can be told apart."""
    shapes = golden.convnext_shapes(arch, source, num_classes=10)
    weights = {name: torch.full((1, ), float(i)).expand(shape)
               for i, (name, shape) in enumerate(shapes.items())}
    for name, value in changes.items():
        name = name.replace('__', '.')
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize('source', SOURCES)
def test_every_source(source):
    weights = weights_of(source)
    assert convnext_source(weights) == source
    assert convnext_arch(weights) == 'tiny'
    whole = convert_norm_torch(weights, classifier=True)
    with torch.device('meta'):
        net = KNConvNeXtClassifier('tiny', num_classes=10)
        backbone = KNConvNeXt('tiny', out_indices=(3, ))
    absent = net.state_dict().keys() - whole.keys()
    downsamplings = {f'backbone.downsample_layers.{i}.{kind}' for i in (1, 2, 3)
                     for kind in ('weight', 'bias')}
    assert absent == (set() if source == 'norm-torch' else downsamplings)
    assert all(whole[key].shape == net.state_dict()[key].shape for key in whole)
    bare = convert_norm_torch(weights)
    assert backbone.state_dict().keys() - bare.keys() == {
        key.removeprefix('backbone.') for key in absent}
    assert all(torch.equal(value, whole[f'backbone.{key}']) for key, value in bare.items())
    # Each tensor is used once, but for those of the downsamplings of a ConvNeXt.
    used = sorted(value.flatten()[0].item() for value in whole.values())
    left_out = re.compile(r'features\.[246]\.[01]|.*downsample_layers\.[123]')
    assert used == sorted(value.flatten()[0].item() for name, value in weights.items()
                          if source == 'norm-torch' or not left_out.match(name))


@pytest.mark.parametrize('source', SOURCES)
def test_values_go_where_they_belong(source):
    """In a stage, by the order of the layers in their files."""
    whole = convert_norm_torch(weights_of(source), classifier=True)
    given = weights_of(source)
    block = 'backbone.stages.2.4' if source == 'mmpretrain' else 'features.5.4'
    names = {'gamma': 'gamma' if source == 'mmpretrain' else 'layer_scale',
             **{ours: ours if source == 'mmpretrain' else f'block.{i}' for ours, i in (
                 ('depthwise_conv', 0), ('norm', 2), ('pointwise_conv1', 3),
                 ('pointwise_conv2', 5))}}
    for ours, theirs in names.items():
        name = f'{block}.{theirs}' + ('' if ours == 'gamma' else '.weight')
        assert whole[f'backbone.stages.2.4.{ours}.weight'].flatten()[0] == given[name].flatten()[0]


@pytest.mark.parametrize('arch', golden.CONVNEXT)
def test_every_size(arch):
    assert convnext_arch(weights_of('torchvision', arch)) == arch


def test_a_backbone_of_mmpretrain():
    """As ImageClassifier has it, or bare; without head and, in detectors, the last norm."""
    headless = {k: v for k, v in weights_of('mmpretrain').items() if not k.startswith('head')}
    bare = {k.removeprefix('backbone.'): v for k, v in headless.items()}
    without_norm = {k: v for k, v in bare.items() if not k.startswith('norm3')}
    converted = [convert_norm_torch(weights) for weights in (headless, bare, without_norm)]
    assert converted[0].keys() == converted[1].keys() == {
        'norm3.weight', 'norm3.bias'} | converted[2].keys()
    with pytest.raises(ValueError, match='missing keys: head.fc.weight'):
        convert_norm_torch(headless, classifier=True)


@pytest.mark.parametrize('source, changes, message', [
    ('norm-torch', dict(features__2__1__bias=None),
     "norm-torch's knconvnext_tiny, but have missing keys: features.2.1.bias$"),
    ('torchvision', dict(extra=torch.zeros(1)),
     "torchvision's convnext_tiny, but have unknown keys: extra$"),
    ('mmpretrain', dict(backbone__stages__0__0__grn__gamma=torch.zeros(1)),  # ConvNeXt V2
     "mmpretrain's convnext_tiny, but have unknown keys: backbone.stages.0.0.grn.gamma$"),
    ('norm-torch', dict(features__4__1__weight=torch.zeros(384, 192, 3, 3)),
     r'features.4.1.weight of .* must have the shape \(384, 192, 2, 2\)'),
    ('torchvision', dict(features__1__0__layer_scale=torch.zeros(96)),
     r'layer_scale of .* must have the shape \(96, 1, 1\), got \(96,\)'),
    ('torchvision', dict(features__1__0__layer_scale=torch.full((96, 1, 1), torch.nan)),
     'must be a dense tensor of finite'),
    ('norm-torch', dict(features__0__0__weight=torch.zeros(80, 3, 4, 4)),
     r'must be tiny, small, base, large; got one whose stem has the shape \(80, 3, 4, 4\)'),
])
def test_other_files_are_refused(tmp_path, source, changes, message):
    torch.save(dict(model=weights_of(source, **changes)), tmp_path / 'src.pth')
    with pytest.raises(ValueError, match=message):
        convert_file(tmp_path / 'src.pth', tmp_path / 'out' / 'dst.pth')
    assert not (tmp_path / 'out').exists()


def test_a_converted_file_is_refused(tmp_path):
    torch.save(KNConvNeXt(dict(depths=[1] * 4, channels=[4] * 4)).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='KNConvNeXt of mmseg_kn already'):
        convert_file(tmp_path / 'a.pth', tmp_path / 'dst.pth')


def test_tool(tmp_path):
    """A file of torchvision, to the start of a segmentor's backbone."""
    torch.save(weights_of('torchvision'), tmp_path / 'convnext_tiny.pth')
    log = execute(TOOL, 'convnext_tiny.pth', 'dst.pth', cwd=tmp_path)
    path, = tmp_path.glob('dst-*.pth')
    assert f'ConvNeXt-tiny; written to {path.name}' in log and 'start from scratch' in log
    assert "In model.backbone: arch='tiny', init_cfg=dict(type='Pretrained', checkpoint=" in log
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['meta']['arch'] == 'tiny' and 'depth' not in checkpoint['meta']
    net = KNConvNeXt('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    for key in ('stages.3.2.gamma.weight', 'downsample_layers.0.1.bias', 'norm3.weight'):
        assert torch.equal(net.state_dict()[key], checkpoint['state_dict'][key])
    assert net.downsample_layers[2].weight.std() > 0  # not one of the constants


@pytest.mark.parametrize('source', ['torchvision', 'mmpretrain'])
def test_their_own_network_computes_the_same_but_for_its_downsamplings(source):
    mmpretrain = import_mmpretrain()
    torch.manual_seed(0)
    if source == 'torchvision':
        from torchvision.models import convnext_tiny
        theirs = convnext_tiny(num_classes=10)
        openings = [theirs.features[i] for i in (2, 4, 6)]
    else:
        theirs = mmpretrain.registry.MODELS.build(dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmpretrain.ConvNeXt', arch='tiny'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=10, in_channels=768)))
        openings = theirs.backbone.downsample_layers[1:]
    theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # scales start so small that blocks add nothing
            parameter.uniform_(-0.1, 0.1)
    weights = theirs.state_dict()
    assert convnext_source(weights) == source and convnext_arch(weights) == 'tiny'
    ours = KNConvNeXtClassifier('tiny', num_classes=10).double().eval()
    absent = ours.load_state_dict(convert_norm_torch(weights, classifier=True), strict=False)
    assert len(absent.missing_keys) == 6 and not absent.unexpected_keys
    for i, opening in enumerate(openings, start=1):
        ours.backbone.downsample_layers[i] = opening
    x = torch.rand(2, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        logits = theirs(x) if source == 'torchvision' else theirs(x, mode='tensor')
        assert logits.std() > 1e-3
        torch.testing.assert_close(ours(x), logits, rtol=1e-9, atol=1e-12)
