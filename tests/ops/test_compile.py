"""What compilers and exporters make of the ops: torch.compile, torch.export, triton.

ONNX and whole segmentors: test_deployment.py.
"""
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmseg_kn import KernelNorm2d, KNConv2d, KNResNet
from mmseg_kn.ops import fused, norm_operators, operators, unfolded

DYNAMIC = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def backbone(depth=18):
    torch.manual_seed(0)
    return KNResNet(depth, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), zero_init_residual=False)


def outputs_and_gradients(call, net, x):
    torch.manual_seed(3)  # of the dropout
    net.zero_grad()
    outs = call(x)
    sum(y.square().mean() for y in outs).backward()
    return [y.detach() for y in outs] + [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize('depth', [18, 50])
def test_torch_compile_trains_the_same_without_graph_break(depth):
    net, x = backbone(depth), torch.rand(2, 3, 32, 48)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    for a, b in zip(outputs_and_gradients(compiled, net, x), outputs_and_gradients(net, net, x),
                    strict=True):
        # In eager mode KernelNorm2d's gradient is in closed form.
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize('impl, largest', [('fused', 0), ('fused', 2**40), ('triton', 0)])
def test_torch_compile_of_each_implementation(impl, largest, monkeypatch):
    monkeypatch.setattr(unfolded, 'LARGEST', largest)
    if impl == 'triton':
        pytest.importorskip('triton')
    layers = torch.nn.Sequential(
        KNConv2d(3, 8, 3, padding=(1, 0, 1, 0), activation='relu', impl=impl),
        KNConv2d(8, 5, 1, impl=impl), KernelNorm2d(5, activation='relu', impl=impl))
    x = torch.rand(1, 3, 9, 8)
    if impl == 'triton' and torch.cuda.is_available():
        layers, x = layers.cuda(), x.cuda()
    compiled = torch.compile(layers, backend='aot_eager', fullgraph=True)
    for a, b in zip(outputs_and_gradients(lambda x: [compiled(x)], layers, x),
                    outputs_and_gradients(lambda x: [layers(x)], layers, x), strict=True):
        assert torch.equal(a, b)


def test_torch_compile_evaluates_the_same_at_every_size():
    net = KNResNet(18, out_indices=(0, 1)).eval()
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        for size in ((32, 48), (40, 75)):
            x = torch.rand(1, 3, *size)
            for a, b in zip(compiled(x), net(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fake_tensors_launch_no_kernel(monkeypatch):
    """Of which a kernel would read memory that is not there, with gradients or without."""
    triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')

    def launch(*_, **__):
        raise AssertionError('a kernel was launched')

    monkeypatch.setattr(triton_passes, '_launch', launch)
    conv = KNConv2d(3, 8, 3, padding=(1, 0, 1, 0), activation='relu', impl='triton')
    norm = KernelNorm2d(8, impl='triton')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with FakeTensorMode(allow_non_fake_inputs=True):
        conv, norm = conv.to(device), norm.to(device)
        x = torch.rand(2, 3, 9, 8, device=device)
        for grad in (False, True):
            for training in (False, True):
                conv.train(training), norm.train(training)
                with torch.set_grad_enabled(grad):
                    y = norm(conv(x))
                assert isinstance(y, FakeTensor) and y.shape == (2, 8, 8, 7)
                assert y.requires_grad == grad
        y.sum().backward()


@pytest.mark.parametrize('largest', [0, 2**40], ids=['closed form', 'units'])
def test_opcheck(largest, monkeypatch):
    """torch's own checks of a custom operator: schema, fake tensors, autograd registration."""
    monkeypatch.setattr(unfolded, 'LARGEST', largest)
    x, weight, bias, residual = (torch.randn(shape, requires_grad=True) for shape in (
        (2, 4, 6, 5), (3, 4, 2, 2), (3, ), (2, 3, 5, 4)))
    dropped = fused.draw_mask(x.detach(), 0.1)
    dense, strided = ([1, 1], [0, 0], [1, 1], 1), ([2, 1], [1, 1], [1, 2], 1)
    # dropout_p, training, rectify, eps, relu, keep_output, impl
    for args in ((x, weight, bias, residual, dropped, *dense, 0.1, True, False, 1e-5, False, True,
                  'fused'),
                 (x, weight, None, None, None, *strided, 0.0, False, True, 1e-5, True, True,
                  'fused'),
                 (x, weight, bias, None, dropped, *dense, 0.005, True, False, 1e-5, False, False,
                  'fused'),  # at so small a p the undropped mean is an output
                 (x.bfloat16(), weight, bias, None, dropped, *dense, 0.1, True, False, 1e-5, False,
                  False, 'fused')):
        torch.library.opcheck(operators.kn_conv2d_op, args,
                              test_utils=('test_schema', 'test_autograd_registration',
                                          'test_faketensor'))
    torch.library.opcheck(norm_operators.unit_moments_op,
                          (x, dropped, [2, 1], [1, 1], 0.1, True, 1e-5, 'fused'),
                          test_utils=('test_schema', 'test_autograd_registration',
                                      'test_faketensor'))


def test_export_of_the_backbone_with_dynamic_size():
    net = backbone().eval()
    program = torch.export.export(net, (torch.rand(1, 3, 64, 96), ), dynamic_shapes=(DYNAMIC, ))
    assert not any('mmseg_kn' in str(node.target) for node in program.graph.nodes)
    for size in ((64, 96), (131, 75)):
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            for a, b in zip(program.module()(x), net(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_import_loads_no_triton_and_starts_no_gpu():
    code = ('import sys, torch, mmseg_kn; mmseg_kn.KNConv2d(3, 4, 1)(torch.rand(1, 3, 2, 2));'
            'assert "mmseg_kn.ops.triton_passes" not in sys.modules;'
            'assert not torch.cuda.is_initialized()')
    subprocess.run([sys.executable, '-c', code], check=True)
