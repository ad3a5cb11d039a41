"""Networks with other activations than ReLU, and what keeps their weights apart."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmseg_kn import KNConv2d, KNResNet, KNResNetClassifier
from mmseg_kn.baselines import NormKNResNet
from mmseg_kn.models.knresnet import Block

OUT = dict(depth=18, out_indices=(0, ), dropout_p=0.)


def build(activation, **kwargs):
    torch.manual_seed(0)
    return KNResNet(**dict(OUT, zero_init_residual=False, activation=activation, **kwargs))


def test_a_block_is_the_formula():
    torch.manual_seed(0)
    block = Block(6, 8, (2, 3, 2), 1, dropout_p=0., with_cp=False, zero_init=False,
                  activation='mish').double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    convs = [m for m in block.children() if isinstance(m, KNConv2d)]
    assert all(c.activation is c.input_activation is None for c in convs)
    y = x
    for conv in convs:
        y = conv(F.mish(y))
    torch.testing.assert_close(block(x), x + y)
    grad, = torch.autograd.grad(block(x).square().sum(), x)
    again = torch.autograd.grad((x + y).square().sum(), x)[0]
    torch.testing.assert_close(grad, again)


@pytest.mark.parametrize('activation, kind', [
    ('mish', nn.Mish), ('Leaky_ReLU', nn.LeakyReLU), ('gelu', nn.GELU)])
def test_every_activation_of_the_network(activation, kind):
    net, x = build(activation), torch.rand(1, 3, 64, 64)
    count = sum(isinstance(m, kind) for m in net.modules())
    assert count == 3  # two blocks, the outputs
    relu = build('relu')
    assert not any(isinstance(m, kind) for m in relu.modules())
    assert not torch.equal(net(x)[0], relu(x)[0])
    for p, q in zip(relu.parameters(), net.parameters(), strict=True):
        p.data.copy_(q)  # the first biases differ
    # ReLU inside the layers is what a ReLU outside of them computes.
    for module in net.modules():
        if isinstance(getattr(module, 'act', None), kind):
            module.act = nn.ReLU()
    torch.testing.assert_close(net(x)[0], relu(x)[0])


def test_with_cp_and_frozen_stages():
    net, again, x = build('mish'), build('mish', with_cp=True), torch.rand(1, 3, 64, 64)
    for one in (net, again):
        one(x)[0].square().sum().backward()
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_another_normalization_keeps_the_activation():
    torch.manual_seed(0)
    kwargs = dict(OUT, norm_cfg=dict(type='GN', num_groups=1), zero_init_residual=False)
    x = torch.rand(1, 3, 64, 64)
    assert NormKNResNet(**kwargs)(x)[0].min() == 0
    assert NormKNResNet(activation='mish', **kwargs)(x)[0].min() < 0


@pytest.mark.parametrize('activation', ['swish', 'softmax', 'prelu', 'glu', None, 3])
def test_unknown_activations(activation):
    with pytest.raises(ValueError, match='activation must name one of torch.nn .*mish.*; got '):
        KNResNet(18, activation=activation)


def test_a_relu_network_has_the_keys_it_had():
    assert 'activation_name' not in build('relu').state_dict()
    assert bytes(build('mish').state_dict()['activation_name'].tolist()) == b'mish'


def test_weights_of_another_activation_are_refused(tmp_path):
    mish, relu = build('mish'), build('relu')
    with pytest.raises(ValueError, match="trained with activation='mish', and this network has "
                                         "'relu'; set activation='mish'"):
        relu.load_state_dict(mish.state_dict(), strict=False)
    with pytest.raises(ValueError, match="activation='relu', and this network has 'mish'"):
        mish.load_state_dict(relu.state_dict(), strict=False)
    build('mish').load_state_dict(mish.state_dict())  # the remedy
    # A file that a classifier was saved to, as the start of a segmentor's backbone.
    source = KNResNetClassifier(18, num_classes=2, activation='mish')
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=source.state_dict()), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    with pytest.raises(ValueError, match="set activation='mish'"):
        build('relu', init_cfg=init_cfg).init_weights()
    net = build('mish', init_cfg=init_cfg)
    net.init_weights()
    assert torch.equal(net.stem.weight, source.backbone.stem.weight)
    # What a hostile file names is shown without its control characters.
    hostile = dict(mish.state_dict(), activation_name=torch.tensor([27, 91, 65]))
    with pytest.raises(ValueError, match=r"activation='\?\[A'"):
        build('mish').load_state_dict(hostile)


def test_averages_keep_it():
    net = build('mish').half().float()
    average = ExponentialMovingAverage(net)
    average.update_parameters(net)
    build('mish').load_state_dict(average.module.state_dict())


@pytest.mark.parametrize('activation', ['mish', 'silu', 'gelu'])
@pytest.mark.parametrize('classifier', [False, True])
def test_gradients_where_an_image_is_black(activation, classifier):
    """With biases of zero they were ten million times as large, as nothing but ReLU stops them."""
    torch.manual_seed(0)
    kwargs = dict(activation=activation, dropout_p=0.)
    net = (KNResNetClassifier(18, 10, low_resolution=True, **kwargs) if classifier else
           KNResNet(18, **kwargs))
    image = torch.rand(1, 3, 64, 64)
    black = image.clone()
    black[..., 32:] = 0

    def norm(x):
        y = net(x) if classifier else net(x)[-1]
        grads = torch.autograd.grad(y.square().mean(), list(net.parameters()), allow_unused=True)
        return torch.stack([g.norm() for g in grads if g is not None]).norm()

    assert norm(black) < 10 * norm(image)


def test_biases_start_as_torchs_but_for_relu():
    assert not any(m.bias.any() for m in build('relu').modules() if isinstance(m, KNConv2d))
    convs = [m for m in build('mish').modules() if isinstance(m, KNConv2d)]
    for bias, bound in ((m.bias, m.weight[0].numel() ** -0.5) for m in convs):
        assert 0.8 * bound < bias.abs().max() <= bound
    block, x = KNResNet(**OUT, activation='mish').layer1[0], torch.rand(1, 64, 8, 8)
    assert torch.equal(block(x), x)  # starts as identity


def test_first_weights_as_torchs():
    net = KNResNet(**OUT, init_cfg=dict(type='TorchConv', layer='KNConv2d'))
    torch.manual_seed(1)
    net.init_weights()
    torch.manual_seed(1)
    for conv in (m for m in net.modules() if isinstance(m, KNConv2d)):
        twin = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size)
        assert torch.equal(conv.weight, twin.weight) and torch.equal(conv.bias, twin.bias)
