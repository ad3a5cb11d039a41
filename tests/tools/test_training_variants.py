"""The variations of the recipe that benchmarks try."""
from types import SimpleNamespace

import pytest
import torch
from program import ROOT, load_tool
from tiny_training import SIZE, build
from torch import nn

from mmseg_kn import KernelNorm2d, KNConv2d


@pytest.fixture(scope='module')
def tool():
    return load_tool(ROOT / 'tools/benchmarks/training_variants.py')


def test_adaptive_clipping_is_relative_to_each_unit(tool):
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3., 4.], [0., 0.]]))
    wrapper = tool.AdaptiveClipOptimWrapper(torch.optim.SGD(layer.parameters(), lr=1),
                                            clipping=0.1, eps=0.5)
    layer.weight.grad = torch.tensor([[0., 10.], [0.03, 0.04]])
    layer.bias.grad = torch.tensor([7., 7.])
    before = layer.bias.detach().clone()
    wrapper.step()
    # 0.1 * 5 / 10 of the first row; the second, 0.05 <= 0.1 * 0.5, stays as it is.
    torch.testing.assert_close(layer.weight.detach(),
                               torch.tensor([[3., 3.5], [-0.03, -0.04]]))
    torch.testing.assert_close(layer.bias.detach(), before - 7)


def test_dropout_and_clipping_follow_the_iterations(tool):
    net = nn.Sequential(KNConv2d(3, 4, 1, dropout_p=0.2), KNConv2d(4, 4, 1, dropout_p=0.1))
    runner = SimpleNamespace(model=net, iter=0, max_iters=100, optim_wrapper=SimpleNamespace(
        clip_grad_kwargs=dict(max_norm=1.)))
    hooks = tool.AnnealDropoutHook(), tool.ClipRiseHook(max_norm=5, begin=20, end=60)
    for hook in hooks:
        hook.before_train(runner)
    found = []
    for runner.iter in (0, 20, 50, 60, 100):
        for hook in hooks:
            hook.before_train_iter(runner, runner.iter)
        found.append((net[0].dropout_p, net[1].dropout_p,
                      runner.optim_wrapper.clip_grad_kwargs['max_norm']))
    assert found == [pytest.approx(values) for values in (
        (.2, .1, 1), (.16, .08, 1), (.1, .05, 4), (.08, .04, 5), (0, 0, 5))]


def test_initial_weights_are_scaled(tool):
    net = nn.Sequential(KNConv2d(3, 4, 2), nn.Conv2d(4, 2, 1))
    before = [p.detach().clone() for p in net.parameters()]
    tool.ScaleInitHook(factor=0.25).before_run(SimpleNamespace(model=net))
    before[0] *= 0.25  # the weight of the KNConv, and nothing else
    for p, expected in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), expected)


def test_weights_turn_faster_later(tool):
    net = nn.ModuleDict(dict(stem=KNConv2d(3, 4, 2), last=nn.Conv2d(4, 2, 1)))

    def runner(groups):
        return SimpleNamespace(model=net, iter=0, optim_wrapper=SimpleNamespace(
            param_groups=groups))

    groups = [dict(params=[p], lr=.03) for p in net.parameters()]
    hook, late = tool.LateTurnHook(factor=3, begin=4, end=8), runner(groups)
    hook.before_train(late)
    rates = []
    for late.iter in range(12):
        hook.before_train_iter(late, late.iter)
        rates.append(groups[0]['lr'])
    assert rates[3] == .03 and .03 < rates[4] < rates[6]
    assert rates[7:] == [pytest.approx(.09)] * 5
    assert all(group['lr'] == .03 for group in groups[1:])
    with pytest.raises(ValueError, match='custom_keys'):
        hook.before_train(runner([dict(params=list(net.parameters()), lr=.03)]))


def test_eps_of_all_but_the_stem(tool):
    net = nn.ModuleDict(dict(stem=KNConv2d(3, 4, 2), conv=KNConv2d(4, 2, 1),
                             norm=KernelNorm2d(2), bn=nn.BatchNorm2d(2)))
    tool.EpsHook(eps=0.1).before_run(SimpleNamespace(model=net))
    assert [m.eps for m in net.values()] == [1e-5, 0.1, 0.1, 1e-5]


@pytest.mark.parametrize('parametrization', ['gain', 'weight_norm'])
def test_parametrized_networks_start_as_they_are(tool, parametrization):
    """And their weights, which are computed, learn; also those that start at zero."""
    torch.manual_seed(0)
    usual = build()
    usual.init_weights()
    settings = dict(data_preprocessor=dict(type='SegDataPreProcessor', size=SIZE),
                    backbone=dict(type='KNResNet', depth=18, dropout_p=0.0),
                    decode_head=dict(type='FCNHead', in_channels=724, in_index=3, channels=8,
                                     num_convs=1, num_classes=3, norm_cfg=None, act_cfg=None,
                                     conv_cfg=dict(type='KNConv', activation='relu')))
    net = tool.ParametrizedEncoderDecoder(parametrization=parametrization, **settings)
    net.init_weights()  # as the Runner does; it must not undo what was computed
    convs = [m for m in net.modules() if isinstance(m, KNConv2d)]
    assert len(convs) == sum(isinstance(m, KNConv2d) for m in usual.modules())
    zero = [m for m in convs if not m.weight.any()]
    assert len(zero) == 6  # the last of each block
    net.eval()(torch.rand(1, 3, *SIZE), mode='tensor').square().mean().backward()
    lengths = [m.parametrizations.weight[0].gain if parametrization == 'gain' else
               m.parametrizations.weight.original0 for m in convs]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lengths)
    if parametrization == 'weight_norm':  # a weight of length zero grows by its length
        assert all(m.parametrizations.weight.original0.grad.any() for m in zero)


def test_statistics_that_stay(tool):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    tool.FrozenBatchNormHook().before_train_iter(SimpleNamespace(model=net), 0)
    net(torch.randn(1, 3, 1, 1) + 5).sum().backward()  # one value of each channel
    assert torch.equal(net[1].running_mean, torch.zeros(4))
    assert net[1].weight.grad.abs().sum() > 0 and net[0].training
