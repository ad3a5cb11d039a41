"""Draws image, truth and prediction of a few test images side by side, with a legend.

Images are drawn as the test pipeline gives them, and without the truth where there is none. Of
images with more than three channels it draws three, --bands says which.
"""
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.dataset import pseudo_collate

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.registry import DATASETS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from pictures import add_bands_arg, colourize, legend, loads_bgr, picture  # noqa: E402
from segmentors import build_segmentor  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'test config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', required=True, help='picture to write, e.g. scenes.png')
    parser.add_argument('--num', type=int, default=4, help='how many images (%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add_bands_arg(parser)
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f'--num must be at least 1, got {args.num}')
    return args


def labels(sample, name: str) -> np.ndarray | None:
    """Labels (H, W) in integers, which predictions by a threshold are not; None without any."""
    if name not in sample:
        return None
    return sample.get(name).data.squeeze(0).long().cpu().numpy()


def main() -> None:
    args = parse_args()
    plt.switch_backend('Agg')  # needs no screen
    cfg = load_config(args.config, args.cfg_options)
    model = build_segmentor(cfg, args.checkpoint, args.device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    names, palette = legend(dataset.metainfo)
    bgr = loads_bgr(cfg, cfg.test_dataloader.dataset)

    indices = np.linspace(0, len(dataset) - 1, min(args.num, len(dataset))).round().astype(int)
    rows = []
    for index in indices.tolist():
        data = dataset[index]
        with torch.no_grad():
            result = model.test_step(pseudo_collate([data]))[0]
        rows.append([picture(data['inputs'], bgr, args.bands),
                     labels(data['data_samples'], 'gt_sem_seg'), labels(result, 'pred_sem_seg')])
    titles = ['image', 'truth', 'prediction']
    if all(truth is None for _, truth, _ in rows):
        rows, titles = [[image, prediction] for image, _, prediction in rows], titles[::2]

    fig, axes = plt.subplots(len(rows), len(titles), squeeze=False, figsize=(
        4 * len(titles), 2.1 * len(rows) + 0.9))
    seen = set()
    for row, (image, *maps) in zip(axes, rows, strict=True):
        row[0].imshow(image)
        for ax, found in zip(row[1:], maps, strict=True):
            if found is not None:
                ax.imshow(colourize(found, palette))
                seen |= set(np.unique(found).tolist())
        for ax in row:
            ax.axis('off')
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    classes = [i for i in sorted(seen) if i < len(palette)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=np.array(palette[i]) / 255) for i in classes]
    shown = [names[i] for i in classes]
    if seen - set(classes):
        patches.append(plt.Rectangle((0, 0), 1, 1, color='black'))
        shown.append('void')
    fig.legend(patches, shown, loc='lower center', ncol=10, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.6 / fig.get_figheight(), 1, 1), pad=0.3)
    fig.savefig(args.out, dpi=110)
    print(f'{args.out}: {len(indices)} of {len(dataset)} images of {args.config}')


if __name__ == '__main__':
    main()
