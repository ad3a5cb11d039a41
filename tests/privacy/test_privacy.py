"""Per-sample gradients, clipping, noise, sampling and accounting of private training."""
import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

opacus = pytest.importorskip('opacus')

from mmengine.optim import build_optim_wrapper  # noqa: E402
from opacus.accountants import create_accountant  # noqa: E402
from private import Net, loss_of, make_input, wrapper_for  # noqa: E402

from mmseg_kn import KNConv2d, KNResNet  # noqa: E402
from mmseg_kn.baselines import NoNorm  # noqa: E402
from mmseg_kn.privacy import GradSampler, PoissonBatchSampler  # noqa: E402
from mmseg_kn.privacy.optim_wrapper import spent_epsilon  # noqa: E402
from mmseg_kn.privacy.sampler import private_collate, split_batch  # noqa: E402

OPTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=1),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    dict(kernel_size=2, padding=(2, 1, 0, 3), dilation=2),
    dict(kernel_size=3, padding='same', dilation=2),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=2, padding=(1, 0, 1, 0), groups=4, stride=2),
    dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=3, padding=1, activation='relu'),
    dict(kernel_size=2, padding=1, groups=2, activation='relu', bias=False),
]


def expected_grad_samples(layer, x, weight_of_loss, masked):
    """Autograd of each sample alone, with the statistics of ``masked``, x after dropout."""
    from mmseg_kn.ops.geometry import make_geometry, pad
    geometry = make_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    def units(t):
        return F.unfold(pad(t, geometry), geometry.kernel, geometry.dilation, 0, geometry.stride)

    grads = []
    for i in range(len(x)):
        var, mean = torch.var_mean(units(masked[i:i + 1]), 1, correction=0, keepdim=True)
        u = (units(x[i:i + 1]) - mean) / (var + layer.eps).sqrt()
        u = u.reshape(layer.groups, -1, u.size(2))
        w = layer.weight.view(layer.groups, -1, u.size(1))
        y = (w @ u).reshape(1, layer.out_channels, *geometry.output_size(*x.shape[2:]))
        if layer.bias is not None:
            y = y + layer.bias.view(1, -1, 1, 1)
        y = y.relu() if layer.activation else y
        grads.append(torch.autograd.grad((y * weight_of_loss).sum(), list(layer.parameters())))
    return [torch.stack(g) for g in zip(*grads, strict=True)]


@pytest.mark.parametrize('impl', ['fused', 'reference'])
@pytest.mark.parametrize('dropout_p', [0, 0.3])
@pytest.mark.parametrize('option', OPTIONS, ids=str)
def test_grad_samples_equal_a_loop_over_samples(monkeypatch, option, dropout_p, impl):
    torch.manual_seed(0)
    layer = KNConv2d(4, 8, dropout_p=dropout_p, impl=impl, **option).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = make_input()
    # dropout of the padded input by a mask that is known here
    mask = (torch.rand(x.shape) >= dropout_p).double() / (1 - dropout_p)
    dropped = x * mask
    if dropout_p:
        from mmseg_kn.ops import fused
        from mmseg_kn.ops.geometry import make_geometry, pad
        geometry = make_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)

        def known_dropout(t, p):
            padded_mask = mask if t.shape == mask.shape else pad(mask, geometry)
            return t * padded_mask

        def known_draw(t, p):
            padded_mask = mask if t.shape == mask.shape else pad(mask + 1, geometry) - 1
            return (padded_mask.flatten() == 0).nonzero().squeeze(1)

        monkeypatch.setattr(F, 'dropout', known_dropout)
        monkeypatch.setattr(fused, 'draw_mask', known_draw)
    sampler = GradSampler(layer)
    y = layer(x)
    weight_of_loss = torch.randn(y.shape[1:], dtype=y.dtype)
    (y * weight_of_loss).flatten(1).sum(1).mean().backward()
    expected = expected_grad_samples(layer, x, weight_of_loss, dropped)
    for p, grads in zip(layer.parameters(), expected, strict=True):
        error = (p.grad_sample - grads).norm() / grads.norm()
        assert error < 1e-12
        torch.testing.assert_close(p.grad_sample.mean(0), p.grad, rtol=1e-9, atol=1e-12)
    sampler.detach()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize('option', OPTIONS, ids=str)
def test_grad_samples_in_float32(option):
    torch.manual_seed(0)
    layer = KNConv2d(4, 8, dropout_p=0, **option)
    exact = copy.deepcopy(layer).double()
    results = []
    for module in (layer, exact):
        GradSampler(module)
        y = module(make_input().to(module.weight.dtype))
        y.square().flatten(1).sum(1).mean().backward()
        results.append([p.grad_sample.double() for p in module.parameters()])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize('option', OPTIONS[:2] + OPTIONS[4:5] + OPTIONS[9:], ids=str)
def test_grad_samples_with_the_kernels_of_gpus(option):
    """Their statistics, and their dropout, which is drawn from a seed."""
    kernels = pytest.importorskip('mmseg_kn.ops.triton_passes')
    device = 'cpu' if kernels.INTERPRETED else 'cuda'
    torch.manual_seed(0)
    layer = KNConv2d(4, 8, dropout_p=0.3, impl='triton', **option).to(device)
    GradSampler(layer)
    layer(make_input(torch.float32).to(device)).square().flatten(1).sum(1).mean().backward()
    for p in layer.parameters():  # the gradient has the dropout of the same forward
        assert (p.grad_sample.mean(0) - p.grad).norm() / p.grad.norm() < 1e-5


@pytest.mark.parametrize('norm', [
    nn.GroupNorm(2, 8), NoNorm(8), nn.InstanceNorm2d(8, affine=True)
])
def test_networks_that_work_in_place(norm):
    torch.manual_seed(0)
    net = Net(norm).double()
    x = make_input()
    loss = [torch.autograd.grad(loss_of(net, x[i:i + 1]), list(net.parameters()))
            for i in range(3)]
    GradSampler(net)
    loss_of(net, x).backward()
    for p, *grads in zip(net.parameters(), *loss, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(grads), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
def test_a_sample_that_is_not_finite_spoils_nothing(clipping):
    net, x = Net(), make_input(torch.float32)
    x[1, 0, 0, 0] = math.nan
    before = [p.detach().clone() for p in net.parameters()]
    wrapper_for(net, max_grad_norm=0.1, clipping=clipping).update_params(loss_of(net, x))
    moved = math.sqrt(sum((p.detach() - b).square().sum()
                          for p, b in zip(net.parameters(), before, strict=True)))
    assert 0 < moved <= 0.1 * (1 + 1e-5)


def test_one_image_is_one_sample():
    net = Net()
    wrapper = wrapper_for(net)
    wrapper.num_samples = 1
    with pytest.raises(ValueError, match='1 images gave 3 gradients of stem.weight'):
        wrapper.update_params(loss_of(net, make_input(torch.float32)))


def test_a_residual_by_position():
    layer = KNConv2d(4, 4, 1, dropout_p=0.).double()
    GradSampler(layer)
    x = make_input()
    layer(x, x).square().flatten(1).sum(1).mean().backward()
    torch.testing.assert_close(layer.weight.grad_sample.mean(0), layer.weight.grad)


def test_an_input_overwritten_after_its_use_is_an_error():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.b.weight.requires_grad_(False)  # autograd needs no input of b, and is content

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            x += 1
            return x + y

    net = Overwrites()
    GradSampler(net)
    loss = net(make_input(torch.float32)).square().mean()
    with pytest.raises(ValueError, match='input or output of Conv2d was modified in place'):
        loss.backward()


def test_opacus_alone_says_what_to_do():
    from opacus.grad_sample import GradSampleModule
    net = GradSampleModule(KNConv2d(4, 4, 1))
    with pytest.raises(ValueError, match='mmseg_kn.privacy.GradSampler'):
        net(make_input(torch.float32)).mean().backward()


def grads_one_by_one(net, x):
    return [torch.autograd.grad(loss_of(net, x[i:i + 1]), list(net.parameters()))
            for i in range(len(x))]


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
@pytest.mark.parametrize('bound', [1e-2, 1e3])
def test_the_clipped_sum_is_what_is_stepped_with(clipping, bound):
    torch.manual_seed(0)
    net = Net().double()
    x = make_input()
    samples = grads_one_by_one(net, x)
    norms = [math.sqrt(sum(g.square().sum() for g in grads)) for grads in samples]
    factors = [min(1, bound / norm) for norm in norms]
    assert (max(factors) < 1) == (bound < 1)
    before = [p.detach().clone() for p in net.parameters()]
    wrapper_for(net, max_grad_norm=bound, clipping=clipping).update_params(loss_of(net, x))
    for p, old, *grads in zip(net.parameters(), before, *samples, strict=True):
        expected = sum(f * g for f, g in zip(factors, grads, strict=True)) / 3
        torch.testing.assert_close(old - p, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
def test_clipped_norm(clipping, scale):
    """Never above C, and C where clipping binds."""
    net, bound = Net(), 0.5
    x = make_input(torch.float32, n=1)
    norm = math.sqrt(sum(g.square().sum() for g in torch.autograd.grad(
        scale * loss_of(net, x), list(net.parameters()))))
    before = [p.detach().clone() for p in net.parameters()]
    wrapper_for(net, max_grad_norm=bound, batch_size=1, clipping=clipping).update_params(
        scale * loss_of(net, x))
    moved = math.sqrt(sum((p.detach() - b).square().sum()
                          for p, b in zip(net.parameters(), before, strict=True)))
    assert moved <= bound * (1 + 1e-5)
    assert moved == pytest.approx(min(bound, norm), rel=1e-3)


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
def test_parts_equal_the_whole_batch(clipping):
    torch.manual_seed(0)
    whole = Net().double()
    parts = copy.deepcopy(whole)
    x = make_input(n=5)
    wrapper_for(whole, max_grad_norm=0.02, clipping=clipping).update_params(loss_of(whole, x))
    wrapper = wrapper_for(parts, max_grad_norm=0.02, clipping=clipping)
    for batch in (x[:2], x[2:4], x[4:]):
        wrapper.more_parts = len(batch) == 2
        wrapper.update_params(loss_of(parts, batch))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert wrapper.counter.history == [(0.0, 0.5, 1)]


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
def test_an_empty_batch_is_a_step_of_noise_alone(clipping):
    sigma, bound, batch_size = 1.5, 0.7, 4
    net = Net()
    net.conv = KNConv2d(8, 8, 3, padding=1)
    net.head = nn.Conv2d(8, 4000, 3)
    before = [p.detach().clone() for p in net.parameters()]
    wrapper = wrapper_for(net, noise_multiplier=sigma, max_grad_norm=bound,
                          batch_size=batch_size, clipping=clipping)
    wrapper.step_empty()
    noise = torch.cat([(b - p.detach()).flatten() * batch_size
                       for p, b in zip(net.parameters(), before, strict=True)])
    # standard error of a standard deviation: std / sqrt(2 n)
    assert abs(noise.std() / (sigma * bound) - 1) < 5 / math.sqrt(2 * len(noise))
    assert abs(noise.mean()) < 5 * sigma * bound / math.sqrt(len(noise))
    assert wrapper.counter.history == [(sigma, 0.5, 1)]


def test_the_same_training_seed_gives_other_noise():
    def noise(**kwargs):
        torch.manual_seed(0)
        net = Net()
        wrapper_for(net, noise_multiplier=1., **kwargs).step_empty()
        return net.stem.weight.detach()

    assert not torch.equal(noise(), noise())
    assert torch.equal(noise(noise_seed=1), noise(noise_seed=1))


@pytest.mark.parametrize('accountant', ['prv', 'rdp'])
def test_target_epsilon_is_met_and_not_exceeded(accountant):
    steps, rate = 40, 0.1
    wrapper = wrapper_for(Net(), noise_multiplier=None, target_epsilon=4.0, steps=steps,
                          rate=rate, accountant=accountant)
    assert wrapper.epsilon() == 0
    for _ in range(steps):
        wrapper.step_empty()
    opacus_says = create_accountant(accountant)
    for _ in range(steps):
        opacus_says.step(noise_multiplier=wrapper.noise_multiplier, sample_rate=rate)
    assert wrapper.epsilon() == pytest.approx(opacus_says.get_epsilon(1e-5), rel=1e-9)
    assert 3.9 < wrapper.epsilon() <= 4.0


def test_a_resumed_account_goes_on():
    kwargs = dict(noise_multiplier=None, target_epsilon=4.0, steps=20, accountant='rdp')
    whole, first = wrapper_for(Net(), **kwargs), wrapper_for(Net(), **kwargs)
    for _ in range(20):
        whole.step_empty()
    for _ in range(7):
        first.step_empty()
    state = first.privacy_state()
    second = wrapper_for(Net(), state=state, **kwargs)
    assert second.noise_multiplier == first.noise_multiplier
    for _ in range(13):
        second.step_empty()
    assert second.epsilon() == whole.epsilon()
    assert state['history'] == [(first.noise_multiplier, 0.5, 7)]
    with pytest.raises(ValueError, match='steps.*noise_multiplier='):
        wrapper_for(Net(), state=state, **dict(kwargs, steps=30))
    longer = wrapper_for(Net(), state=state, noise_multiplier=2., steps=30)
    longer.step_empty()
    assert longer.privacy_state()['history'] == [*state['history'], (2., 0.5, 1)]


def test_epsilon_without_noise_is_infinite():
    assert spent_epsilon('prv', [(0.0, 0.1, 3)], 1e-5) == math.inf
    assert spent_epsilon('prv', [], 1e-5) == 0


@pytest.mark.parametrize('kwargs, message', [
    (dict(clip_grad=dict(max_norm=1)), 'remove it.*max_grad_norm'),
    (dict(accumulative_counts=2), 'max_physical_batch_size'),
    (dict(noise_multiplier=None), 'noise_multiplier or target_epsilon'),
    (dict(target_epsilon=8.), 'noise_multiplier or target_epsilon'),
    (dict(max_grad_norm=0), 'max_grad_norm must be positive'),
    (dict(noise_multiplier=-1.), 'noise_multiplier must be positive'),
    (dict(target_delta=1.), r'target_delta must be in \(0, 1\)'),
    (dict(accountant='gdp'), "accountant must be one of .*'prv'"),
    (dict(clipping='per_layer'), "clipping must be one of .*'ghost'"),
    (dict(dtype='float16'), "dtype must be one of .*'bfloat16'"),
])
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        wrapper_for(Net(), **kwargs)


def test_unattached_and_unused():
    net = Net()
    cfg = dict(type='DPOptimWrapper', optimizer=dict(type='SGD', lr=1.), noise_multiplier=1.,
               max_grad_norm=1., target_delta=1e-5)
    with pytest.raises(ValueError, match='DPHook'):
        build_optim_wrapper(net, cfg).update_params(loss_of(net, make_input(torch.float32)))
    net.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='2 parameters take no part in the loss, e.g. spare.w'):
        wrapper_for(net).update_params(loss_of(net, make_input(torch.float32)))


def test_bfloat16_forward_clips_in_float32():
    net, bound = Net(), 0.5
    x = make_input(torch.float32, n=1)
    wrapper = wrapper_for(net, max_grad_norm=bound, batch_size=1, dtype='bfloat16')
    before = [p.detach().clone() for p in net.parameters()]
    with wrapper.optim_context(net):
        loss = 1e4 * loss_of(net, x)
    wrapper.update_params(loss.float())
    moved = math.sqrt(sum((p.detach() - b).square().sum()
                          for p, b in zip(net.parameters(), before, strict=True)))
    assert moved == pytest.approx(bound, rel=1e-5)


def test_generators_have_all_their_states(monkeypatch):
    """torch's own take 32 bits of a seed; these differ where those would agree."""
    from mmseg_kn.privacy import randomness
    monkeypatch.setattr(randomness.secrets, 'randbits', lambda bits: 5)
    a, b = (torch.randn(1000, generator=randomness.secret_generator()) for _ in range(2))
    assert not torch.equal(a, b)
    assert abs(a.mean()) < 0.2 and abs(a.std() - 1) < 0.2
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.2


def test_seeding_secretly():
    import random

    import numpy as np

    from mmseg_kn.privacy.randomness import seed_secretly

    def draws():
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        seed_secretly()
        return torch.rand(()).item(), np.random.rand(), random.random()

    assert not set(draws()) & set(draws())


class Items:
    def __init__(self, n):
        self.dataset = range(n)


def test_sampling_rate_is_as_claimed():
    sampler = PoissonBatchSampler(Items(40), batch_size=10)
    assert sampler.sample_rate == 0.25 and len(sampler) == 4
    counts, sizes, batches = torch.zeros(40), [], 4000
    for batch in itertools.islice(sampler, batches):
        assert len(set(batch)) == len(batch)
        counts[batch] += 1
        sizes.append(len(batch))
    error = math.sqrt(0.25 * 0.75 / batches)
    assert ((counts / batches - 0.25).abs() < 5 * error).all()
    sizes = torch.tensor(sizes, dtype=torch.float)
    assert sizes.mean() == pytest.approx(10, abs=5 * math.sqrt(7.5 / batches))
    assert sizes.var() == pytest.approx(7.5, rel=0.15)  # binomial: 40 * 0.25 * 0.75
    first, second = ([*itertools.islice(sampler, 5)] for _ in range(2))
    assert first != second


def test_processes_draw_from_shards(monkeypatch):
    from mmseg_kn.privacy import sampler as module
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 3))
        sampler = PoissonBatchSampler(Items(31), batch_size=4)
        assert sampler.sample_rate == pytest.approx(12 / 31)
        drawn.append(set(itertools.chain(*itertools.islice(sampler, 300))))
    assert set.union(*drawn) == set(range(31)) and sum(map(len, drawn)) == 31
    with pytest.raises(ValueError, match=r'size of the dataset, 31.*batch_size'):
        PoissonBatchSampler(Items(31), batch_size=11)


def test_empty_batches_and_parts():
    assert private_collate([]) == dict(inputs=[], data_samples=[])
    batch = dict(inputs=list(range(10)), data_samples=list('abcdefghij'))
    parts = split_batch(batch, 4)
    assert [len(p['inputs']) for p in parts] in ([3, 4, 3], [3, 3, 4], [4, 3, 3])
    assert sum((p['data_samples'] for p in parts), []) == batch['data_samples']
    assert split_batch(batch, None) == [batch]
    assert split_batch(private_collate([]), 4) == []


def test_a_whole_network_and_its_keys():
    torch.manual_seed(0)
    net = KNResNet(18, out_indices=(0, 1), dropout_p=0., zero_init_residual=False).double()
    keys = list(net.state_dict())
    x = torch.rand(2, 3, 32, 40, dtype=torch.float64)

    def loss(x):
        return sum(y.square().flatten(1).mean(1).mean() for y in net(x))

    alone = [torch.autograd.grad(loss(x[i:i + 1]), list(net.parameters())) for i in range(2)]
    GradSampler(net)
    loss(x).backward()
    for p, *grads in zip(net.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(grads), rtol=1e-7, atol=1e-12)
    assert list(net.state_dict()) == keys


def test_without_opacus_there_is_one_clear_line():
    code = ("import sys; sys.modules['opacus'] = None\n"
            'import mmseg_kn\n'
            "assert 'mmseg_kn.privacy' not in sys.modules\n"
            'import mmseg_kn.privacy')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        'ImportError: mmseg_kn.privacy needs opacus, which is missing: '
        'pip install "mmseg_kn[privacy]"')


def test_a_plain_import_loads_no_opacus():
    code = "import sys, mmseg_kn; assert not any('opacus' in name for name in sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
