"""The shipped recipe keeps the stem's bias in place where constant regions would throw it.

A region of constant colour leaves the stem as a constant, so the next layer's windows have
next to no variance and pass its gradient on 316 times larger. One unclipped step then throws
the stem's bias far beyond what the image makes of its output.
"""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from program import ROOT
from toy_cityscapes import scene

CONFIG = (ROOT / 'configs/deeplabv3'
          / 'deeplabv3_knr18-d8_4xb2-80k_cityscapes-512x1024.py')
SIZE = (96, 128)


def batch(seed):
    """Two scenes with a clipped sky and black borders."""
    images, samples = [], []
    for i in range(2):
        image, label = scene(np.random.default_rng(100 * seed + i), SIZE)
        image[:56] = 255
        image[-16:] = image[:, :24] = image[:, -24:] = 0
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
        samples.append(SegDataSample(
            gt_sem_seg=PixelData(data=torch.from_numpy(label[None].astype(np.int64)))))
    return dict(inputs=images, data_samples=samples)


@pytest.fixture(scope='module')
def batches():
    return [batch(seed) for seed in range(4)]


def train(batches, dropout_p, seed, clip, steps=10):
    """Norms of the stem's weight gradient at each step, and of its bias at the end."""
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cfg.model.data_preprocessor.size = SIZE
    cfg.model.backbone.dropout_p = dropout_p
    for head in ('decode_head', 'auxiliary_head'):
        cfg.model[head].conv_cfg.dropout_p = dropout_p
    if not clip:
        cfg.optim_wrapper.clip_grad = None
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    stem, norms = model.backbone.stem, []
    stem.weight.register_hook(lambda grad: norms.append(grad.norm().item()))
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for i in range(steps):
        model.train_step(batches[i % len(batches)], optim_wrapper)
    return norms, stem.bias.norm().item()


@pytest.mark.parametrize('dropout_p, seed', [(0.05, 21), (0., 0)])
def test_the_stem_stays_alive(batches, dropout_p, seed):
    norms, bias = train(batches, dropout_p, seed, clip=True)
    assert np.median(norms[-3:]) > 0.2 * norms[0]
    _, thrown_bias = train(batches, dropout_p, seed, clip=False)
    assert bias < 0.1 and thrown_bias > 10 * bias
