"""What impl='auto' runs, and what it remembers."""
import pytest
import torch
from op_cases import make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from mmseg_kn.ops import chosen_impl, cpu_chunks, dispatch, kernel_norm2d, kn_conv2d

triton_passes = pytest.importorskip('mmseg_kn.ops.triton_passes')


def test_what_auto_runs():
    x = make_case()[0][0]
    assert chosen_impl(x) == 'fused' and chosen_impl(x, 'reference') == 'reference'
    if torch.cuda.is_available():
        assert chosen_impl(x.float().cuda()) == 'triton'
        assert chosen_impl(x.cuda()) == 'fused'  # float64


@pytest.mark.filterwarnings('ignore:triton')
def test_only_a_definite_obstacle_is_remembered(monkeypatch):
    device, answers, zeros = torch.device('cuda', 0), [], torch.zeros
    capturing = [True]

    def moments(*args):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(triton_passes, 'INTERPRETED', False)
    monkeypatch.setattr(triton_passes, 'unit_moments', moments)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device, dtype: zeros(size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing[0])
    dispatch._find_triton_obstacle.cache_clear()
    try:
        assert 'captured' in dispatch._triton_obstacle(device, torch.float32)
        capturing[0] = False
        answers += [torch.OutOfMemoryError('CUDA out of memory'), None]
        assert 'out of memory' in dispatch._triton_obstacle(device, torch.float32)
        assert [dispatch._triton_obstacle(device, torch.float32) for _ in range(2)] == [None, None]
        capturing[0] = True  # known by now
        assert dispatch._triton_obstacle(device, torch.float32) is None
        capturing[0] = False
        answers.append(RuntimeError('Failed to find C compiler'))
        for _ in range(2):
            assert 'C compiler' in dispatch._triton_obstacle(device, torch.float16)
    finally:
        dispatch._find_triton_obstacle.cache_clear()


def test_the_trial_is_real_where_tensors_are_fake(monkeypatch):
    """Else it would fail, and 'fused' be remembered for the tensors that follow."""
    tried, zeros = [], torch.zeros
    monkeypatch.setattr(triton_passes, 'INTERPRETED', False)
    monkeypatch.setattr(triton_passes, 'unit_moments', lambda x, *_: tried.append(type(x)))
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device, dtype: zeros(size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    dispatch._find_triton_obstacle.cache_clear()
    try:
        with FakeTensorMode():
            assert chosen_impl(torch.empty(1, 3, 2, 2, device='cuda')) == 'triton'
    finally:
        dispatch._find_triton_obstacle.cache_clear()
    assert tried == [torch.Tensor]


def test_default_device_does_not_matter():
    def call():
        x = torch.randn(2, 64, 160, 160, device='cpu')  # in chunks
        weight = torch.randn(8, 64, 1, 1, device='cpu', requires_grad=True)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = kn_conv2d(x, weight, dropout_p=0.05, training=True, activation='relu')
                kernel_norm2d(x, dropout_p=0.05, training=True)
        y.sum().backward()
        assert y.device == weight.grad.device == torch.device('cpu')

    cpu_chunks._scratch.stores.clear()
    with torch.device('meta'):
        call()
    call()
