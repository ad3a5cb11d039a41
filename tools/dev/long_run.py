"""A long training on generated scenes: does memory, time or the number of open files grow?

    python tools/dev/long_run.py

trains KNResNet-18 with DeepLabV3 on 32 x 48 crops, one image an iteration, with a checkpoint and a
validation every 500 iterations. Prints a verdict; the exit status is 1 if anything grows. Time is
the process's own CPU time, so that other programs on the machine matter little. Needs Linux.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for the scenes

from toy_cityscapes import generate  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'
WINDOW = 200  # iterations that are compared, at the beginning and at the end
WARMUP = 600  # before memory is compared: the first checkpoint and validation are in it


class Meter(Hook):
    """Notes what every iteration takes: CPU seconds, resident bytes, open files."""

    priority = 'VERY_LOW'  # after the checkpoint is written

    def __init__(self) -> None:
        self.seconds, self.resident, self.files = [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.start = time.process_time()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.seconds.append(time.process_time() - self.start)
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        self.resident.append(pages * os.sysconf('SC_PAGE_SIZE'))
        self.files.append(len(os.listdir('/proc/self/fd')))


def train(iterations: int, folder: Path) -> Meter:
    generate(folder / 'scenes', train=16, val=2, size=(64, 96))
    cfg = Config.fromfile(CONFIG)
    every = min(500, iterations)
    cfg.merge_from_dict({
        'work_dir': str(folder / 'work'), 'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': every, 'param_scheduler.0.end': iterations,
        'default_hooks.checkpoint.interval': every, 'default_hooks.checkpoint.max_keep_ckpts': 1,
        'default_hooks.logger.interval': 50, 'model.data_preprocessor.size': (32, 48),
        'model.decode_head.channels': 16, 'model.auxiliary_head.channels': 16,
        **{f'{split}_dataloader.{key}': value for split in ('train', 'val', 'test')
           for key, value in (('batch_size', 1), ('num_workers', 0), ('persistent_workers', False),
                              ('dataset.data_root', str(folder / 'scenes')))}})
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='RandomCrop', crop_size=(32, 48), cat_max_ratio=1.))
    runner, meter = Runner.from_cfg(cfg), Meter()
    runner.register_hook(meter, priority=meter.priority)
    runner.train()
    return meter


def judge(meter: Meter, growth: float, slowdown: float) -> list[str]:
    """What has grown by more than it may; prints all figures."""
    n = len(meter.seconds)
    # A step that also writes a checkpoint is an outlier: medians.
    first, last = (statistics.median(part) for part in (
        meter.seconds[:WINDOW], meter.seconds[-WINDOW:]))
    before, after = (statistics.median(part) for part in (
        meter.resident[WARMUP:WARMUP + WINDOW], meter.resident[-WINDOW:]))
    course = [statistics.median(meter.resident[i:i + WINDOW]) / 2**20
              for i in range(0, n - WINDOW + 1, WINDOW)]
    opened, open_now = meter.files[WARMUP], meter.files[-1]
    print(f'{n} iterations, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n'
          f'resident: {before / 2**20:.1f} MiB after warm-up, {after / 2**20:.1f} MiB at the end '
          f'({after / before - 1:+.2%}, may grow by {growth:.0%})\n'
          f'    of every {WINDOW} iterations: {" ".join(f"{mib:.0f}" for mib in course)}\n'
          f'CPU time of an iteration: {first * 1e3:.1f} ms in the first {WINDOW}, '
          f'{last * 1e3:.1f} ms in the last ({last / first - 1:+.1%}, may grow by '
          f'{slowdown:.0%})\nopen files: {opened} after warm-up, {open_now} at the end')
    return [name for name, bad in (('memory', after > before * (1 + growth)),
                                   ('time', last > first * (1 + slowdown)),
                                   ('open files', open_now > opened)) if bad]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--iterations', type=int, default=2000, help='(%(default)s)')
    parser.add_argument('--growth', type=float, default=0.01, help='of memory (%(default)s)')
    parser.add_argument('--slowdown', type=float, default=0.1,
                        help='more than the noise of a shared machine (%(default)s)')
    args = parser.parse_args()
    if args.iterations < WARMUP + 2 * WINDOW:
        parser.error(f'--iterations must be at least {WARMUP + 2 * WINDOW}, got '
                     f'{args.iterations}: the windows that are compared would overlap')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        meter = train(args.iterations, Path(folder))
    grown = judge(meter, args.growth, args.slowdown)
    print(f'FAILED: {", ".join(grown)} grew' if grown else 'PASSED: nothing grows')
    sys.exit(bool(grown))


if __name__ == '__main__':
    main()
