"""KNConvNeXt against what the authors' code computes, and its place in mmengine."""
import golden
import pytest
import torch
from mmcv.cnn.bricks import DropPath
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS
from torch import nn

from mmseg_kn import KNConv2d, KNConvNeXt, KNConvNeXtClassifier, KNResNet
from mmseg_kn.checkpoints.norm_torch import convert_norm_torch
from mmseg_kn.models.knconvnext import ARCHS

SMALL = dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))


def build(**kwargs):
    torch.manual_seed(0)
    return KNConvNeXt(SMALL, layer_scale_init_value=0.5, **kwargs)


def test_equals_the_authors():
    weights = golden.convnext_weights(golden.convnext_shapes())
    net = KNConvNeXtClassifier('tiny', dropout_p=0.).double().eval()
    net.load_state_dict(convert_norm_torch(weights, classifier=True))
    x = golden.image((2, 3, 96, 128)).double()
    with torch.no_grad():
        assert golden.fingerprint(net(x)) == pytest.approx(golden.LOGITS_KNCONVNEXT_TINY, rel=1e-9)
        # The backbone of a segmentor has these features at every position.
        dense = KNConvNeXt('tiny', out_indices=(3, ), dropout_p=0.).double().eval()
        dense.load_state_dict(convert_norm_torch(weights))
        features, = dense(x)
    assert features.shape == (2, 768, 3, 4)


def test_sizes_are_torchvisions():
    assert {name: tuple(arch) for name, arch in ARCHS.items()} == golden.CONVNEXT
    for name, (_, channels) in golden.CONVNEXT.items():
        with torch.device('meta'):
            net = KNConvNeXtClassifier(name)
        assert net.backbone.feat_dim == channels[-1]
        shapes = golden.convnext_shapes(name)
        assert sum(p.numel() for p in net.parameters()) == sum(
            torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize('size', [(32, 64), (45, 63)])
def test_shapes(size):
    outs = build(in_channels=2)(torch.rand(2, 2, *size))
    assert [tuple(y.shape) for y in outs] == [
        (2, c, size[0] // s, size[1] // s) for c, s in zip(SMALL['channels'], (4, 8, 16, 32),
                                                          strict=True)]


def test_stages_beyond_the_last_output_are_not_built():
    net = build(out_indices=(1, 0))
    assert len(net.stages) == len(net.downsample_layers) == 2 and net.feat_dim == 16
    assert [y.shape[1] for y in net(torch.rand(1, 3, 32, 32))] == [8, 16]
    outs = build(out_indices=(3, ), gap_before_final_norm=True)(torch.rand(1, 3, 64, 64))
    assert [tuple(y.shape) for y in outs] == [(1, 32, 1, 1)]


def test_drop_path_and_initial_weights():
    net = build(drop_path_rate=0.4)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    conv = KNConvNeXt('tiny', out_indices=(1, )).downsample_layers[1]
    assert isinstance(conv, KNConv2d) and conv.dropout_p == 0.1
    assert conv.input_activation == 'relu' and not conv.bias.any()
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    scaled = KNConvNeXtClassifier(SMALL, num_classes=2)
    assert scaled.backbone.stages[0][0].gamma.weight[0].item() == pytest.approx(1e-6)
    unscaled = KNConvNeXt(SMALL, layer_scale_init_value=0)
    assert not any('gamma' in key for key in unscaled.state_dict())
    assert unscaled(torch.rand(1, 3, 32, 32))[0].shape == (1, 8, 8, 8)


def test_samples_do_not_see_each_other_and_recomputing_changes_nothing():
    net, x = build(dropout_p=0.).double(), torch.rand(2, 3, 48, 48, dtype=torch.float64)
    whole, first = net(x), net(x[:1])
    for a, b in zip(whole, first, strict=True):
        torch.testing.assert_close(a[:1], b, atol=1e-12, rtol=0)
    sum(y.square().sum() for y in whole).backward()
    again = build(dropout_p=0., with_cp=True).double()
    sum(y.square().sum() for y in again(x)).backward()
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_dropout_of_the_downsamplings_is_for_training_alone():
    net, x = build(dropout_p=0.3), torch.rand(1, 3, 64, 64)
    assert torch.equal(net(x)[0], net(x)[0]) and not torch.equal(net(x)[1], net(x)[1])
    net.eval()
    assert all(torch.equal(a, b) for a, b in zip(net(x), net(x), strict=True))


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    net = build(frozen_stages=frozen).train()
    for i, (opening, stage) in enumerate(zip(net.downsample_layers, net.stages, strict=True)):
        for part in (opening, stage):
            assert part.training == (i >= frozen)
            assert all(p.requires_grad == (i >= frozen) for p in part.parameters())


@pytest.mark.parametrize('kwargs, message', [
    (dict(arch='huge'), "arch must be one of .*'large'.*, got 'huge'"),
    (dict(arch=dict(depths=(1, 1), channels=(1, 1))), 'a dict of depths and channels with 4'),
    (dict(out_indices=()), 'out_indices must be distinct stages'),
    (dict(out_indices=(0, 4)), r'in 0\.\.3, got \(0, 4\)'),
    (dict(frozen_stages=5), r'frozen_stages must be in -1\.\.4, got 5'),
    (dict(drop_path_rate=1), r'drop_path_rate must be in \[0, 1\)'),
    (dict(layer_scale_init_value=-1), 'layer_scale_init_value not below 0'),
    (dict(gap_before_final_norm=True), r'out_indices must be \(3,\), got \(0, 1, 2, 3\)'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KNConvNeXt(**dict(dict(arch=SMALL), **kwargs))


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match=r'at least 32 pixels a side, got \(31, 40\)'):
        build()(torch.rand(1, 3, 31, 40))


def test_mmseg_builds_it():
    net = MODELS.build(dict(type='KNConvNeXt', arch=SMALL, drop_path_rate=0.1))
    assert isinstance(net, KNConvNeXt)


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    def load(weights, net=None, prefix=None):
        path = tmp_path / 'weights.pth'
        torch.save(dict(state_dict=weights), path)
        net = net or build()
        net.init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix=prefix)
        net.init_weights()
        return net

    classifier = KNConvNeXtClassifier(SMALL, num_classes=2)
    whole = classifier.state_dict()
    bare = {k.removeprefix('backbone.'): v for k, v in whole.items() if 'head' not in k}
    for weights, message in (
            (ResNet(18).state_dict(), 'it is a BatchNorm network'),
            (KNResNet(18).state_dict(), 'none of its .* keys matches'),
            (whole, r"it holds a whole model \(backbone.*prefix='backbone.'\)"),
            (KNConvNeXt(dict(SMALL, channels=(8, 16, 24, 40))).state_dict(),
             'of another shape, e.g. downsample_layers.3.weight'),
            *(({k: v for k, v in bare.items() if k != key}, f'1 of .* missing .* {key}')
              for key in ('stages.1.0.norm.bias', 'downsample_layers.2.bias')),
            *((dict.fromkeys(golden.convnext_shapes('tiny', source), torch.zeros(1)),
               'norm_torch2mmseg.py converts ConvNeXt') for source in (
                   'norm-torch', 'torchvision', 'mmpretrain'))):
        with pytest.raises(ValueError, match=f'KNConvNeXt-custom: .*{message}'):
            load(weights)
    # What may be missing: norms of outputs, all downsamplings together, a stem of other channels.
    for weights, net in (
            (bare, build()), (bare, build(in_channels=5)),
            ({k: v for k, v in bare.items() if k[:19] not in (
                'downsample_layers.1', 'downsample_layers.2', 'downsample_layers.3')}, build())):
        net = load(weights, net)
        assert torch.equal(net.stages[2][1].norm.weight, bare['stages.2.1.norm.weight'])
    net = load(whole, prefix='backbone.')
    assert torch.equal(net.downsample_layers[1].weight, bare['downsample_layers.1.weight'])
