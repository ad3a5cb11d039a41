"""Reads every image and label of a config's data sets and lists all that is wrong with them.

Size, depth and channels of each file, damage, and whether label values are classes; what the
pipeline loads by transforms of your own is loaded by these. Prints the sizes, the share of each
class and up to --max-problems problems, each with its file and a remedy, and exits with 1 if
there is any. The model is built, without weights, and all that ClassCheckHook compares before a
training is compared: classes, outputs and losses of each head, and what is ignored.

    python tools/misc/check_dataset.py CONFIG --split train --workers 8
"""
import argparse
import functools
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import mmengine
import numpy as np

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmengine.evaluator import Evaluator
from mmseg.registry import DATASETS, MODELS

from mmseg_kn.datasets import KNCityscapesDataset
from mmseg_kn.datasets.file_checks import Rules, rules_of, scan
from mmseg_kn.datasets.label_values import lone_class_fault
from mmseg_kn.datasets.walk import innermost, walk
from mmseg_kn.engine.class_checks import heads_of, limits_of, setting_faults

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


def share_lines(pixels: np.ndarray, classes) -> list[str]:
    """The label values that occur, with class and share of pixels, and the classes that do not."""
    lines, seen, names = [], set(), classes.names if classes else ()
    for value in np.flatnonzero(pixels):
        name = ''
        if classes:
            index = classes.index[value]
            ignored = classes.ignored()[value]
            known = index < len(names) and not ignored
            seen |= {index} if known else set()
            name = names[index] if known else 'ignored' if ignored else 'NO CLASS'
        lines.append(f'  {value:3} {name:16} {pixels[value] / pixels.sum():7.2%}')
    never = [name for i, name in enumerate(names) if i not in seen]
    if len(pixels) and never:
        lines.append(f'  never: {", ".join(never)}')
    return lines


def read_all(dataset, rules: Rules, workers: int) -> list:
    """The record of each sample of a dataset."""
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    read = functools.partial(scan, rules=rules)
    try:
        pickle.dumps(read)
    except Exception:  # a transform of one's own that no process can be sent
        workers = 1
    if not samples:
        return []
    if workers == 1:
        return mmengine.track_progress(read, samples)
    return mmengine.track_parallel_progress(read, samples, workers, chunksize=8)


def print_faults(faults: list[str], most: int) -> None:
    print(f'problems: {len(faults)}', *(f'  {f}' for f in faults[:most]), sep='\n')
    if len(faults) > most:
        print(f'  and {len(faults) - most} more: --max-problems')


def check(name: str, dataset, faults: list[str], limits, args: argparse.Namespace,
          seen: list, last: bool) -> int:
    """Reads one dataset and prints what it found; returns the number of problems.

    Args:
        name: Of the split, and which dataset of it.
        dataset: Without wrappers.
        faults: Those found so far, which are printed with it.
        limits: (num_classes, ignore_index) of each head.
        args: Of the program.
        seen: Pixels of each label value in the datasets of the split before; gets this one's.
        last: Whether it is the last of its split, whose labels are then judged together.
    """
    if not all(hasattr(dataset, part) for part in ('pipeline', 'get_data_info', 'metainfo')):
        print(f'\n{name}: {type(dataset).__name__} is no dataset of mmseg and keeps no list of '
              'files; they are not read')
        print_faults(faults, args.max_problems)
        return len(faults)
    rules = rules_of(dataset, limits)
    records = read_all(dataset, rules, args.workers)
    faults = faults + [fault for record in records for fault in record.faults]
    if not records:
        where = getattr(dataset, 'data_prefix', '') or getattr(dataset, 'data_root', '')
        faults += [f'{name}: there must be images, got none in {where}; check data_root, '
                   'data_prefix and img_suffix']
    sizes = Counter(r.size for r in records if r.size)
    print(f'\n{name}: {len(records)} images, H x W '
          + ', '.join(f'{h} x {w} ({n})' for (h, w), n in sizes.most_common(5))
          + f', and {len(sizes) - 5} other sizes' * (len(sizes) > 5))
    labels = [record.pixels for record in records if record.pixels is not None]
    if labels:
        seen.append(sum(labels))
        print(f'values of {len(labels)} labels:', *share_lines(seen[-1], rules.classes), sep='\n')
        if last and name.startswith('train') and (
                fault := lone_class_fault(sum(seen), rules.classes)):
            faults += [f'{name}: {fault}']
    elif not any(record.faults for record in records):
        print('its pipeline loads no labels')
    print_faults(faults, args.max_problems)
    return len(faults)


def build(kind: str, make, cfg) -> tuple:
    """What a config describes, built, and what went wrong, as a training would say it."""
    try:
        return make(cfg), []
    except Exception as error:  # whatever a dataset or model of one's own raises
        text = str(error) or type(error).__name__
        known = isinstance(error, (ValueError, OSError))
        return None, [text if known else f'the {kind} cannot be built: {text}']


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    wanted = SPLITS if args.split == 'all' else (args.split, )
    model, faults = build('model', MODELS.build, cfg.model) if cfg.get('model') else (None, [])
    if faults:
        print(f'model\nproblems: 1\n  {faults[0]}')
    limits = limits_of(heads_of(model)) if model else []
    problems, seen = len(faults), {}
    for split in wanted:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            print(f'{split}: the config has no {split}_dataloader')
            problems += args.split != 'all'
            continue
        evaluator = cfg.get(f'{split}_evaluator')
        text = repr((loader.dataset, evaluator))
        if text in seen:
            print(f'{split}: the data set of {seen[text]}')
            continue
        seen[text] = split
        leave_checks(loader.dataset)
        dataset, faults = build('data set', DATASETS.build, loader.dataset)
        if faults:
            print(f'{split}\nproblems: 1\n  {faults[0]}')
            problems += 1
            continue
        made, faults = build('evaluator', Evaluator, evaluator or [])
        if model:
            metrics = made.metrics if made else ()
            faults += setting_faults(model, dataset, split, cfg.filename, metrics)
        parts, pixels = innermost(dataset), []
        for i, part in enumerate(parts):
            name = split + f'[{i}]' * (len(parts) > 1)
            problems += check(name, part, faults, limits, args, pixels, i == len(parts) - 1)
            faults = []
    sys.exit(problems > 0)


if __name__ == '__main__':
    main()
