"""Kills a training again and again, resumes it, and compares it with one left in peace.

KNResNet-18 on generated scenes, a checkpoint every few iterations. SIGKILL comes at random
moments of five kinds: while the program starts, between two iterations, while a checkpoint is
written; and, after a kill, with the newest checkpoint cut as in-place writing leaves it, or with
last_checkpoint empty. Each resumed run must start from the newest whole checkpoint and name what
it skips; at the end weights, momentum and schedule must be the other training's, bit for bit.
Then a disk is filled: a clear message, and the checkpoints before it whole.

    python tools/dev/kill_and_resume.py --kills 20
    python tools/dev/kill_and_resume.py --kills 20 --dropout    # with IterationSeedHook
"""
import argparse
import collections
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mmseg_kn.checkpoints.safe_load import load_from_local

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for the scenes

from toy_cityscapes import generate  # noqa: E402

ROOT = Path(__file__).parents[2]
BASE = ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'
KINDS = ('start', 'train', 'write', 'torn', 'pointer')
CONFIG = """
_base_ = {base!r}
data = dict(num_workers={workers}, persistent_workers={workers} > 0)
train_dataloader = dict(batch_size=1, dataset=dict(data_root={scenes!r}), **data)
val_dataloader = dict(dataset=dict(data_root={scenes!r}), **data)
test_dataloader = val_dataloader
data_preprocessor = dict(size=(64, 128))
model = dict(data_preprocessor=data_preprocessor)
param_scheduler = [dict(type='PolyLR', power=0.9, end={iters}, by_epoch=False)]
train_cfg = dict(max_iters={iters}, val_interval={val})
default_hooks = dict(logger=dict(interval=1),
                     checkpoint=dict(interval={interval}, max_keep_ckpts=3))
"""
NO_DROPOUT = """
conv_cfg = dict(dropout_p=0.)
model.update(backbone=dict(dropout_p=0.),
             decode_head=dict(conv_cfg=conv_cfg, dropout_ratio=0.),
             auxiliary_head=dict(conv_cfg=conv_cfg, dropout_ratio=0.))
"""
DROPOUT = "custom_hooks = [dict(type='ClassCheckHook'), dict(type='IterationSeedHook')]\n"


def write_config(folder: Path, iters: int, interval: int, workers: int, dropout: bool) -> Path:
    """Generates scenes in a folder and returns a config that trains on them."""
    generate(folder / 'scenes', train=8, val=2, size=(64, 128))
    text = CONFIG.format(base=str(BASE), scenes=str(folder / 'scenes'), iters=iters,
                         interval=interval, workers=workers, val=4 * interval)
    path = folder / 'config.py'
    path.write_text(text + (DROPOUT if dropout else NO_DROPOUT))
    return path


class Training:
    """tools/train.py in a process of its own group, and what it has printed so far."""

    def __init__(self, config: Path, work: Path, *args: str) -> None:
        self.log = work.with_suffix('.log')
        env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        with open(self.log, 'w') as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir',
                 str(work), *args], env=env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True)
        self.begun = time.monotonic()

    def text(self) -> str:
        return self.log.read_text(errors='replace')

    def iterations(self) -> int:
        """How many this process has logged."""
        return self.text().count('Iter(train) [')

    def wait_for(self, condition, pause: float = 0.01) -> bool:
        """False if the process ends first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(pause)
        return True

    def kill(self) -> None:
        """Kills it with its data loading processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def whole(path: Path) -> bool:
    """Whether a checkpoint loads, which is another test than the hook's."""
    try:
        load_from_local(str(path), 'cpu')
    except ValueError:
        return False
    return True


def number(path: Path) -> int:
    return int(re.search(r'iter_(\d+)\.pth', path.name)[1])


def checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob('iter_*.pth'), key=number)


def half_written(work: Path) -> set:
    """The files that are being written, or were when a kill came; each with its birth."""
    found = set()
    for path in work.glob('iter_*.part'):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def spoil(kind: str, work: Path, rng: random.Random) -> Path | None:
    """Leaves what a kill leaves where checkpoints are written in place; returns the cut file."""
    if kind == 'pointer' and (work / 'last_checkpoint').is_file():
        (work / 'last_checkpoint').write_text('')
    if kind == 'torn' and len(checkpoints(work)) > 1:
        path = checkpoints(work)[-1]
        os.truncate(path, rng.randrange(path.stat().st_size))
        return path
    return None


def kill_once(kind: str, training: Training, work: Path, startup: float,
              rng: random.Random) -> bool:
    """Kills a training at a moment of a kind; False if it has ended before."""
    if kind == 'start':
        end = training.begun + rng.uniform(0, startup)
        alive = training.wait_for(lambda: time.monotonic() > end)
    elif kind == 'write':
        before = half_written(work)  # of an earlier kill
        alive = training.wait_for(lambda: half_written(work) - before, 0.0005)
        time.sleep(rng.uniform(0, 0.05))
    else:
        least = rng.randint(1, 6)
        alive = training.wait_for(lambda: training.iterations() >= least)
        time.sleep(rng.uniform(0, 0.2))
    training.kill()
    return alive and training.process.returncode == -signal.SIGKILL


def check_resumed(training: Training, expected: Path | None, cut: Path | None) -> None:
    """Asserts what a resumed training has said."""
    text = training.text()
    found = re.search(r'Load checkpoint from (\S+)', text)
    if found is None:
        return  # killed before it came so far
    assert expected is not None and Path(found[1]) == expected, (found[1], expected)
    assert cut is None or f'{cut} is damaged or half-written and is skipped' in text


def kill_and_resume(folder: Path, config: Path, kills: int, seed: int) -> collections.Counter:
    """Runs both trainings and compares them; returns how many kills of each kind there were."""
    rng = random.Random(seed)
    peaceful = Training(config, folder / 'peaceful')
    peaceful.wait_for(lambda: peaceful.iterations() > 0)
    startup = time.monotonic() - peaceful.begun
    assert peaceful.process.wait() == 0, peaceful.text()[-3000:]
    print(f'uninterrupted: {time.monotonic() - peaceful.begun:.0f} s, {startup:.0f} s of them '
          'until the first iteration')

    work, done, parts = folder / 'killed', collections.Counter(), set()
    cut = None
    for i in range(kills + 1):
        expected = next((p for p in reversed(checkpoints(work)) if whole(p)), None)
        training = Training(config, work, '--resume')
        if i == kills:
            assert training.process.wait() == 0, training.text()[-3000:]
            check_resumed(training, expected, cut)
            break
        kind = KINDS[i] if i < len(KINDS) else rng.choice(KINDS)
        if not kill_once(kind, training, work, startup, rng):
            assert training.process.returncode in (0, -signal.SIGKILL), training.text()[-3000:]
            print('the training ended before all kills: raise --iters')
            break
        check_resumed(training, expected, cut)
        said = re.search(r'Load checkpoint from (\S+)', training.text())
        parts |= half_written(work)
        done[kind] += 1
        print(f'kill {i + 1:2} ({kind}) after {time.monotonic() - training.begun:4.1f} s, '
              f'{training.iterations()} iterations, resumed from '
              f'{Path(said[1]).name if said else "none"}', flush=True)
        cut = spoil(kind, work, rng) or (cut if cut and cut.exists() and not whole(cut) else None)
    names = [Path(p).name for p in work.glob('*.part')]
    assert not names, names
    print(f'{sum(done.values())} kills {dict(done)}; {len(parts)} left a half-written file under '
          'another name')
    compare(checkpoints(folder / 'peaceful')[-1], checkpoints(work)[-1])
    return done


def compare(one: Path, other: Path) -> None:
    """Asserts that two checkpoints hold the same weights, momentum and schedule, bit for bit."""
    one, other = load_from_local(str(one), 'cpu'), load_from_local(str(other), 'cpu')
    assert one['meta']['iter'] == other['meta']['iter']
    count = 0

    def same(a, b, name):
        nonlocal count
        assert type(a) is type(b), name
        if isinstance(a, dict):
            assert a.keys() == b.keys(), name
            for key in a:
                same(a[key], b[key], f'{name}.{key}')
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), name
            for i, pair in enumerate(zip(a, b, strict=True)):
                same(*pair, f'{name}.{i}')
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), f'{name} differs by {(a - b).abs().max()}'
            count += 1
        else:
            assert a == b, name

    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        same(one[part], other[part], part)
    print(f'iteration {one["meta"]["iter"]}: {count} tensors of weights and momentum are equal '
          'bit for bit, and so is the schedule')


def fill_disk(folder: Path, config: Path) -> None:
    """Trains into a file system of 230 MiB, which holds two checkpoints."""
    work = folder / 'full'
    work.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=230m', 'tmpfs', str(work)],
                          capture_output=True, text=True)
    if done.returncode:
        print(f'disk full: not tried, mounting is not allowed here ({done.stderr.strip()})')
        return
    training = Training(config, work)
    assert training.process.wait() != 0
    last = training.text().splitlines()[-1]
    kept = checkpoints(work)
    assert 'No space left on device' in last and '--resume' in last, last
    assert len(kept) == 2 and all(map(whole, kept)), kept
    print(f'disk full: {last}\n{", ".join(p.name for p in kept)} are whole')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='(%(default)s)')
    parser.add_argument('--iters', type=int, default=80, help='of the training (%(default)s)')
    parser.add_argument('--interval', type=int, default=2, help='of checkpoints (%(default)s)')
    parser.add_argument('--num-workers', type=int, default=0, help='that load data (%(default)s)')
    parser.add_argument('--dropout', action='store_true',
                        help="keep the config's dropout, with IterationSeedHook")
    parser.add_argument('--seed', type=int, default=0, help='of the moments (%(default)s)')
    parser.add_argument('--tmp', type=Path, help='where to make a folder for it all')
    parser.add_argument('--fill', type=Path, help=argparse.SUPPRESS)  # in its own mount namespace
    args = parser.parse_args()
    if args.fill:
        fill_disk(args.fill, args.fill / 'config.py')
        return
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        folder = Path(folder)
        config = write_config(folder, args.iters, args.interval, args.num_workers, args.dropout)
        kill_and_resume(folder, config, args.kills, args.seed)
        # A mount of its own namespace goes with the process.
        done = subprocess.run(['unshare', '-rm', sys.executable, __file__, '--fill', str(folder)],
                              env=dict(os.environ, PYTHONPATH=str(ROOT)))
        if done.returncode:
            sys.exit('the part that fills a disk failed, or unshare is not allowed here')


if __name__ == '__main__':
    main()
