"""Runs tests in environments of several Pythons, stacks and torches; writes a Markdown table.

    python tools/dev/compat_matrix.py --pythons python3.10 python3.13 --stacks lite onedl

One row a combination, its versions read from the environment. What cannot be installed gets a
row that says so. Environments are removed after their row unless --envs names a folder, where they
are made once. Stack `mmcv` compiles mmcv, which takes many minutes.
"""
import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ['tests/test_stack.py', 'tests/checkpoints/test_safe_load.py',
         'tests/models/test_layers.py', 'tests/models/test_knresnet.py',
         'tests/tools/test_tools.py', *(f'tests/ops/test_{name}.py' for name in (
             'reference', 'dropout', 'gradients', 'precision', 'shapes', 'dispatch'))]
STACKS = dict(lite=('mmsegmentation', 'mmengine', 'mmcv-lite'),
              mmcv=('mmsegmentation', 'mmengine', 'mmcv'),
              onedl=('onedl-mmsegmentation', 'onedl-mmengine', 'onedl-mmcv'))
HEADER = '| Python | torch | stack | compiled ops | tests | result | date |'
# Run inside of the environment: versions, and whether mmcv has its compiled ops.
PROBE = '''
import json, platform, sys
from importlib import metadata, util
names = ['torch', *sys.argv[1:]]
print(json.dumps(dict({n: metadata.version(n) for n in names}, python=platform.python_version(),
                      ops=util.find_spec('mmcv') and util.find_spec('mmcv._ext') is not None)))
'''


def call(command: list, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=dict(os.environ, **env))


def make(python: str, stack: str, torch: str, folder: Path) -> tuple[Path, str]:
    """An environment's interpreter, and why it could not be made, or ''."""
    interpreter = folder / 'bin/python'
    if (folder / 'made').exists():
        return interpreter, ''
    pip = [interpreter, '-m', 'pip', 'install', '--quiet']
    steps = [[python, '-m', 'venv', '--clear', folder], [*pip, '--upgrade', 'pip'],
             [*pip, torch]]
    if stack == 'mmcv':
        steps += [[*pip, 'setuptools<81', 'wheel', 'ninja'],
                  [*pip, '--no-build-isolation', 'mmcv==2.1.0']]
    steps += [[*pip, '-e', f'{ROOT}[{stack},test]']]
    for step in steps:
        done = call(step, MMCV_WITH_OPS=str(int(stack == 'mmcv')))
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if 'rror' in line] or ['failed']
            return interpreter, lines[-1].strip().replace('|', '/')[:100]
    (folder / 'made').touch()
    return interpreter, ''


def row(python: str, stack: str, torch: str, folder: Path, tests: list[str]) -> list[str]:
    """The cells of a combination."""
    date = datetime.date.today().isoformat()
    interpreter, error = make(python, stack, torch, folder)
    if error:
        return [Path(python).name, torch, stack, '', '', f'not installed: {error}', date]
    found = json.loads(call([interpreter, '-c', PROBE, *STACKS[stack]]).stdout.splitlines()[-1])
    done = call([interpreter, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests],
                OMP_NUM_THREADS='1')
    summary = re.findall(r'^=*\s*(\d+ .*?) in [\d.]+s', done.stdout, re.M) or ['no summary']
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return [found['python'], found['torch'],
            ', '.join(f'{name} {found[name]}' for name in STACKS[stack]),
            'yes' if found['ops'] else 'no',
            ' '.join(name for name in dict.fromkeys(
                Path(test).stem.removeprefix('test_') for test in tests)),
            f'{"passed" if done.returncode == 0 else "FAILED"}: {summary[-1]}', date]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pythons', nargs='+', metavar='PYTHON',
                        default=[f'python3.{minor}' for minor in range(10, 14)],
                        help='interpreters; those that are not found are named (3.10 to 3.13)')
    parser.add_argument('--stacks', nargs='+', choices=STACKS, default=['lite', 'onedl'],
                        help='extras of this package (lite onedl)')
    parser.add_argument('--torches', nargs='+', metavar='SPEC', default=['torch==2.13.0'],
                        help='as pip takes them (%(default)s)')
    parser.add_argument('--tests', nargs='+', default=TESTS, help='(the quick ones of each part)')
    parser.add_argument('--envs', type=Path, help='keep the environments in this folder')
    parser.add_argument('--out', type=Path, default=Path('compat_matrix.md'),
                        help='(%(default)s)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        envs = (args.envs or Path(temporary)).resolve()
        for python, stack, torch in itertools.product(args.pythons, args.stacks, args.torches):
            # pyenv's shims are found and then fail where another version is active.
            if shutil.which(python) is None or call([python, '--version']).returncode:
                print(f'{python}: not found', flush=True)
                continue
            name = re.sub(r'[^\w.]+', '_', f'{Path(python).name}-{stack}-{torch}')
            rows.append(row(python, stack, torch, envs / name, args.tests))
            if args.envs is None:
                shutil.rmtree(envs / name, ignore_errors=True)
            print(' | '.join(rows[-1]), flush=True)
            lines = [HEADER, '|---' * HEADER.count(' | ') + '|---|',
                     *(f'| {" | ".join(cells)} |' for cells in rows)]
            args.out.write_text('\n'.join(lines) + '\n')
    if not rows:
        raise SystemExit(f'no interpreter of {", ".join(args.pythons)} was found')
    sys.exit(any('passed' not in cells[5] for cells in rows))


if __name__ == '__main__':
    main()
