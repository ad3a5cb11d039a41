"""A segmentor small enough to be trained for a few iterations by any test, and that training."""
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample

SIZE = (32, 64)


def samples():
    generator = torch.Generator().manual_seed(0)
    return [dict(inputs=torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8),
                 data_samples=SegDataSample(
                     metainfo=dict(img_shape=SIZE),
                     gt_sem_seg=PixelData(
                         data=torch.randint(0, 3, (1, *SIZE), generator=generator))))
            for _ in range(4)]


def build(dropout_p=0.0):
    init_default_scope('mmseg')
    torch.manual_seed(0)
    return EncoderDecoder(
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[50.] * 3,
                               size=SIZE),
        backbone=dict(type='KNResNet', depth=18, dropout_p=dropout_p),
        decode_head=dict(
            type='FCNHead', in_channels=724, in_index=3, channels=8, num_convs=1, num_classes=3,
            norm_cfg=None, act_cfg=None, dropout_ratio=0,
            conv_cfg=dict(type='KNConv', activation='relu', dropout_p=dropout_p)))


def train(model, work_dir, max_iters=2, **hooks):
    """Trains ``model`` without shuffling; returns the runner."""
    runner = Runner(
        model, str(work_dir), experiment_name=work_dir.name, default_scope='mmseg',
        train_dataloader=dict(batch_size=2, dataset=samples(), collate_fn=dict(
            type='pseudo_collate'), sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(checkpoint=None, **hooks), randomness=dict(seed=0))
    runner.train()
    return runner
