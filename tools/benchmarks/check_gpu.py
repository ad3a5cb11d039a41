"""Everything that only a GPU can show: tests, speed against bars, and a short training.

Each command runs once and leaves its log and its CSV in --out; a later call runs what is missing,
so that the whole fits into pieces of a few minutes. At the end stands a verdict for each bar, and
OUT/gpu.md has it as a page. docs/gpu.md says how to read it.

    make gpu                    # all that has not run yet
    make gpu PART=layers        # one part: tests, sanitizer, layers, passes, steps or training
    python tools/benchmarks/check_gpu.py --rehearse --out rehearsal     # on a CPU, tiny
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_bars import judge, page
from norm_cells import curves
from shared import device_name, markdown, versions, write_csv

ROOT = Path(__file__).parents[2]
BENCHMARKS, DEEPLAB = ROOT / 'tools/benchmarks', ROOT / 'configs/deeplabv3'
KERNEL_TESTS = [ROOT / f'tests/ops/test_{name}.py' for name in (
    'reference', 'dropout', 'gradients', 'precision', 'shapes', 'triton_random', 'compile',
    'opcheck', 'dispatch')]
NETWORKS = {'18': ('knr18', 'r18'), '50': ('knr50', 'r50')}


class Command(NamedTuple):
    """One run, whose log, CSV and state are named after it."""

    part: str
    name: str
    argv: list


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', help='by default all')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), help='(%(default)s)')
    parser.add_argument('--minutes', type=float, default=8,
                        help='after which a command is stopped, to run again next time, and none '
                        'is begun (%(default)s)')
    parser.add_argument('--again', action='store_true', help='run what has run already as well')
    parser.add_argument('--data-root', default='data/camvid',
                        help='CamVid in Cityscapes layout; generated scenes are taken where there '
                        'is none (%(default)s)')
    parser.add_argument('--rehearse', action='store_true',
                        help='on a CPU, to see every piece run: kernels in the interpreter, tiny '
                        'sizes, figures that mean nothing')
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error('torch sees no GPU here (torch.cuda.is_available() is False); --rehearse '
                     'runs every piece on the CPU')
    args.commands = commands(args)
    known = list(dict.fromkeys(command.part for command in args.commands))
    if unknown := set(args.parts) - set(known):
        parser.error(f'the parts are {", ".join(known)}, got {", ".join(sorted(unknown))}')
    return args


def pytest(rehearse: bool, *which) -> list:
    several = ['-n', '8'] if find_spec('xdist') and not rehearse else []
    return ['-m', 'pytest', '-q', *several, *which]


def train(name: str, args: argparse.Namespace, data: Path) -> list:
    size, iterations = ((48, 64), 2) if args.rehearse else ((360, 360), 1600)
    batch = 2 if args.rehearse else 8
    options = [f'train_cfg.max_iters={iterations}', f'train_cfg.val_interval={iterations}',
               f'param_scheduler.0.end={iterations}', f'train_dataloader.batch_size={batch}',
               f'default_hooks.checkpoint.interval={max(1, iterations // 4)}',
               'train_dataloader.dataset.pipeline.2.scale=(480,360)',
               f'train_dataloader.dataset.pipeline.3.crop_size=({size[0]},{size[1]})',
               f'model.data_preprocessor.size=({size[0]},{size[1]})',
               'val_dataloader.dataset.pipeline.1.scale=(480,360)']
    if args.rehearse:
        options += ['train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
                    'train_dataloader.persistent_workers=False',
                    'val_dataloader.persistent_workers=False']
    suffix = '.png' if data.name == 'scenes' else '.jpg'
    for split in ('train', 'val', 'test'):
        options += [f'{split}_dataloader.dataset.data_root={data}',
                    f'{split}_dataloader.dataset.img_suffix=_leftImg8bit{suffix}']
    # mmengine's switch for mixed precision works on GPUs.
    amp = [] if args.rehearse else ['--amp']
    return [ROOT / 'tools/train.py', DEEPLAB / f'deeplabv3_{name}-d8_1xb2-400_camvid-160x160.py',
            '--work-dir', args.out / f'train-{name}', '--resume', *amp, '--cfg-options', *options]


def commands(args: argparse.Namespace) -> list[Command]:
    out, tiny = args.out.resolve(), args.rehearse
    args.out = out
    knconv = [BENCHMARKS / 'benchmark_knconv.py', '--skip', 'reference', 'unfused',
              '--batch-sizes', '1' if tiny else '2']
    if tiny:
        knconv += ['--rounds', '3', '--shapes', 'r50 stage3 conv2', '--channels-last']
    step = [BENCHMARKS / 'benchmark_train.py', '--channels-last', '--shape',
            *(['64', '64', '--rounds', '3'] if tiny else ['512', '1024', '--amp'])]

    def benchmark(part, name, *argv):
        return Command(part, name, [*argv, '--out', out / f'{name}.csv'])

    def pair(depth):
        if depth == '18':
            return [DEEPLAB / f'deeplabv3_{name}-d8_1xb2-400_camvid-160x160.py'
                    for name in NETWORKS['18']]
        return [DEEPLAB / f'deeplabv3_{name}-d8_4xb2-80k_cityscapes-512x1024.py'
                for name in NETWORKS[depth]]

    sanitizer = shutil.which('compute-sanitizer')
    data = Path(args.data_root).resolve()
    generated = [] if data.is_dir() else [Command('training', 'scenes', [
        ROOT / 'tools/toy_cityscapes', out / 'scenes', '--force', '--size', '360', '480',
        '--train', '4' if tiny else '367', '--val', '2' if tiny else '60'])]
    data = data if data.is_dir() else out / 'scenes'
    return [
        Command('tests', 'networks', pytest(tiny, '-m', 'gpu', ROOT / 'tests/gpu')),
        # On a CPU `make test` runs these in Triton's interpreter.
        Command('tests', 'kernels', pytest(
            tiny, *KERNEL_TESTS, '-k', 'ragged and triton' if tiny else
            'triton or deterministic or scaled or compile or opcheck or dispatch')),
        *([Command('sanitizer', 'sanitizer', [
            # Each tensor its own allocation, so that reads beyond its end are seen.
            'env', 'PYTORCH_NO_CUDA_MEMORY_CACHING=1', sanitizer, '--error-exitcode', '1',
            sys.executable, '-m', 'pytest', '-q', KERNEL_TESTS[0], '-k',
            'ragged or odd'])]
          if sanitizer else []),
        benchmark('layers', 'layers', *knconv, *([] if tiny else ['--amp'])),
        *([] if tiny else [benchmark('layers', 'layers-float32', *knconv, '--dtype', 'float32')]),
        benchmark('passes', 'passes', BENCHMARKS / 'benchmark_passes.py', *(
            ['--shapes', '20', '--size', '9', '10', '--rounds', '3', '--impl', 'triton']
            if tiny else [])),
        *(benchmark('steps', f'step{depth}{suffix}', *step, *flags, *pair(depth))
          for depth in (['18'] if tiny else NETWORKS)
          for suffix, flags in (('', []), ('-graphs', ['--graphs']))
          if not (tiny and flags)),
        *generated,
        *(Command('training', f'train-{name}', train(name, args, data))
          for name in NETWORKS['18']),
    ]


def run(command: Command, out: Path, seconds: float, rehearse: bool) -> dict | None:
    """Runs a command; its state, None where the time ran out."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))))
    for name in ('REHEARSE_GPU', 'TRITON_INTERPRET'):
        env.pop(name, None)
    if rehearse:
        # Tests of a GPU run on the CPU, which they never do otherwise; kernels are interpreted.
        env.update(REHEARSE_GPU='1', TRITON_INTERPRET='1')
    argv = list(map(str, command.argv))
    if not shutil.which(argv[0]) or argv[0].endswith('.py'):
        argv = [sys.executable, *argv]
    start = time.time()
    with open(out / f'{command.name}.log', 'w') as log:
        log.write(' '.join(argv) + '\n')
        log.flush()
        try:
            code = subprocess.run(argv, env=env, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return None
    state = dict(part=command.part, returncode=code, seconds=round(time.time() - start))
    (out / f'{command.name}.json').write_text(json.dumps(state))
    return state


def trained(out: Path) -> list[dict]:
    """The final mIoU of each short training."""
    rows = []
    for folder in sorted(out.glob('train-*/')):
        found = curves(folder)
        if found['miou']:
            rows.append(dict(network=folder.name.removeprefix('train-'),
                             iterations=found['miou'][-1][0], mIoU=found['miou'][-1][1],
                             seconds_an_iteration=found['iteration_seconds'],
                             gpu_mib=found['gpu_mib'], loss=found['loss'][-1][1]))
    return rows


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * args.minutes
    states = {}
    for command in args.commands:
        file = args.out / f'{command.name}.json'
        wanted = not args.parts or command.part in args.parts
        if file.exists() and not (args.again and wanted):
            states[command.name] = json.loads(file.read_text())
        elif wanted and time.time() < deadline - 10:
            print(f'{command.part}: {command.name} ...', flush=True)
            state = run(command, args.out, deadline - time.time(), args.rehearse)
            if state is None:
                print(f'    not done after {args.minutes:g} minutes: run it again')
            else:
                states[command.name] = state
                result = 'done' if not state['returncode'] else (
                    f'FAILED, see {args.out}/{command.name}.log')
                print(f'    {result} in {state["seconds"]} s', flush=True)
    rows = trained(args.out)
    if rows:
        write_csv(rows, args.out / 'training.csv')
    missing = [c.name for c in args.commands if c.name not in states]
    verdicts = judge(args.out, states)
    setting = dict(device=device_name(), **versions())
    (args.out / 'gpu.md').write_text(page(setting, verdicts, states, rows, args.rehearse,
                                          args.out))
    print(f'\n{markdown(verdicts)}\nwritten to {args.out}/gpu.md')
    if missing:
        print(f'not run yet: {", ".join(missing)}; the same command goes on')
    if any(v['verdict'] == 'missed' for v in verdicts) and not args.rehearse:
        sys.exit(1)


if __name__ == '__main__':
    main()
