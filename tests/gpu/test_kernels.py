"""Kernels, where only a GPU can show it."""
import pytest
import torch
from op_cases import PASSES, TOLERANCE, make_case, relative_error, run

from mmseg_kn.ops import chosen_impl, kn_conv2d

pytestmark = pytest.mark.usefixtures('full_float32')


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(
        not torch.cuda.is_available(), reason='needs a GPU')(test))


def gpu_case(device='cuda', dtype=torch.float32, size=(11, 9)):
    (x, weight, bias), _ = make_case(channels=64, dtype=dtype, size=size)
    return [t.detach().to(device) for t in (x, weight, bias)]


@on_gpu
def test_another_stream():
    leaves = gpu_case(size=(200, 200))
    expected = run(leaves, 'triton', padding=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # the default stream would run ahead of what follows
        late = [t * 1 for t in leaves]
        actual = run(late, 'triton', padding=1)
    torch.cuda.current_stream().wait_stream(stream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_a_device_that_is_not_the_current_one():
    expected = run(gpu_case(), 'triton', padding=1)
    leaves = gpu_case('cuda:1')
    assert torch.cuda.current_device() == 0 and chosen_impl(leaves[0]) == 'triton'
    for a, e in zip(run(leaves, 'triton', padding=1), expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), e.cpu())
    with pytest.raises(ValueError, match='bias must be on one device, got cuda:1 and cuda:0'):
        kn_conv2d(*leaves[:2], leaves[2].to('cuda:0'))


@on_gpu
@pytest.mark.parametrize('impl', PASSES)
def test_cuda_graph_of_an_evaluation(impl):
    x, weight, bias = gpu_case()

    def forward(x):
        with torch.no_grad():
            return kn_conv2d(x, weight, bias, padding=1, dropout_p=0.05, activation='relu',
                             impl=impl)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(x)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x)
    for scale in (1, 3):
        x.copy_(torch.randn_like(x) * scale + scale)
        graph.replay()
        torch.testing.assert_close(y, forward(x))


@on_gpu
@pytest.mark.parametrize('channels_last', [False, True])
def test_more_elements_than_int32_counts(channels_last):
    n, c, size = 3, 64, 3400  # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip('needs 24 GiB')
    x = torch.zeros(n, c, size, size, dtype=torch.bfloat16, device='cuda', memory_format=(
        torch.channels_last if channels_last else torch.contiguous_format))
    corner = torch.randn(c, 8, 8, device='cuda')
    x[-1, :, -8:, -8:] = corner
    weight = torch.randn(2, c, 1, 1, device='cuda', dtype=torch.bfloat16)
    with torch.no_grad():
        for training in (False, True):
            y = kn_conv2d(x, weight, dropout_p=0.0, training=training, impl='triton')
            expected = kn_conv2d(x[-1:, :, -8:, -8:].double(), weight.double(), impl='reference')
            assert relative_error(y[-1:, :, -8:, -8:], expected) < TOLERANCE[torch.bfloat16]
            assert not y[0, :, :8].any()  # units of zeros, and no bias
