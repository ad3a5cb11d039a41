"""Tiny inputs on the CPU, whose units are built; other tests compare them with the reference."""
import torch

from mmseg_kn.ops import kn_conv2d, unfolded
from mmseg_kn.ops.closed_form import Options
from mmseg_kn.ops.geometry import make_geometry


def test_which_inputs_are_tiny():
    options = Options(make_geometry(3, padding=1), 1, 0.05, True)

    def serves(*shape, out=16, dtype=torch.float32):
        weight = torch.empty(out, shape[1], 3, 3, dtype=dtype)
        return unfolded.serves(torch.empty(shape, dtype=dtype), weight, options)

    assert serves(2, 16, 4, 4) and serves(2, 16, 4, 4, dtype=torch.float64)
    assert serves(1, 16, 8, 8) and not serves(2, 16, 16, 16)  # 9216 and 73728 elements
    assert not serves(2, 16, 1, 1, out=512)  # a weight that two samples would each copy
    assert not serves(0, 16, 4, 4) and not serves(2, 16, 4, 4, dtype=torch.bfloat16)
    with torch.device('meta'):
        assert not serves(2, 16, 4, 4)


def test_keeps_no_map_of_its_own():
    """Not even the one that the closed form keeps where nothing else needs it."""
    x, weight = (torch.randn(s, requires_grad=True) for s in ((2, 16, 4, 4), (16, 16, 3, 3)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = kn_conv2d(x, weight, padding=1)
    known = {t.data_ptr() for t in (x, weight)}
    assert max(t.numel() for t in saved if t.data_ptr() not in known) == y[:, 0].numel()
