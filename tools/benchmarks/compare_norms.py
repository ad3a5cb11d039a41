"""Trains configs against each other over batch sizes and seeds, and draws up the result.

Every cell of the grid config x batch size x seed is a run of tools/train.py in a folder of its
own, whose name ends in a hash of its whole config. Cells that have finished are kept, one that was
killed goes on from its last checkpoint to the same result (IterationSeedHook), and one that fails
is reported as failed. --jobs trains several at a time.

From a config's own batch size B0, batch size B takes lr * B / B0 and iterations * B0 / B (likewise
eta_min, and every interval): each cell sees as many images. --lrs gives each config a learning
rate of its own; --scan-lrs looks for it instead: each config is trained at each of these rates and
batch sizes on a seed of its own, and the best one of a batch size goes into the table. All this
comes after --cfg-options.

    CAMVID=1xb2-400_camvid-160x160
    python tools/benchmarks/compare_norms.py \\
        configs/deeplabv3/deeplabv3_{knr18,r18,r18-gn,r18-ln,r18-nonorm}-d8_$CAMVID.py \\
        --batch-sizes 1 2 8 --scan-lrs 0.01 0.03 0.1 --scan-seed 3 --seeds 0 1 2 \\
        --work-dir work_dirs/compare_norms

--kernelize trains each config once more as NAME-kn: its network with kernel normalization in place
of BatchNorm (docs/any_model.md), gradients clipped at norm 1, and images in [0, 1] unless it
loads weights. --lrs then has a rate for each config and one for its twin in turn:

    python tools/benchmarks/compare_norms.py CONFIG --kernelize --lrs 0.1 0.03 --batch-sizes 1 2

In --work-dir: results.csv (a line for each cell, with every validation), table.md and table.csv,
figures.png.
"""
import argparse
import copy
import signal
import sys
from pathlib import Path

import torch
from mmengine.config import Config

import mmseg_kn
from mmseg_kn.datasets.walk import innermost

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, merge_options  # noqa: E402
from norm_cells import Cell, grid, run_all  # noqa: E402
from norm_report import complexity, draw, row_of, summary  # noqa: E402
from shared import markdown, write_csv  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'differences are to the first', several=True)
    parser.add_argument('--kernelize', action='store_true',
                        help='each config against its own network with kernel normalization')
    parser.add_argument('--batch-sizes', nargs='+', type=int,
                        help="images an iteration; by default each config's own")
    parser.add_argument('--lrs', nargs='+', type=float,
                        help="a learning rate for each config, at its own batch size; by default "
                        'that of the config')
    parser.add_argument('--scan-lrs', nargs='+', type=float,
                        help='learning rates, at the own batch size of each config, of which the '
                        'best goes into the table')
    parser.add_argument('--scan-seed', type=int, help='what they are tried on; none of --seeds')
    parser.add_argument('--jobs', type=int, default=1,
                        help='cells trained at a time, each with OMP_NUM_THREADS (%(default)s)')
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
    if args.kernelize:
        names += [f'{name}-kn' for name in names]
    if len(set(names)) < len(names):
        parser.error(f'the configs must have different names, got {names}')
    if args.lrs and len(args.lrs) != len(names):
        parser.error(f'--lrs takes one learning rate for each of the {len(names)} configs'
                     f'{", twins included" * args.kernelize}, got {len(args.lrs)}')
    if args.lrs and args.scan_lrs:
        parser.error('--lrs gives the learning rates and --scan-lrs looks for them: give one')
    if bool(args.scan_lrs) != (args.scan_seed is not None) or args.scan_seed in args.seeds:
        parser.error('--scan-lrs needs a --scan-seed, which is none of the --seeds, so that the '
                     f'rates are not chosen on what the table shows; got --scan-seed '
                     f'{args.scan_seed} and --seeds {args.seeds}')
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
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


def kernelized(cfg: Config) -> Config:
    """The config whose network is that of ``cfg`` with kernel normalization."""
    cfg, network = copy.deepcopy(cfg), cfg.model.to_dict()
    if network['type'] == 'KernelNormalized':
        raise SystemExit(f'--kernelize takes configs with BatchNorm; {cfg.filename} has '
                         'KernelNormalized already')
    preprocessor = network.get('data_preprocessor') or {}
    if preprocessor.get('mean') and not (cfg.get('load_from') or loads_weights(network)):
        channels = len(preprocessor['mean'])
        preprocessor.update(mean=[0] * channels, std=[255] * channels)
    cfg.model = dict(type='KernelNormalized', model=network)
    cfg.optim_wrapper.clip_grad = dict(max_norm=1)
    modules = (cfg.get('custom_imports') or {}).get('imports', [])
    cfg.custom_imports = dict(imports=['mmseg_kn', *modules], allow_failed_imports=False)
    return cfg


def loads_weights(network: dict | list) -> bool:
    """Whether a model's config names weights to start from."""
    if isinstance(network, dict):
        return bool(network.get('pretrained')) or network.get('type') == 'Pretrained' or any(
            map(loads_weights, network.values()))
    return isinstance(network, (list, tuple)) and any(map(loads_weights, network))


def best_rates(results: list[tuple[Cell, dict]]) -> dict[tuple[str, int], float]:
    """The learning rate with the highest final mIoU, for each config and batch size."""
    done = [(cell, result) for cell, result in results if 'error' not in result]
    return {(cell.name, cell.batch): cell.lr
            for cell, _ in sorted(done, key=lambda pair: pair[1]['miou'][-1][1])}


def table_cells(configs: dict[str, Config], args: argparse.Namespace,
                best: dict[tuple[str, int], float]) -> list[Cell]:
    """The cells of the table; those with a scanned rate have the best of their batch size."""
    lrs = None
    if args.scan_lrs:
        lrs = dict.fromkeys(configs, args.scan_lrs)
    elif args.lrs:
        lrs = {name: [lr] for name, lr in zip(configs, args.lrs, strict=True)}
    cells = grid(configs, args.batch_sizes, args.seeds, args.work_dir, lrs)
    if not args.scan_lrs:
        return cells
    return [cell for cell in cells if best.get((cell.name, cell.batch)) == cell.lr]


def main() -> None:
    args = parse_args()
    # As Ctrl-C does, so that no training is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    configs = {}
    for path in args.configs:
        configs[Path(path).stem] = load(path, args)
        if args.kernelize:
            configs[f'{Path(path).stem}-kn'] = kernelized(configs[Path(path).stem])
    sizes = {name: complexity(cfg) for name, cfg in configs.items()}
    scanned, best = [], {}
    if args.scan_lrs:
        cells = grid(configs, args.batch_sizes, [args.scan_seed], args.work_dir,
                     dict.fromkeys(configs, args.scan_lrs))
        scanned = list(run_all(cells, args.jobs, args.retry_failed))
        best = best_rates(scanned)
        for (name, batch), lr in best.items():
            print(f'best of --scan-lrs: {name}, batch {batch}: lr {lr:.4g}', flush=True)
    cells = table_cells(configs, args, best)
    trained = list(run_all(cells, args.jobs, args.retry_failed))
    groups = {}
    for name in configs:
        for cell, result in trained:
            if cell.name == name:
                groups.setdefault((name, cell.batch), {})[cell.seed] = result
    lrs = {(cell.name, cell.batch): cell.lr for cell in cells}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [row_of(part, *pair) for part, pairs in (('scan', scanned), ('table', trained))
            for pair in pairs]
    write_csv(rows, args.work_dir / 'results.csv')
    failed = sum(bool(row['error']) for row in rows)
    note = f'{failed} of {len(rows)} cells failed; --retry-failed runs them again'
    if not cells:
        sys.exit(f'no learning rate of --scan-lrs trains any of the configs: {note}')
    table = summary(groups, lrs, sizes, next(iter(configs)))
    text = markdown(table)
    (args.work_dir / 'table.md').write_text(text)
    write_csv(table, args.work_dir / 'table.csv')
    draw(groups, args.work_dir / 'figures.png')
    print(f'\n{text}\n{args.work_dir}: results.csv, table.md, table.csv, figures.png '
          f'(mmseg_kn {mmseg_kn.__version__}, torch {torch.__version__})')
    if failed:
        print(note)
    if failed == len(rows):
        sys.exit(1)


if __name__ == '__main__':
    main()
