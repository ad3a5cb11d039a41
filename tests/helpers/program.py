"""Runs the project's programs as a user does."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def execute(*args, cwd, check=True, path=()):
    """Runs a Python program with one thread, away from the checkout; returns what it printed.

    It can import from ``path``, folders, too.
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (ROOT, *path))),
               OMP_NUM_THREADS='1',
               PYTHONWARNINGS=','.join(f'error::DeprecationWarning:{name}' for name in (
                   '__main__', 'infer_onnx')))  # of the program itself, and of what it imports
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout
