"""What compare_norms.py draws up of its cells: a table, their rows and a figure."""
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.config import Config
from norm_cells import Cell
from scipy.stats import ttest_1samp
from shared import giga_multiply_adds

from mmseg_kn.models.example import image_channels

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from segmentors import build_segmentor, logits  # noqa: E402


def complexity(cfg: Config) -> tuple[float, float]:
    """Parameters in 10 ** 6, and multiply-adds of one training crop in 10 ** 9."""
    model = build_segmentor(cfg)
    size = model.data_preprocessor.size or cfg.get('crop_size', (512, 1024))
    image = torch.rand(1, image_channels(model), *size)
    macs = giga_multiply_adds(lambda: logits(model, image))
    return sum(p.numel() for p in model.parameters()) / 1e6, macs


def over_seeds(final: dict[int, float], others: dict[int, float] | None) -> dict[str, str]:
    """Mean, deviation and single values of a figure by seed; and paired, the difference to others.

    p is that of the t-test of those differences.
    """
    values, pairs = list(final.values()), []
    if others is not None:
        pairs = [final[seed] - others[seed] for seed in final if seed in others]
    return {
        'mIoU': f'{statistics.mean(values):.1f}' if values else '',
        'std': f'{statistics.stdev(values):.1f}' if len(values) > 1 else '',
        'of each seed': ', '.join(f'{v:.1f}' for v in values),
        'to the first, paired': f'{statistics.mean(pairs):+.1f}' if pairs else '',
        'p': f'{ttest_1samp(pairs, 0).pvalue:.2g}' if len(pairs) > 1 else ''}


def summary(groups: dict, lrs: dict, sizes: dict, first: str) -> list[dict]:
    """A row for each config and batch size."""
    rows = []
    for (name, batch), cells in groups.items():
        parameters, macs = sizes[name]
        done = {seed: r for seed, r in cells.items() if 'error' not in r}
        final = {seed: r['miou'][-1][1] for seed, r in done.items()}
        others = {seed: r['miou'][-1][1] for seed, r in groups.get((first, batch), {}).items()
                  if 'error' not in r}
        rows.append({
            'config': name, 'batch size': batch, 'lr': f'{lrs[name, batch]:.4g}',
            **over_seeds(final, None if name == first else others),
            'images/s': f"""{statistics.median(batch / r['iteration_seconds']
                                               for r in done.values()):.2f}""" if done else '',
            'peak MiB': max((r['gpu_mib'] or r['resident_mib'] for r in done.values()),
                            default=''),
            'parameters, M': f'{parameters:.1f}', 'GMAC': f'{macs:.1f}',
            'failed': '; '.join(sorted({r['error'] for r in cells.values() if 'error' in r}))})
    return rows


def short(names: list[str]) -> dict[str, str]:
    """Labels: what mmseg's config names, split at '_', do not all share."""
    parts = {name: name.split('_') for name in names}
    common = set.intersection(*map(set, parts.values()))
    return {name: '_'.join(p for p in parts[name] if p not in common) or name for name in names}


def draw_curves(ax: plt.Axes, curves: list[list], scale: float, **style) -> None:
    """Mean over seeds, and as a band the range, of curves [(iteration, value), ...].

    Where one lacks an iteration, killed during its validation, the mean does.
    """
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    values = np.array([[v for step, v in curve if step in steps] for curve in curves])
    x = np.array(steps) * scale
    ax.plot(x, values.mean(0), marker='.', lw=1.2, **style)
    ax.fill_between(x, values.min(0), values.max(0), color=style['color'], alpha=.12, lw=0)


def draw(groups: dict, path: Path) -> None:
    plt.switch_backend('Agg')  # needs no screen
    fig, (by_batch, by_image, by_time) = plt.subplots(1, 3, figsize=(15, 4.5))
    labels = short(list(dict.fromkeys(name for name, _ in groups)))
    batches = sorted({batch for _, batch in groups})
    styles = dict(zip(batches, ['-', '--', ':', '-.'] * len(batches), strict=False))
    for k, (name, label) in enumerate(labels.items()):
        points = []
        for batch in batches:
            done = [r for r in groups.get((name, batch), {}).values() if 'error' not in r]
            if not done:
                continue
            finals = [r['miou'][-1][1] for r in done]
            points.append((batch, statistics.mean(finals),
                           statistics.stdev(finals) if len(finals) > 1 else 0))
            style = dict(color=f'C{k}', ls=styles[batch])
            draw_curves(by_image, [r['miou'] for r in done], batch, **style)
            minutes = statistics.median(r['iteration_seconds'] for r in done) / 60
            draw_curves(by_time, [r['loss'] for r in done], minutes, **style)
        if points:
            x, y, error = zip(*points, strict=True)
            by_batch.errorbar(x, y, error, marker='o', capsize=3, color=f'C{k}', label=label)
    by_batch.set(xscale='log', xlabel='batch size', ylabel='mIoU', xticks=batches,
                 xticklabels=batches, title='mean and standard deviation over seeds')
    by_batch.minorticks_off()
    by_image.set(xlabel='images seen (iterations x batch size)', ylabel='validation mIoU',
                 title='mean and range over seeds')
    by_time.set(xlabel='minutes of training', ylabel='training loss', yscale='log',
                title='mean and range over seeds')
    if by_batch.has_data():
        by_batch.legend()
    by_image.legend(handles=[plt.Line2D([], [], color='k', ls=styles[b], label=f'batch {b}')
                             for b in batches])
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def row_of(part: str, cell: Cell, result: dict) -> dict:
    """A cell as a row; ``part`` says what it was trained for."""
    good = 'error' not in result
    return dict(
        part=part, config=cell.name, batch_size=cell.batch, lr=cell.lr, seed=cell.seed,
        iterations=result['miou'][-1][0] if good else '',
        mIoU=result['miou'][-1][1] if good else '',
        validations=' '.join(f'{step}:{miou:.2f}' for step, miou in result.get('miou', [])),
        images_per_s=f'{cell.batch / result["iteration_seconds"]:.3f}' if good else '',
        gpu_mib=result['gpu_mib'] if good else '', resident_mib=result['resident_mib'],
        seconds=result['seconds'], error=result.get('error', ''), torch=result.get('torch', ''),
        mmseg_kn=result.get('mmseg_kn', ''), device=result.get('device', ''))
