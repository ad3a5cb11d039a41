"""One cell of the grid that compare_norms.py trains: its settings, its run and what came out."""
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from shared import device_name, short_hash

import mmseg_kn
from mmseg_kn.checkpoints.files import write_atomically

TRAIN = Path(__file__).parents[1] / 'train.py'
TELL_SECONDS = 60
_running = set()  # process ids of trainings, which must not outlive this process


class Cell(NamedTuple):
    """A config at one batch size, learning rate and seed."""

    name: str  # of the config
    batch: int
    lr: float  # at this batch size
    seed: int
    folder: Path
    cfg: Config

    @property
    def title(self) -> str:
        return f'{self.name}, batch {self.batch}, lr {self.lr:.4g}, seed {self.seed}'

    def kept(self, retry_failed: bool = False) -> dict | None:
        """The result of an earlier run, None where there is none."""
        file = self.folder / 'result.json'
        result = json.loads(file.read_text()) if file.exists() else None
        return None if result and 'error' in result and retry_failed else result


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
         work_dir: Path, lrs: dict[str, list[float]] | None = None) -> list[Cell]:
    """All cells, seed by seed.

    Args:
        lrs: The learning rates of each config, at its own batch size; by default its own.
    """
    cells = []
    for seed in seeds:
        for name, base in configs.items():
            for batch in batch_sizes or [base.train_dataloader.batch_size]:
                for lr in (lrs or {}).get(name, [base.optim_wrapper.optimizer.lr]):
                    cfg = copy.deepcopy(base)  # Config.copy() shares what is nested
                    cfg.optim_wrapper.optimizer.lr = lr
                    rescale(cfg, batch)
                    cfg.randomness = dict(seed=seed)
                    # A cell that is killed goes on as if it had not been.
                    cfg.custom_hooks = [*cfg.get('custom_hooks', []),
                                        dict(type='IterationSeedHook')]
                    cfg.default_hooks.setdefault('checkpoint', dict(
                        by_epoch=False, interval=cfg.train_cfg.max_iters))
                    cfg.default_hooks.checkpoint.type = 'SafeCheckpointHook'
                    cells.append(Cell(name, batch, cfg.optim_wrapper.optimizer.lr, seed,
                                      work_dir / name / folder_of(cfg), cfg))
    return cells


def run(cell: Path, cfg: Config, title: str) -> dict:
    """Trains a cell, or goes on with it; returns its result."""
    cell.mkdir(parents=True, exist_ok=True)
    cfg.dump(cell / 'config.py')
    start, end = time.time(), cfg.train_cfg.max_iters
    with open(cell / 'train.log', 'a') as log:
        process = subprocess.Popen(
            [sys.executable, TRAIN, cell / 'config.py', '--work-dir', cell, '--resume'],
            stdout=log, stderr=subprocess.STDOUT)
        _running.add(process.pid)
        pid, reported = 0, start
        while not pid:
            time.sleep(.2)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if time.time() - reported > TELL_SECONDS:
                reported = time.time()
                print(f'    {title}: {progress(cell, end)}', flush=True)
        _running.discard(process.pid)
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


def run_all(cells: list[Cell], jobs: int, retry_failed: bool) -> Iterator[tuple[Cell, dict]]:
    """Trains what has no result yet, ``jobs`` cells at a time; yields results in order."""

    def result_of(cell):
        title = f'[{cells.index(cell) + 1}/{len(cells)}] {cell.title}'
        result = cell.kept(retry_failed)
        note = 'kept'
        if result is None:
            print(f'{title}: {cell.folder}/train.log', flush=True)
            result = run(cell.folder.resolve(), cell.cfg, title)
            done = [r for r in (c.kept(retry_failed) for c in cells) if r]
            spent = [r['seconds'] for r in done if 'error' not in r]
            left = timedelta(seconds=round(
                statistics.mean(spent) * (len(cells) - len(done)) / jobs)) if spent else '?'
            note = f'{left} left'
        outcome = (f'failed: {result["error"]}' if 'error' in result else
                   f'mIoU {result["miou"][-1][1]:.2f} in {timedelta(seconds=result["seconds"])}')
        print(f'{title}: {outcome} ({note})', flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(result_of, cell) for cell in cells]
        try:
            for cell, future in zip(cells, futures, strict=True):
                yield cell, future.result()
        except BaseException:  # Ctrl-C too: leave no training behind, and begin no other
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in list(_running):
                os.kill(pid, signal.SIGKILL)
            raise


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
    text = f'iteration {iteration} of {end}'
    if loss is not None:
        left = timedelta(seconds=round((end - iteration) * so_far['iteration_seconds']))
        text += f', loss {loss:.3g}, {left} of training left'
    if so_far['miou']:
        text += ', mIoU {1:.2f} at {0}'.format(*so_far['miou'][-1])
    return text
