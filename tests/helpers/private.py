"""A small network, its input, its loss and its optimizer wrapper, for private training."""
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmseg_kn.privacy  # noqa: F401
from mmseg_kn import KNConv2d


def make_input(dtype=torch.float64, n=3, size=(7, 9)):
    return torch.randn(n, 4, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Adds and rectifies in place, as mmseg's networks do; layers of four kinds."""

    def __init__(self, norm=None):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = norm or nn.GroupNorm(2, 8)
        self.conv = KNConv2d(8, 8, 3, padding=1, dropout_p=0.)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = self.conv(x)
        y += x
        return self.head(F.relu(y, inplace=True))


def loss_of(net, x):
    return net(x).square().flatten(1).mean(1).mean()


def wrapper_for(net, steps=10, rate=0.5, batch_size=3, state=None, lr=1.0, **kwargs):
    kwargs = dict(dict(noise_multiplier=0., max_grad_norm=1.0, target_delta=1e-5), **kwargs)
    wrapper = build_optim_wrapper(net, dict(type='DPOptimWrapper',
                                            optimizer=dict(type='SGD', lr=lr), **kwargs))
    wrapper.attach(net, sample_rate=rate, batch_size=batch_size, steps=steps, num_items=6,
                   state=state)
    return wrapper
