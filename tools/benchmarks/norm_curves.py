"""Trainings of one length from rows of compare_norms.py: a table, and validation mIoU on the way.

Rows that share config, options, batch size and learning rate are one group, whose seeds are
averaged; of a seed that was trained twice the later row counts. Differences are to the first group
of the same batch size, paired by seed.

    python tools/benchmarks/norm_curves.py docs/benchmarks/camvid_long_cpu.csv \\
        --iterations 6400 --first knr18 --out curves.png
"""
import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from norm_report import draw_curves, over_seeds, short
from shared import markdown


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='+', type=Path, help='results.csv of compare_norms.py')
    parser.add_argument('--iterations', type=int, help='of trainings to take; by default the most')
    parser.add_argument('--seeds', nargs='+', type=int, help='by default all')
    parser.add_argument('--batch-sizes', nargs='+', type=int, help='by default all')
    parser.add_argument('--first', default='', help='what the name of the first config contains; '
                        'by default it is that of the first row')
    parser.add_argument('--out', type=Path, help='a picture')
    return parser.parse_args()


def groups_of(rows: list[dict], args: argparse.Namespace) -> dict[tuple, dict[int, dict]]:
    """Rows by (config, options, batch size, learning rate), and then by seed, in their order."""
    rows = [row for row in rows if row['mIoU']]  # else it failed
    rows.sort(key=lambda row: args.first not in row['config'])
    length = args.iterations or max((int(row['iterations']) for row in rows), default=0)
    groups = {}
    for row in rows:
        batch, seed = int(row['batch_size']), int(row['seed'])
        if int(row['iterations']) == length and seed in (args.seeds or [seed]) and (
                batch in (args.batch_sizes or [batch])):
            key = row['config'], row.get('options', ''), batch, row['lr']
            groups.setdefault(key, {})[seed] = row
    return groups


def table(groups: dict[tuple, dict[int, dict]]) -> list[dict]:
    found, firsts = [], {}
    for (config, options, batch, lr), by_seed in groups.items():
        final = {seed: float(row['mIoU']) for seed, row in sorted(by_seed.items())}
        found.append({'config': config, 'options': options, 'batch size': batch, 'lr': lr,
                      **over_seeds(final, firsts.get(batch))})
        firsts.setdefault(batch, final)
    return found


def draw(groups: dict[tuple, dict[int, dict]], path: Path) -> None:
    plt.switch_backend('Agg')  # needs no screen
    labels = short(list(dict.fromkeys(config for config, *_ in groups)))
    batches = {batch for _, _, batch, _ in groups}
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for k, ((config, options, batch, lr), by_seed) in enumerate(groups.items()):
        curves = [[(int(step), float(value)) for step, value in (
            point.split(':') for point in row['validations'].split())]
            for row in by_seed.values()]
        words = [labels[config], options, f'lr {lr}', f'batch {batch}' if len(batches) > 1 else '',
                 f'{len(curves)} seeds' if len(curves) > 1 else '1 seed']
        draw_curves(ax, curves, 1, color=f'C{k}', label=', '.join(filter(None, words)))
    ax.set(xlabel='iterations', ylabel='validation mIoU', title='mean and range over seeds')
    ax.legend(fontsize='small')
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    args = parse_args()
    rows = []
    for path in args.rows:
        with open(path, newline='') as file:
            rows += csv.DictReader(file)
    groups = groups_of(rows, args)
    if not groups:
        sys.exit(f'no row of {", ".join(map(str, args.rows))} has these iterations, seeds and '
                 'batch sizes')
    print(markdown(table(groups)))
    if args.out:
        draw(groups, args.out)


if __name__ == '__main__':
    main()
