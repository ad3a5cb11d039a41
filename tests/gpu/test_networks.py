"""Whole networks on a GPU against the CPU, against higher precision, and in graphs."""
import copy

import pytest
import torch
from tiny_training import SIZE, build, samples, train

from mmseg_kn import KNResNet
from mmseg_kn.engine.cuda_graph_hook import use_cuda_graphs
from mmseg_kn.ops import kn_conv2d

pytestmark = pytest.mark.gpu


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.cpu().double()).norm()
            / expected.cpu().double().norm()).item()


def outputs_and_gradients(net, x):
    net.zero_grad()
    outs = net(x)
    sum(y.float().square().mean() for y in outs).backward()
    return [y.detach() for y in outs] + [p.grad for p in net.parameters()]


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('channels_last', [False, True])
def test_knresnet_is_as_accurate_as_on_the_cpu(device, depth, channels_last):
    """Both against float64: windows that are nearly constant magnify float32's rounding."""
    torch.manual_seed(0)
    net = KNResNet(depth, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), dropout_p=0.0,
                   zero_init_residual=False).train()
    x = torch.rand(2, 3, 65, 97)

    def results(dtype, device):
        there = x.to(device, dtype)
        if channels_last:
            there = there.contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
            return outputs_and_gradients(copy.deepcopy(net).to(device, dtype), there)

    exact = results(torch.float64, 'cpu')
    here, there = (
        [relative_error(a, e) for a, e in zip(results(torch.float32, where), exact, strict=True)]
        for where in ('cpu', device))
    assert max(there) <= 3 * max(here)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_as_float32_does(device, dtype):
    data = [dict(inputs=sample['inputs'].to(device),
                 data_samples=sample['data_samples'].to(device)) for sample in samples()]
    batch = {key: [d[key] for d in data] for key in ('inputs', 'data_samples')}

    def losses(enabled):
        net = build().to(device).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=2**8,
                                      enabled=enabled and dtype == torch.float16)
        found = []
        for _ in range(6):
            inputs = net.data_preprocessor(batch, training=True)
            with torch.autocast(device.type, dtype, enabled=enabled):
                loss, _ = net.parse_losses(net.loss(inputs['inputs'], inputs['data_samples']))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1)
            scaler.step(optimizer)
            scaler.update()
            found.append([loss.item(), norm.item()])
        return torch.tensor(found)

    half, single = losses(True), losses(False)
    # Later steps drift apart, as those of any two roundings do.
    torch.testing.assert_close(half[0], single[0], rtol=0.05, atol=0)
    assert half.isfinite().all() and half[-1, 0] < half[0, 0] and single[-1, 0] < single[0, 0]


def test_the_default_of_convolutions_does_not_spoil_flat_bright_input(device):
    """cuDNN rounds float32 to 10 bits unless told otherwise; statistics would magnify that."""
    torch.manual_seed(0)
    x = 1 + 0.003 * torch.randn(2, 64, 33, 47)
    weight = torch.randn(32, 64, 3, 3)
    expected = kn_conv2d(x.double(), weight.double(), padding=1, impl='reference')
    errors = []
    for allow in (False, True):
        with torch.backends.cudnn.flags(allow_tf32=allow):
            y = kn_conv2d(x.to(device), weight.to(device), padding=1)
        errors.append(relative_error(y[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]))
    assert errors[1] <= 2 * errors[0]


def graphs(device):
    # On a CPU there are no graphs: what is traced for them runs as it is.
    return {} if device.type == 'cuda' else dict(backend='aot_eager', fullgraph=True)


def test_a_training_in_graphs_is_the_same(device, tmp_path):
    usual = build().to(device)
    other = copy.deepcopy(usual)
    train(usual, tmp_path / 'usual', max_iters=6)
    train(other, tmp_path / 'graphs', max_iters=6,
          graphs=dict(type='CudaGraphHook', **graphs(device)))
    for (name, one), two in zip(usual.named_parameters(), other.parameters(), strict=True):
        assert relative_error(two.detach(), one.detach()) < 1e-3, name


def test_every_replay_draws_other_dropout(device):
    net = build(dropout_p=0.2).to(device).train()
    use_cuda_graphs(net, **graphs(device))
    x, outputs = torch.rand(2, 3, *SIZE, device=device), []
    for _ in range(6):  # the first ones record
        torch.compiler.cudagraph_mark_step_begin()
        output = net.backbone(x)[-1]
        output.sum().backward()
        outputs.append(output.detach().clone())
    for i, one in enumerate(outputs):
        for two in outputs[:i]:
            assert not torch.equal(one, two)
