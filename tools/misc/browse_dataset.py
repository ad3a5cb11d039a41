"""Draws the images that training sees: after the train pipeline, their labels laid over them.

Classes have the data set's colours and names; pixels without a class are dimmed. Needs no
display. Look at it before a long training: crops, flips, and whether labels fit images.

    python tools/misc/browse_dataset.py CONFIG --output-dir work_dirs/browse --num 20
"""
import argparse
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.registry import DATASETS
from mmseg.visualization import SegLocalVisualizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='train config file path')
    parser.add_argument('--output-dir', type=Path, required=True, help='folder to write to')
    parser.add_argument('--num', type=int, help='how many images, spread evenly; by default all')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    if args.num is not None and args.num < 1:
        parser.error(f'--num must be at least 1, got {args.num}')
    return args


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dataset.metainfo

    number = min(args.num or len(dataset), len(dataset))
    for index in np.linspace(0, len(dataset) - 1, number).round().astype(int).tolist():
        data = dataset[index]
        # RGB, contiguous: OpenCV draws into nothing else
        image = np.ascontiguousarray(data['inputs'].numpy()[::-1].transpose(1, 2, 0))
        sample = data['data_samples']
        # Images of different folders may share a name.
        path = args.output_dir / f'{index:05}_{Path(sample.img_path).stem}.png'
        visualizer.add_datasample(path.stem, image, sample.numpy(), draw_pred=False,
                                  out_file=str(path))
    print(f'{args.output_dir}: {number} of {len(dataset)} images of {args.config}')


if __name__ == '__main__':
    main()
