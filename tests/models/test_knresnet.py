import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS

from mmseg_kn import KNConv2d, KNResNet
from mmseg_kn.models.knresnet import Block

CHANNELS = {
    18: (64, 256, 512, 724),
    34: (64, 256, 512, 512),
    50: (256, 512, 810, 2048),
    101: (256, 512, 810, 2048),
}
D8 = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
D16 = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))


@pytest.mark.parametrize('depth', CHANNELS)
@pytest.mark.parametrize('options, sizes', [
    (dict(), [(12, 17), (6, 9), (3, 5), (2, 3)]),
    (D16, [(12, 17), (6, 9), (3, 5), (3, 5)]),
    (D8, [(12, 17), (6, 9), (6, 9), (6, 9)]),
])
def test_output_shapes_at_odd_sizes(depth, options, sizes):
    net = KNResNet(depth, in_channels=4, **options).eval()
    with torch.no_grad():
        outs = net(torch.rand(1, 4, 47, 65))
    assert [tuple(y.shape) for y in outs] == [
        (1, c, *size) for c, size in zip(CHANNELS[depth], sizes, strict=True)]
    assert net.feat_dim == CHANNELS[depth][-1]
    assert all((y >= 0).all() for y in outs)


@pytest.mark.parametrize('size', [(64, 96), (51, 37)])
@pytest.mark.parametrize('options, steps', [(D8, (1, 1, 2, 4)), (D16, (1, 1, 1, 2))])
@pytest.mark.parametrize('depth', [18, 50])
def test_dilated_equals_strided(depth, options, steps, size):
    torch.manual_seed(0)
    strided = KNResNet(depth, zero_init_residual=False).double().eval()
    dilated = KNResNet(depth, **options).double().eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for coarse, fine, step in zip(strided(x), dilated(x), steps, strict=True):
            torch.testing.assert_close(fine[..., ::step, ::step], coarse, atol=1e-12, rtol=0)


def test_batch_independence():
    torch.manual_seed(0)
    net = KNResNet(18, zero_init_residual=False, dropout_p=0., **D8).double()
    x = torch.rand(2, 3, 33, 40, dtype=torch.float64)

    def step(x):
        net.zero_grad()
        outs = net(x)
        sum(y.mean() for y in outs).backward()
        return [y.detach() for y in outs], [p.grad.clone() for p in net.parameters()]

    outs, grads = step(x)
    (first, grads_first), (second, grads_second) = step(x[:1]), step(x[1:])
    for y, a, b in zip(outs, first, second, strict=True):
        torch.testing.assert_close(y, torch.cat([a, b]), atol=1e-12, rtol=0)
    for g, a, b in zip(grads, grads_first, grads_second, strict=True):
        torch.testing.assert_close(g, (a + b) / 2, atol=1e-12, rtol=1e-9)


def test_trains_with_one_image_on_one_pixel():
    net = KNResNet(18)
    for y in net(torch.rand(1, 3, 1, 1)):
        assert y.shape[2:] == (1, 1) and y.isfinite().all()


def test_evaluation_is_deterministic():
    net = KNResNet(18, zero_init_residual=False)
    x = torch.rand(1, 3, 32, 32)
    assert not torch.equal(net(x)[-1], net(x)[-1])
    net.eval()
    assert torch.equal(net(x)[-1], net(x)[-1])


def test_zero_init_residual():
    for depth, last in ((18, 'conv2'), (50, 'conv3')):
        blocks = [m for m in KNResNet(depth).modules() if isinstance(m, Block)]
        assert all((b.get_submodule(last).weight == 0).all() for b in blocks)
        x = torch.randn(1, blocks[0].conv1.in_channels, 6, 6)
        assert torch.equal(blocks[0](x), x)
        assert all((b.conv1.weight != 0).any() for b in blocks)
    blocks = [m for m in KNResNet(18, zero_init_residual=False).modules() if isinstance(m, Block)]
    assert all((b.conv2.weight != 0).any() for b in blocks)


def test_multi_grid():
    net = KNResNet(34, multi_grid=(2, 4), **D16)
    blocks = [m for m in net.layer4 if isinstance(m, Block)]
    assert [b.conv1.dilation for b in blocks] == [(2, 2), (4, 4)]
    assert net.eval()(torch.rand(1, 3, 64, 64))[-1].shape == (1, 512, 4, 4)


def test_out_indices():
    net = KNResNet(18, out_indices=(1, 3)).eval()
    x = torch.rand(1, 3, 64, 64)
    full = KNResNet(18).eval()
    full.load_state_dict(net.state_dict())
    with torch.no_grad():
        outs, every = net(x), full(x)
    assert torch.equal(outs[0], every[1]) and torch.equal(outs[1], every[3])


def test_stages_beyond_the_last_output_are_not_built():
    net = KNResNet(18, out_indices=(0, 1), frozen_stages=4)
    assert not hasattr(net, 'layer3') and net.feat_dim == 256
    net = KNResNet(18, out_indices=(0, 1), zero_init_residual=False)
    sum(y.sum() for y in net(torch.rand(1, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_flops_are_counted():
    net = KNResNet(18, out_indices=(0, )).eval()
    flops = get_model_complexity_info(net, (3, 64, 64), show_table=False, show_arch=False)['flops']
    stem = 64 * 3 * 7 * 7 * 32 * 32
    blocks = 2 * 2 * 64 * 256 * 2 * 2 * 16.5 * 16.5
    assert stem + 0.9 * blocks < flops < 1.2 * (stem + blocks)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    net = KNResNet(18, frozen_stages=frozen_stages).train()
    for i, name in enumerate(['stem', 'layer1', 'layer2', 'layer3', 'layer4']):
        module = net.get_submodule(name)
        assert module.training == (i > frozen_stages)
        assert all(p.requires_grad == (i > frozen_stages) for p in module.parameters())


def test_with_cp_gives_the_same_gradients():
    def gradients(with_cp):
        torch.manual_seed(0)
        net = KNResNet(18, with_cp=with_cp, zero_init_residual=False)
        torch.manual_seed(1)
        net(torch.rand(1, 3, 32, 32))[-1].sum().backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


def save(tmp_path, state_dict):
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=state_dict), path)
    return dict(type='Pretrained', checkpoint=str(path))


def test_pretrained(tmp_path):
    source = KNResNet(18, zero_init_residual=False)
    net = MODELS.build(dict(type='KNResNet', depth=18,
                            init_cfg=save(tmp_path, source.state_dict())))
    net.init_weights()
    for a, b in zip(source.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)
    whole = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    init_cfg = dict(save(tmp_path, whole), prefix='backbone.')
    net = KNResNet(18, init_cfg=init_cfg, **D8)
    net.init_weights()
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.parametrize('depth', [18, 50])
def test_a_batch_norm_checkpoint_is_refused(depth, tmp_path):
    net = KNResNet(depth, init_cfg=save(tmp_path, ResNet(depth).state_dict()))
    with pytest.raises(ValueError, match=rf'KNResNet-{depth}: it has running statistics.*'
                       'or none, to train from scratch'):
        net.init_weights()


def test_a_batch_norm_checkpoint_is_refused_in_a_whole_model():
    model = torch.nn.Module()
    model.backbone = KNResNet(18)
    weights = {f'backbone.{k}': v for k, v in ResNet(18).state_dict().items()}
    with pytest.raises(ValueError, match=r'running statistics \(backbone.bn1.running_mean\)'):
        load_state_dict(model, weights, strict=False)
    load_state_dict(model, {'decode_head.conv_seg.weight': torch.zeros(1)}, strict=False)


@pytest.mark.parametrize('depth, source', [
    (50, lambda: ResNet(50, norm_cfg=dict(type='GN', num_groups=32))),
    (18, lambda: KNResNet(34)),
])
def test_a_checkpoint_of_which_a_part_fits_is_refused(depth, source, tmp_path):
    net = KNResNet(depth, init_cfg=save(tmp_path, source().state_dict()))
    with pytest.raises(ValueError, match='weights are missing or of another shape, e.g. '):
        net.init_weights()
    net = KNResNet(18, init_cfg=save(tmp_path, dict(weight=torch.zeros(1))))
    with pytest.raises(ValueError, match='none of its 1 keys matches, e.g. weight; use a check'):
        net.init_weights()


def test_a_stem_for_other_channels_may_start_anew(tmp_path):
    source = KNResNet(18, zero_init_residual=False)
    net = KNResNet(18, in_channels=5, init_cfg=save(tmp_path, source.state_dict()))
    net.init_weights()
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_a_checkpoint_of_other_keys_is_refused(tmp_path):
    source = {f'backbone.{k}': v for k, v in KNResNet(18).state_dict().items()}
    net = KNResNet(18, init_cfg=save(tmp_path, source))
    with pytest.raises(ValueError, match="holds a whole model .*prefix='backbone.'"):
        net.init_weights()


def test_mmseg_builds_it_with_our_layers():
    net = MODELS.build(dict(type='KNResNet', depth=18, dropout_p=0.1))
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(isinstance(m, KNConv2d) and m.dropout_p == 0.1 for m in convs)


@pytest.mark.parametrize('options, message', [
    (dict(depth=20), r'depth must be one of \(18, 34, 50, 101\), got 20'),
    (dict(depth=18, strides=(1, 2, 2)), 'strides must be 4 positive ints'),
    (dict(depth=18, strides=(2, 2, 2, 2)), 'strides must be 1 or 2, and 1 in the first'),
    (dict(depth=18, dilations=(1, 1, 2)), 'dilations must be 4 positive ints'),
    (dict(depth=18, dilations=(1, 1, 2, 0)), 'dilations must be 4 positive ints'),
    (dict(depth=18, out_indices=(0, 4)), r'out_indices must be .* got \(0, 4\)'),
    (dict(depth=18, out_indices=()), 'out_indices must be'),
    (dict(depth=18, frozen_stages=5), 'frozen_stages must be in -1..4, got 5'),
    (dict(depth=18, multi_grid=(1, 2, 4)), 'each of the 1 blocks'),
    (dict(depth=18, dropout_p=1.), 'dropout_p must be'),
])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        KNResNet(**options)


@pytest.mark.parametrize('depth', (18, 50))
def test_the_stem_starts_at_the_scale_of_what_follows(depth):
    torch.manual_seed(0)
    net = KNResNet(depth, out_indices=(0, ))
    # windows divide by it: sqrt(2) at fan in, 0.3 and 0.15 at fan out
    assert 1 < net.stem(torch.rand(1, 3, 64, 64)).std() < 2
