"""Trains configs against each other over batch sizes and seeds, and draws up the result.

Every cell of the grid config x batch size x seed is a run of tools/train.py in a folder of its
own, whose name ends in a hash of its whole config. Cells that have finished are kept, one that was
killed goes on from its last checkpoint to the same result (IterationSeedHook), and one that fails
is reported as failed.

From a config's own batch size B0, batch size B takes lr * B / B0 and iterations * B0 / B (likewise
eta_min, and every interval): each cell sees as many images. --lrs gives each config a learning
rate of its own, for a comparison of each at its best. All this comes after --cfg-options.

    CAMVID=1xb2-400_camvid-160x160
    python tools/benchmarks/compare_norms.py \\
        configs/deeplabv3/deeplabv3_{knr18,r18,r18-gn,r18-ln,r18-nonorm}-d8_$CAMVID.py \\
        --batch-sizes 1 2 8 --seeds 0 1 2 --work-dir work_dirs/compare_norms

In --work-dir: results.csv (a line for each cell), table.md and table.csv, figures.png.
"""
import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.config import Config
from scipy.stats import ttest_1samp

import mmseg_kn

# isort: split
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS

from mmseg_kn.checkpoints.files import write_atomically
from mmseg_kn.datasets.walk import innermost

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, merge_options  # noqa: E402
from shared import device_name, giga_multiply_adds, markdown, short_hash, write_csv  # noqa: E402

TRAIN = Path(__file__).parents[1] / 'train.py'
TELL_SECONDS = 60


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'differences are to the first', several=True)
    parser.add_argument('--batch-sizes', nargs='+', type=int,
                        help="images an iteration; by default each config's own")
    parser.add_argument('--lrs', nargs='+', type=float,
                        help="a learning rate for each config, at its own batch size; by default "
                        'that of the config')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2],
                        help='(%(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare_norms'),
                        help='(%(default)s)')
    parser.add_argument('--data-root', help='in place of that of the configs')
    parser.add_argument('--retry-failed', action='store_true',
                        help='run cells again that have failed with the same config')
    args = parser.parse_args()
    for path in args.configs:
        if not Path(path).is_file():
            parser.error(f'no config {path}')
    names = [Path(path).stem for path in args.configs]
    if len(set(names)) < len(names):
        parser.error(f'the configs must have different names, got {names}')
    if args.lrs and len(args.lrs) != len(args.configs):
        parser.error(f'--lrs takes one learning rate for each of the {len(args.configs)} configs, '
                     f'got {len(args.lrs)}')
    if any(n < 1 for n in args.batch_sizes or []):
        parser.error(f'batch sizes must be positive, got {args.batch_sizes}')
    return args


def load(path: str, args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(path)
    if cfg.train_cfg.get('type') != 'IterBasedTrainLoop':
        raise SystemExit(f'{path} must train by iterations (train_cfg.type IterBasedTrainLoop)')
    if args.data_root:
        for split in ('train', 'val', 'test'):
            for dataset in innermost(cfg[f'{split}_dataloader'].dataset):
                dataset.data_root = args.data_root
    return merge_options(cfg, args.cfg_options)


def rescale(cfg: Config, batch_size: int) -> None:
    """Another batch size, and the learning rate and the schedule that go with it."""
    ratio = batch_size / cfg.train_dataloader.batch_size
    cfg.train_dataloader.batch_size = batch_size
    cfg.optim_wrapper.optimizer.lr *= ratio
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    cfg.setdefault('default_hooks', {})
    hooks = cfg.default_hooks

    def scaled(iterations):
        return max(1, round(iterations / ratio)) if iterations else iterations

    for holder, keys in ((cfg.train_cfg, ('max_iters', 'val_interval', 'val_begin')),
                         (hooks.get('checkpoint', {}), ('interval', )),
                         *((scheduler, ('begin', 'end', 'T_max')) for scheduler in schedulers)):
        holder.update({key: scaled(holder[key]) for key in keys if key in holder})
    for scheduler in schedulers:
        if 'milestones' in scheduler:
            scheduler.milestones = [scaled(i) for i in scheduler.milestones]
        if 'eta_min' in scheduler:
            scheduler.eta_min *= ratio
    logger = hooks.setdefault('logger', dict(type='LoggerHook'))
    logger['interval'] = min(logger.get('interval', 10), cfg.train_cfg.max_iters)


def folder_of(cfg: Config) -> str:
    """Names a cell: no other settings share its folder."""
    settings = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    seed = cfg.randomness.seed
    return f'b{cfg.train_dataloader.batch_size}_s{seed}-{short_hash(settings)}'


def grid(configs: dict[str, Config], batch_sizes: list[int] | None, seeds: list[int],
         work_dir: Path) -> list[tuple[str, int, int, Path, Config]]:
    """(name, batch size, seed, folder, config) of each cell, seed by seed."""
    cells = []
    for seed in seeds:
        for name, base in configs.items():
            for batch in batch_sizes or [base.train_dataloader.batch_size]:
                cfg = copy.deepcopy(base)  # Config.copy() shares what is nested
                rescale(cfg, batch)
                cfg.randomness = dict(seed=seed)
                # A cell that is killed goes on as if it had not been.
                cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='IterationSeedHook')]
                cfg.default_hooks.setdefault('checkpoint', dict(
                    by_epoch=False, interval=cfg.train_cfg.max_iters))
                cfg.default_hooks.checkpoint.type = 'SafeCheckpointHook'
                cells.append((name, batch, seed, work_dir / name / folder_of(cfg), cfg))
    return cells


def run(cell: Path, cfg: Config) -> dict:
    """Trains a cell, or goes on with it; returns its result."""
    cell.mkdir(parents=True, exist_ok=True)
    cfg.dump(cell / 'config.py')
    start, end = time.time(), cfg.train_cfg.max_iters
    with open(cell / 'train.log', 'a') as log:
        process = subprocess.Popen(
            [sys.executable, TRAIN, cell / 'config.py', '--work-dir', cell, '--resume'],
            stdout=log, stderr=subprocess.STDOUT)
        try:
            pid, reported = 0, start
            while not pid:
                time.sleep(.2)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if time.time() - reported > TELL_SECONDS:
                    reported = time.time()
                    print(progress(cell, end), flush=True)
        except BaseException:
            process.kill()
            raise
    result = dict(seconds=round(time.time() - start), resident_mib=usage.ru_maxrss >> 10,
                  device=device_name(), torch=torch.__version__, mmseg_kn=mmseg_kn.__version__)
    code = os.waitstatus_to_exitcode(status)
    if code:
        lines = (cell / 'train.log').read_text().strip().splitlines()
        result['error'] = (f'killed by {signal.Signals(-code).name}' if code < 0 else
                           lines[-1] if lines else f'exit status {code}')
    else:
        result.update(curves(cell))
        if not result['loss'] or not result['miou'] or result['miou'][-1][0] != end:
            result['error'] = (f'no loss, or no mIoU of iteration {end}, in the log; see '
                               'train_cfg.val_interval and val_evaluator')
    write_atomically(cell / 'result.json', json.dumps(result).encode())
    return result


def curves(cell: Path) -> dict:
    """What the cell's runs logged: (iteration, mIoU), (iteration, loss), seconds an iteration."""
    miou, loss, times, memory = {}, {}, [], []
    for path in sorted(cell.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            if 'mIoU' in entry:
                miou[entry['step']] = entry['mIoU']
            elif 'loss' in entry:
                loss[entry['step']] = entry['loss']
                times.append(entry['time'])
                memory.append(entry.get('memory', 0))
    return dict(miou=sorted(miou.items()), loss=sorted(loss.items()),
                iteration_seconds=statistics.median(times) if times else 0,
                gpu_mib=max(memory, default=0))


def progress(cell: Path, end: int) -> str:
    """How far a cell has come, as its log has it."""
    so_far = curves(cell)
    iteration, loss = so_far['loss'][-1] if so_far['loss'] else (0, None)
    text = f'    iteration {iteration} of {end}'
    if loss is not None:
        left = timedelta(seconds=round((end - iteration) * so_far['iteration_seconds']))
        text += f', loss {loss:.3g}, {left} of training left'
    if so_far['miou']:
        text += ', mIoU {1:.2f} at {0}'.format(*so_far['miou'][-1])
    return text


def complexity(cfg: Config) -> tuple[float, float]:
    """Parameters in 10 ** 6, and multiply-adds of one training crop in 10 ** 9."""
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    size = cfg.model.data_preprocessor.get('size') or cfg.get('crop_size', (512, 1024))
    macs = giga_multiply_adds(lambda: model(torch.rand(1, 3, *size), mode='tensor'))
    return sum(p.numel() for p in model.parameters()) / 1e6, macs


def summary(groups: dict, lrs: dict, sizes: dict, first: str) -> list[dict]:
    """A row for each config and batch size."""
    rows = []
    for (name, batch), cells in groups.items():
        parameters, macs = sizes[name]
        done = {seed: r for seed, r in cells.items() if 'error' not in r}
        final = {seed: r['miou'][-1][1] for seed, r in done.items()}
        others = {seed: r['miou'][-1][1] for seed, r in groups.get((first, batch), {}).items()
                  if 'error' not in r}
        pairs = [final[seed] - others[seed] for seed in final if seed in others and name != first]
        values = list(final.values())
        rows.append({
            'config': name, 'batch size': batch, 'lr': f'{lrs[name, batch]:.4g}',
            'mIoU': f'{statistics.mean(values):.1f}' if values else '',
            'std': f'{statistics.stdev(values):.1f}' if len(values) > 1 else '',
            'of each seed': ', '.join(f'{v:.1f}' for v in values),
            'to the first, paired': f'{statistics.mean(pairs):+.1f}' if pairs else '',
            'p': f'{ttest_1samp(pairs, 0).pvalue:.2g}' if len(pairs) > 1 else '',
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


def cells_of(groups: dict, lrs: dict) -> list[dict]:
    """A row for each cell."""
    rows = []
    for (name, batch), cells in groups.items():
        for seed, r in cells.items():
            good = 'error' not in r
            rows.append(dict(
                config=name, batch_size=batch, lr=lrs[name, batch], seed=seed,
                iterations=r['miou'][-1][0] if good else '',
                mIoU=r['miou'][-1][1] if good else '',
                images_per_s=f'{batch / r["iteration_seconds"]:.3f}' if good else '',
                gpu_mib=r['gpu_mib'] if good else '', resident_mib=r['resident_mib'],
                seconds=r['seconds'], error=r.get('error', ''), torch=r.get('torch', ''),
                mmseg_kn=r.get('mmseg_kn', ''), device=r.get('device', '')))
    return rows


def main() -> None:
    args = parse_args()
    # As Ctrl-C does, so that no training is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    configs = {Path(path).stem: load(path, args) for path in args.configs}
    for cfg, lr in zip(configs.values(), args.lrs or [], strict=False):
        cfg.optim_wrapper.optimizer.lr = lr
    sizes = {name: complexity(cfg) for name, cfg in configs.items()}
    cells = grid(configs, args.batch_sizes, args.seeds, args.work_dir)

    def kept(cell: Path) -> dict | None:
        file = cell / 'result.json'
        result = json.loads(file.read_text()) if file.exists() else None
        return None if result and 'error' in result and args.retry_failed else result

    groups, spent = {name_batch[:2]: {} for name_batch in sorted(
        cells, key=lambda c: list(configs).index(c[0]))}, [
            r['seconds'] for r in (kept(c[3]) for c in cells) if r and 'error' not in r]
    for i, (name, batch, seed, cell, cfg) in enumerate(cells):
        title = f'[{i + 1}/{len(cells)}] {name}, batch {batch}, seed {seed}: '
        result, note = kept(cell), 'kept'
        if result is None:
            print(f'{title}{cell}/train.log', flush=True)
            result = run(cell.resolve(), cfg)
            if 'error' not in result:
                spent.append(result['seconds'])
            missing = sum(kept(c[3]) is None for c in cells[i + 1:])
            left = timedelta(seconds=round(statistics.mean(spent) * missing)) if spent else '?'
            note = f'{left} left'
        groups[name, batch][seed] = result
        outcome = (f'failed: {result["error"]}' if 'error' in result else
                   f'mIoU {result["miou"][-1][1]:.2f} in {timedelta(seconds=result["seconds"])}')
        print(f'{title}{outcome} ({note})', flush=True)

    lrs = {(name, batch): cfg.optim_wrapper.optimizer.lr for name, batch, _, _, cfg in cells}
    rows = summary(groups, lrs, sizes, next(iter(configs)))
    text = markdown(rows)
    (args.work_dir / 'table.md').write_text(text)
    write_csv(rows, args.work_dir / 'table.csv')
    write_csv(cells_of(groups, lrs), args.work_dir / 'results.csv')
    draw(groups, args.work_dir / 'figures.png')
    print(f'\n{text}\n{args.work_dir}: results.csv, table.md, table.csv, figures.png '
          f'(mmseg_kn {mmseg_kn.__version__}, torch {torch.__version__})')
    failed = sum('error' in r for results in groups.values() for r in results.values())
    if failed:
        print(f'{failed} of {len(cells)} cells failed; --retry-failed runs them again')
    if failed == len(cells):
        sys.exit(1)


if __name__ == '__main__':
    main()
