"""Writes configs of five networks of mmseg, small, from scratch and with BatchNorm, for CamVid.

compare_norms.py trains each beside its twin with kernel normalization:

    python tools/benchmarks/small_networks.py work_dirs/networks
    python tools/benchmarks/compare_norms.py work_dirs/networks/*.py --kernelize

Data, schedule and hooks are those of the DeepLabV3 config of CamVid.
"""
import argparse
from pathlib import Path

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
import mmseg
from mmengine.config import Config

TRAINING = Path(__file__).parents[2] / (
    'configs/deeplabv3/deeplabv3_r18-d8_1xb2-400_camvid-160x160.py')
MODELS = Path(mmseg.__file__).parent / '.mim/configs/_base_/models'
# mmseg's file with the model, and what is changed there
NETWORKS = {
    'deeplabv3plus_r18-d8': ('deeplabv3plus_r50-d8', {
        'backbone.depth': 18, 'decode_head.in_channels': 512, 'decode_head.channels': 128,
        'decode_head.c1_in_channels': 64, 'decode_head.c1_channels': 12,
        'auxiliary_head.in_channels': 256, 'auxiliary_head.channels': 64}),
    'fast-scnn': ('fast_scnn', {}),
    'fcn_hr18s': ('fcn_hr18', {
        'backbone.extra.stage1.num_blocks': (2, ), 'backbone.extra.stage2.num_blocks': (2, 2),
        'backbone.extra.stage3': dict(num_modules=3, num_blocks=(2, 2, 2)),
        'backbone.extra.stage4': dict(num_modules=2, num_blocks=(2, 2, 2, 2))}),
    'fcn_unet-s5-d16': ('fcn_unet_s5-d16', {  # a quarter of the channels
        'backbone.base_channels': 16, 'decode_head.in_channels': 16, 'decode_head.channels': 16,
        'auxiliary_head.in_channels': 32, 'auxiliary_head.channels': 16,
        # its downsamplings must divide the sides of an image, so validation pads it
        'data_preprocessor.test_cfg': dict(size_divisor=16)}),
    'stdc1': ('stdc', {}),
}


def config_of(name: str) -> Config:
    file, changes = NETWORKS[name]
    cfg = Config.fromfile(TRAINING)
    base = Config.fromfile(MODELS / f'{file}.py')
    base.model.data_preprocessor = cfg.model.data_preprocessor
    base.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    model = base.model
    model.update(pretrained=None, test_cfg=dict(mode='whole'))
    heads = model.get('auxiliary_head', [])
    heads = heads if isinstance(heads, list) else [heads]
    # STDC's head for edges needs labels of its own.
    heads = [head for head in heads if head.type != 'STDCHead']
    for head in (model.decode_head, *heads):
        head.num_classes = cfg.model.decode_head.num_classes
    if heads:
        model.auxiliary_head = heads
    cfg.model = model
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to write to')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        config_of(name).dump(args.out / f'{name}_1xb2-400_camvid-160x160.py')


if __name__ == '__main__':
    main()
