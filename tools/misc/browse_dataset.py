"""Draws the images that training sees: after the train pipeline, their labels laid over them.

Classes have the data set's colours and names; pixels without a class are dimmed. Of images with
more than three channels it draws three, --bands says which. Needs no display. Look at it before a
long training: crops, flips, and whether labels fit images.

    python tools/misc/browse_dataset.py CONFIG --output-dir work_dirs/browse --num 20
"""
import argparse
import sys
from pathlib import Path

import mmcv
import numpy as np

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.registry import DATASETS
from mmseg.visualization import SegLocalVisualizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from pictures import add_bands_arg, legend, loads_bgr, picture  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'train config file path')
    parser.add_argument('--output-dir', type=Path, required=True, help='folder to write to')
    parser.add_argument('--num', type=int, help='how many images, spread evenly; by default all')
    add_bands_arg(parser)
    args = parser.parse_args()
    if args.num is not None and args.num < 1:
        parser.error(f'--num must be at least 1, got {args.num}')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dict(zip(('classes', 'palette'), legend(dataset.metainfo),
                                       strict=True))
    bgr = loads_bgr(cfg, cfg.train_dataloader.dataset)

    number = min(args.num or len(dataset), len(dataset))
    for index in np.linspace(0, len(dataset) - 1, number).round().astype(int).tolist():
        data = dataset[index]
        image, sample = picture(data['inputs'], bgr, args.bands), data['data_samples']
        # Images of different folders may share a name.
        path = args.output_dir / f'{index:05}_{Path(sample.img_path).stem}.png'
        if 'gt_sem_seg' in sample:
            visualizer.add_datasample(path.stem, image, sample.numpy(), draw_pred=False,
                                      out_file=str(path))
        else:
            mmcv.imwrite(mmcv.rgb2bgr(image), str(path))
    print(f'{args.output_dir}: {number} of {len(dataset)} images of {args.config}')


if __name__ == '__main__':
    main()
