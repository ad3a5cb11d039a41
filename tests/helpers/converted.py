"""A config of a small BatchNorm network over the demo's data, and the config that converts it."""
from pathlib import Path

from short_training import CONFIG, SHORT

BATCHNORM = f"""
_base_ = {str(CONFIG)!r}
norm = dict(type='SyncBN')
head = dict(channels=16, conv_cfg=None, norm_cfg=dict(_delete_=True, **norm),
            act_cfg=dict(_delete_=True, type='ReLU'))
model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=18, stem_channels=8, base_channels=8,
                  norm_cfg=norm, out_indices=(2, 3), dilations=(1, 1, 2, 4),
                  strides=(1, 2, 1, 1)),
    decode_head=dict(in_channels=64, **head), auxiliary_head=dict(in_channels=32, **head))
"""
KERNELNORM = """
_base_ = 'bn.py'
model = dict(_delete_=True, type='KernelNormalized', model={{_base_.model}})
"""


def write_configs(folder: Path) -> None:
    (folder / 'bn.py').write_text(BATCHNORM)
    (folder / 'kn.py').write_text(KERNELNORM)


def options_for(scenes: Path, converted: bool) -> list[str]:
    """--cfg-options that shorten a training on these scenes."""
    short = [o.replace('model.', 'model.model.') for o in SHORT] if converted else SHORT
    return ['--cfg-options', *short, *(f'{split}_dataloader.dataset.data_root={scenes}'
                                       for split in ('train', 'val', 'test'))]
