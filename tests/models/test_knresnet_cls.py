"""The classification networks against what the authors' compute, and their place in mmengine."""
import golden
import pytest
import torch
from mmengine.registry import MODELS

from mmseg_kn import KNResNet, KNResNetClassifier, KNResNetCls
from mmseg_kn.checkpoints.norm_torch import convert_norm_torch
from mmseg_kn.models.knresnet import Block, Transition
from mmseg_kn.ops import kernel_norm2d


def authors(depth):
    """The classifier with the golden weights, in float64 and without dropout."""
    net = KNResNetClassifier(depth, dropout_p=0.)
    net.load_state_dict(convert_norm_torch(golden.norm_torch_weights(depth), classifier=True))
    return net.double().eval()


@pytest.mark.parametrize('depth', golden.NORM_TORCH)
def test_equals_the_authors(depth):
    net = authors(depth)
    seen, counts = {}, {Block: 0, Transition: 0}

    def watch(module, name):
        module.register_forward_hook(lambda m, i, o: seen.update({name: o}))

    for unit in net.modules():
        if type(unit) in counts:
            counts[type(unit)] += 1
            watch(unit, f'{"res" if type(unit) is Block else "trans"}_block{counts[type(unit)]}')
    if net.backbone.tail is not None:
        watch(net.backbone.tail, 'conv_block_f')
    # Without the ReLU that ours ends with.
    net.backbone.norm.register_forward_hook(lambda m, i, o: seen.update(
        kn_f=kernel_norm2d(i[0], dropout_p=m.dropout_p, training=m.training)))
    net.backbone.layer1.register_forward_pre_hook(lambda m, i: seen.update(block0=i[0]))
    with torch.no_grad():
        logits = net(golden.image((2, 3, 128, 160)).double())
    assert golden.fingerprint(logits) == pytest.approx(golden.LOGITS[depth], rel=1e-9)
    for name, expected in golden.BLOCKS[depth].items():
        y = seen[name]
        y = y[:1, ::max(1, y.size(1) // 16)]
        assert golden.fingerprint(y) == pytest.approx(expected, rel=2e-6, abs=1e-6), name


@pytest.mark.parametrize('depth', golden.NORM_TORCH)
def test_low_resolution_equals_the_authors(depth):
    net = KNResNetClassifier(depth, num_classes=10, low_resolution=True, dropout_p=0.)
    net.load_state_dict(convert_norm_torch(
        golden.norm_torch_weights(depth, num_classes=10, stem_kernel=3), classifier=True))
    with torch.no_grad():
        logits = net.double().eval()(golden.image((2, 3, 33, 40)).double())
    expected = golden.LOGITS_LOW_RESOLUTION[depth]
    assert golden.fingerprint(logits) == pytest.approx(expected, rel=1e-9)


def test_mish_equals_the_authors():
    """The network of their private training."""
    weights = golden.norm_torch_weights(18, stem_kernel=3, dtype='float64')
    net = KNResNetClassifier(18, low_resolution=True, dropout_p=0., activation='mish').double()
    net.load_state_dict(convert_norm_torch(weights, classifier=True, activation='mish'))
    x = golden.image((2, 3, 64, 64))[:, :, :32, :32].double()
    with torch.no_grad():
        logits = net.eval()(x)
    assert golden.fingerprint(logits) == pytest.approx(golden.LOGITS_MISH, rel=1e-9)


# Depth 50 opens stage 4 by a 1x1 convolution, which needs no padding; the others pad it otherwise
# in the authors' classification models than a dense network can.
@pytest.mark.parametrize('depth, stages', [(18, 3), (34, 3), (50, 4)])
def test_the_dense_backbone_gives_the_classifiers_features(depth, stages):
    net = authors(depth)
    dense = KNResNet(depth, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), dropout_p=0.).double()
    weights = convert_norm_torch(golden.norm_torch_weights(depth))
    assert dense.load_state_dict(weights) and not any('tail' in key for key in weights)
    seen, x = {}, golden.image((1, 3, 128, 160)).double()
    for name, module in (('coarse', net.backbone), ('fine', dense.eval())):
        for i in range(stages):
            module.get_submodule(f'layer{i + 1}').register_forward_hook(
                lambda m, args, out, key=(name, i): seen.update({key: out}))
    with torch.no_grad():
        net(x)
        dense(x)
    for i, step in enumerate((1, 1, 2, 4)[:stages]):
        torch.testing.assert_close(seen['fine', i][..., ::step, ::step], seen['coarse', i],
                                   atol=1e-11, rtol=1e-11)


def test_dropout_of_the_last_layer():
    assert KNResNetCls(18).norm.dropout_p == 0.25
    assert KNResNetCls(18, dropout_p=0.02).norm.dropout_p == pytest.approx(0.1)
    assert KNResNetCls(18, dropout_p=0.2).norm.dropout_p == 0.25
    assert KNResNetCls(18, dropout_p=0.2).tail.dropout_p == 0.2


def test_low_resolution():
    net = KNResNetCls(18, low_resolution=True)
    assert (net.stem.kernel_size, net.stem.stride, net.stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert net.layer4[0].conv.padding == net.layer2[0].conv.padding == (1, 0, 1, 0)
    assert net.tail.padding == (1, 1)
    sizes = []
    for i in range(4):
        net.get_submodule(f'layer{i + 1}').register_forward_hook(
            lambda m, args, out: sizes.append(tuple(out.shape[1:])))
    assert net(torch.rand(1, 3, 32, 32))[0].shape == (1, 512, 3, 3)
    assert sizes == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (724, 4, 4)]


@pytest.mark.parametrize('low_resolution', [False, True])
@pytest.mark.parametrize('depth', [18, 34, 50, 101])
def test_the_smallest_image(depth, low_resolution):
    net = KNResNetClassifier(depth, num_classes=3, low_resolution=low_resolution).eval()
    size = {False: (93, 29), True: (16, 8)}[low_resolution][depth >= 50]
    with torch.no_grad():
        assert net(torch.rand(1, 3, size, size + 5)).shape == (1, 3)
        with pytest.raises(ValueError, match=f'at least {size} pixels a side, got '):
            net(torch.rand(1, 3, size - 1, size))


def test_arguments_reach_the_backbone():
    net = KNResNetClassifier(18, num_classes=7, dropout_p=0.1, in_channels=1)
    assert net.backbone.stem.in_channels == 1 and net.backbone.stem.dropout_p == 0.1
    assert net.head['fc'].weight.shape == (7, 512) and not net.head['fc'].bias.any()
    assert any((b.conv2.weight != 0).any() for b in net.modules() if isinstance(b, Block))
    with pytest.raises(ValueError, match='depth must be one of'):
        KNResNetClassifier(20)
    with pytest.raises(ValueError, match='frozen_stages must be'):
        KNResNetCls(18, frozen_stages=5)


def test_mmengine_builds_the_backbone():
    net = MODELS.build(dict(type='KNResNetCls', depth=18, low_resolution=True,
                            zero_init_residual=True))
    assert isinstance(net, KNResNetCls)
    assert not any(b.conv2.weight.any() for b in net.modules() if isinstance(b, Block))


def test_frozen_stages_do_not_change_in_training():
    torch.manual_seed(0)
    net = KNResNetCls(18, low_resolution=True, frozen_stages=2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1,
                                weight_decay=0.1)
    net.train()(torch.rand(2, 3, 32, 32))[0].sum().backward()
    optimizer.step()
    for key, value in net.state_dict().items():
        frozen = key.startswith(('stem', 'layer1', 'layer2'))
        assert torch.equal(value, before[key]) == frozen, key


def test_batch_independence():
    torch.manual_seed(0)
    net = KNResNetClassifier(18, num_classes=5, low_resolution=True, dropout_p=0.).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(x[:1]), net(x[1:])]), atol=1e-12,
                                   rtol=0)


def test_its_checkpoint_starts_a_segmentors_backbone(tmp_path):
    source = KNResNetClassifier(18, num_classes=5)
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=source.state_dict()), path)
    net = KNResNet(18, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'))
    net.init_weights()
    for key, value in net.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[key])
