"""Per-sample gradients of the layers of the classification networks, and of plain labels."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, ImgDataPreprocessor
from torch import nn

pytest.importorskip('opacus')

from opacus.accountants.utils import get_noise_multiplier  # noqa: E402
from private import wrapper_for  # noqa: E402

from mmseg_kn import KNConv2d, KNConvNeXt, KNResNetClassifier  # noqa: E402
from mmseg_kn.models.knresnet import Block  # noqa: E402
from mmseg_kn.privacy import GradSampler, grad_sample  # noqa: E402
from mmseg_kn.privacy.probe import check_batch  # noqa: E402

NETS = {
    'mish': lambda: Block(6, 8, (2, 3, 2), 1, dropout_p=0., with_cp=False, zero_init=False,
                          activation='mish'),
    'depthwise': lambda: nn.Sequential(
        KNConv2d(6, 6, 3, padding=1, groups=6, dropout_p=0.), nn.Mish(),
        KNConv2d(6, 12, 3, padding=1, groups=6, dropout_p=0., activation='relu'),
        nn.Conv2d(12, 12, 7, padding=3, groups=12)),
    'convnext': lambda: KNConvNeXt(dict(depths=[1] * 4, channels=(4, 6, 8, 10)), in_channels=6,
                                   out_indices=(1, ), layer_scale_init_value=0.5, dropout_p=0.),
}


@pytest.mark.parametrize('small_map', [0, 10 ** 9])  # by sample, and all windows at once
@pytest.mark.parametrize('name', NETS)
def test_grad_samples_equal_a_loop_over_samples(name, small_map, monkeypatch):
    monkeypatch.setattr(grad_sample, 'SMALL_MAP', small_map)
    torch.manual_seed(0)
    net = NETS[name]().double()
    x = torch.randn(3, 6, 33, 35, dtype=torch.float64)

    def loss(x):
        y = net(x)
        y = y[-1] if isinstance(y, tuple) else y
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(y.shape[1:], dtype=y.dtype, generator=generator)
        return (y * weight).flatten(1).mean(1).mean()

    alone = [torch.autograd.grad(loss(x[i:i + 1]), list(net.parameters())) for i in range(3)]
    GradSampler(net)
    loss(x).backward()
    for p, *grads in zip(net.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(grads), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('groups', [1, 4])
def test_convolutions_in_channels_last(groups):
    """opacus alone would give the gradients of other elements, and no word of it."""
    torch.manual_seed(0)
    net = nn.Conv2d(4, 8, 3, padding=1, groups=groups).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 9, 8, dtype=torch.float64)
    alone = [torch.autograd.grad((net(x[i:i + 1]) * weight).mean(), net.weight)[0]
             for i in range(3)]
    GradSampler(net)
    (net(x) * weight).mean().backward()
    torch.testing.assert_close(net.weight.grad_sample, torch.stack(alone))


class Classifier(BaseModel):
    def __init__(self, mixes=False):
        super().__init__(ImgDataPreprocessor([0.] * 3, [255.] * 3))
        self.conv = KNConv2d(3, 4, 3, dropout_p=0., activation='relu')
        self.fc, self.mixes = nn.Linear(4, 5), mixes

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.fc(self.conv(inputs).mean((2, 3)))
        labels = torch.as_tensor(data_samples)
        if self.mixes:  # a loss that knows the labels of others
            logits = logits * (1 + labels.float().mean())
        return dict(loss=F.cross_entropy(logits, labels))


class Whole(BaseModel):
    """A network that gives logits, as a model of the Runner."""

    def __init__(self, net):
        super().__init__(ImgDataPreprocessor([0.] * 3, [255.] * 3))
        self.net = net

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=F.cross_entropy(self.net(inputs), torch.as_tensor(data_samples)))


@pytest.mark.parametrize('kind', [list, torch.tensor])
def test_the_probe_takes_plain_labels(kind):
    torch.manual_seed(0)
    images = list(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    batch = dict(inputs=images, data_samples=kind([4, 1]))
    net = Classifier()
    check_batch(net, wrapper_for(net), batch)
    net = Classifier(mixes=True)
    with pytest.raises(ValueError, match='not private: the gradient of a sample changed by'):
        check_batch(net, wrapper_for(net), batch)
    batch = dict(inputs=images[:1], data_samples=kind([3]))  # an image by itself
    net = Classifier()
    check_batch(net, wrapper_for(net), batch)


def test_the_probe_lets_mish_through_where_images_are_black():
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(2)]
    for image in images:
        image[:, :, 8:] = 0
    batch = dict(inputs=images, data_samples=[4, 1])
    model = Whole(KNResNetClassifier(18, 10, low_resolution=True, activation='mish'))
    check_batch(model, wrapper_for(model), batch)

    model = Whole(KNResNetClassifier(18, 10, low_resolution=True, activation='mish'))
    for conv in (m for m in model.modules() if isinstance(m, KNConv2d)):
        nn.init.zeros_(conv.bias)
    with pytest.raises(ValueError, match='or gradients explode, as without ReLU'):
        check_batch(model, wrapper_for(model), batch)


def test_the_noise_of_the_papers_private_training():
    """By opacus's accountant; the authors count 1 / 156 where we count 8,192 of all images."""
    net = Classifier()
    wrapper = wrapper_for(net, steps=15600, rate=8192 / 1_281_167, noise_multiplier=None,
                          target_epsilon=8., target_delta=8e-7, accountant='rdp')
    assert wrapper.noise_multiplier == get_noise_multiplier(
        target_epsilon=8., target_delta=8e-7, sample_rate=8192 / 1_281_167, steps=15600,
        accountant='rdp') == pytest.approx(0.853, abs=1e-3)
    theirs = get_noise_multiplier(target_epsilon=8., target_delta=8e-7, sample_rate=1 / 156,
                                  epochs=100, accountant='rdp')
    assert theirs == pytest.approx(wrapper.noise_multiplier, rel=3e-3)
    wrapper.counter.history = [(wrapper.noise_multiplier, 8192 / 1_281_167, 15600)]
    assert 7.9 < wrapper.epsilon() <= 8
