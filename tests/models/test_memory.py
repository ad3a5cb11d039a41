"""What networks keep for backward, beside the BatchNorm networks that they replace."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models.backbones import ResNetV1c
from mmseg.registry import MODELS
from program import ROOT, load_tool

from mmseg_kn import KNResNet

memory = load_tool(ROOT / 'tools/benchmarks/memory.py')
STRIDE_8 = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(2, 3))


def kept(net, image):
    """Without the input and what the network returns, which its user holds anyway."""
    outs = []
    layers = memory.kept_by_layer(net, lambda: outs.extend(net(image)), (image, ))
    own = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in outs}
    return sum(layers.values()) - sum(own.values())


@pytest.mark.parametrize('depth, bar', [(18, 0.85), (50, 0.7)])
def test_a_backbone_keeps_less_than_batch_norms(depth, bar):
    image = torch.rand(1, 3, 128, 256)
    ours = KNResNet(depth, **STRIDE_8)
    theirs = ResNetV1c(depth=depth, num_stages=4, contract_dilation=True, **STRIDE_8)
    assert kept(ours, image) < bar * kept(theirs, image)


def test_a_segmentor_keeps_less_than_batch_norms():
    init_default_scope('mmseg')
    image = torch.rand(2, 3, 128, 256)
    total = []
    for name in ('knr18', 'r18'):
        cfg = Config.fromfile(
            ROOT / f'configs/deeplabv3/deeplabv3_{name}-d8_1xb2-400_camvid-160x160.py')
        cfg.model.pretrained = None
        model = MODELS.build(cfg.model).train()
        total.append(sum(memory.kept_by_layer(
            model, lambda model=model: model(image, mode='tensor'), (image, )).values()))
    assert total[0] < 0.9 * total[1]


def test_layers_are_named_and_storages_count_once():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1))
    image = torch.rand(1, 3, 8, 8)
    layers = memory.kept_by_layer(net, lambda: net(image).square().sum(), (image, ))
    # The second convolution keeps the ReLU's output as well, and the square that of the last.
    assert layers == {'1': 4 * 4 * 64, '': 4 * 5 * 64}


def test_peak_of_a_call():
    def call():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b + 1

    assert memory.peak_bytes(call, torch.device('cpu')) in range(8000, 8000 + 200)
