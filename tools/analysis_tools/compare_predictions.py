"""Draws image, truth and prediction of a few test images side by side, with a legend."""
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.apis import init_model
from mmseg.registry import DATASETS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_args(parser, 'test config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', required=True, help='picture to write, e.g. scenes.png')
    parser.add_argument('--num', type=int, default=4, help='how many images (%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f'--num must be at least 1, got {args.num}')
    return args


def colourize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) class indices to (H, W, 3) RGB; void is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = palette
    return colours[labels]


def main() -> None:
    args = parse_args()
    plt.switch_backend('Agg')  # needs no screen
    cfg = load_config(args.config, args.cfg_options)
    model = init_model(cfg, args.checkpoint, device=args.device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    palette = np.array(dataset.metainfo['palette'], np.uint8)

    indices = np.linspace(0, len(dataset) - 1, min(args.num, len(dataset))).round().astype(int)
    fig, axes = plt.subplots(len(indices), 3, figsize=(12, 2.1 * len(indices) + 0.9),
                             squeeze=False)
    seen = set()
    for row, index in zip(axes, indices, strict=True):
        data = dataset[int(index)]
        truth = data['data_samples'].gt_sem_seg.data.squeeze().numpy()
        with torch.no_grad():
            result = model.test_step(pseudo_collate([data]))[0]
        prediction = result.pred_sem_seg.data.squeeze().cpu().numpy()
        image = mmcv.imread(result.img_path, channel_order='rgb')
        for ax, picture in zip(row, (image, colourize(truth, palette),
                                     colourize(prediction, palette)), strict=True):
            ax.imshow(picture)
            ax.axis('off')
        seen |= set(np.unique(truth)) | set(np.unique(prediction))
    for ax, title in zip(axes[0], ('image', 'truth', 'prediction'), strict=True):
        ax.set_title(title)
    patches = [plt.Rectangle((0, 0), 1, 1, color=palette[i] / 255) for i in sorted(seen)
               if i < len(palette)]
    names = [dataset.metainfo['classes'][i] for i in sorted(seen) if i < len(palette)]
    if 255 in seen:
        patches.append(plt.Rectangle((0, 0), 1, 1, color='black'))
        names.append('void')
    fig.legend(patches, names, loc='lower center', ncol=10, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.6 / fig.get_figheight(), 1, 1), pad=0.3)
    fig.savefig(args.out, dpi=110)
    print(f'{args.out}: {len(indices)} of {len(dataset)} images of {args.config}')


if __name__ == '__main__':
    main()
