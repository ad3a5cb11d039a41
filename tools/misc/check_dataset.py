"""Reads every image and label of a config's data sets and lists all that is wrong with them.

Size, depth and channels of each file, damage, and whether label values are classes. Prints the
sizes, the share of each class and up to --max-problems problems, each with its file and a
remedy, and exits with 1 if there is any. The heads' num_classes must be the number of classes.

    python tools/misc/check_dataset.py CONFIG --split train --workers 8
"""
import argparse
import functools
import os
import sys
from collections import Counter
from pathlib import Path

import mmengine
import numpy as np

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.registry import DATASETS

from mmseg_kn.datasets import KNCityscapesDataset
from mmseg_kn.datasets.file_checks import rules_of, scan
from mmseg_kn.datasets.walk import innermost, walk
from mmseg_kn.engine.class_check_hook import class_fault

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402

SPLITS = ('train', 'val', 'test')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'train config file path')
    parser.add_argument('--split', choices=[*SPLITS, 'all'], default='all', help='(%(default)s)')
    parser.add_argument('--workers', type=int, default=len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count() or 1, help='processes (%(default)s)')
    parser.add_argument('--max-problems', type=int, default=20,
                        help='how many to print of each split (%(default)s)')
    args = parser.parse_args()
    if args.workers < 1 or args.max_problems < 1:
        parser.error('--workers and --max-problems must be at least 1, got '
                     f'{args.workers} and {args.max_problems}')
    return args


def leave_checks(cfg) -> None:
    """Lets our datasets, within wrappers too, take what is to be listed here."""
    for part in walk(cfg):
        kind = part.get('type')
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, KNCityscapesDataset):
            part['check_files'] = False


def share_lines(pixels: np.ndarray, rules) -> list[str]:
    """The label values that occur, with class and share of pixels, and the classes that do not."""
    lines, seen = [], set()
    for value in np.flatnonzero(pixels):
        name = ''
        if rules.index is not None:
            index = rules.index[value]
            known = index < len(rules.classes) and index != rules.ignore_index
            seen |= {index} if known else set()
            name = rules.classes[index] if known else \
                'ignored' if index == rules.ignore_index else 'NO CLASS'
        lines.append(f'  {value:3} {name:16} {pixels[value] / pixels.sum():7.2%}')
    never = [name for i, name in enumerate(rules.classes) if i not in seen]
    if len(pixels) and never:
        lines.append(f'  never: {", ".join(never)}')
    return lines


def head_faults(cfg, split: str, classes) -> list[str]:
    """Which heads of a config have another number of classes than a dataset."""
    faults = []
    for name in ('decode_head', 'auxiliary_head'):
        heads = cfg.get('model', {}).get(name)
        several = isinstance(heads, (list, tuple))
        for i, head in enumerate(heads if several else [heads]):
            if head and classes and 'num_classes' in head:
                faults.append(class_fault(name + f'[{i}]' * several, head.num_classes, split,
                                          classes, cfg.filename))
    return [fault for fault in faults if fault]


def check(name: str, dataset, cfg, args: argparse.Namespace) -> int:
    """Reads one dataset and prints what it found; returns the number of problems."""
    rules = rules_of(dataset)
    samples = [{key: info[key] for key in ('img_path', 'seg_map_path') if key in info}
               for info in map(dataset.get_data_info, range(len(dataset)))]
    read = functools.partial(scan, rules=rules, backend_args=dataset.backend_args)
    if not samples:
        records = []
    elif args.workers == 1:
        records = mmengine.track_progress(read, samples)
    else:
        records = mmengine.track_parallel_progress(read, samples, args.workers, chunksize=8)
    faults = head_faults(cfg, name.split('[')[0], rules.classes)
    faults += [fault for record in records for fault in record.faults]
    if not samples:
        faults += [f'{name}: there must be images, got none in {dataset.data_prefix}; check '
                  'data_root, data_prefix and img_suffix']
    sizes = Counter(r.size for r in records if r.size)
    print(f'\n{name}: {len(samples)} images, H x W '
          + ', '.join(f'{h} x {w} ({n})' for (h, w), n in sizes.most_common(5))
          + f', and {len(sizes) - 5} other sizes' * (len(sizes) > 5))
    labels = [record.pixels for record in records if record.pixels is not None]
    if labels:
        print(f'values of {len(labels)} labels:', *share_lines(sum(labels), rules), sep='\n')
    elif not rules.labels:
        print('its pipeline loads no labels')
    print(f'problems: {len(faults)}', *(f'  {f}' for f in faults[:args.max_problems]), sep='\n')
    if len(faults) > args.max_problems:
        print(f'  and {len(faults) - args.max_problems} more: --max-problems')
    return len(faults)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    wanted = SPLITS if args.split == 'all' else (args.split, )
    problems, seen = 0, {}
    for split in wanted:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            print(f'{split}: the config has no {split}_dataloader')
            problems += args.split != 'all'
            continue
        text = repr(loader.dataset)
        if text in seen:
            print(f'{split}: the data set of {seen[text]}')
            continue
        seen[text] = split
        leave_checks(loader.dataset)
        try:
            dataset = DATASETS.build(loader.dataset)
        except (ValueError, OSError) as error:
            print(f'{split}\nproblems: 1\n  {error}')
            problems += 1
            continue
        parts = innermost(dataset)
        for i, part in enumerate(parts):
            problems += check(split + f'[{i}]' * (len(parts) > 1), part, cfg, args)
    sys.exit(problems > 0)


if __name__ == '__main__':
    main()
