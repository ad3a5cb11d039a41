"""Runs the project's programs as a user does."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]


def execute(*args, cwd, check=True, path=()):
    """Runs a Python program with one thread, away from the checkout; returns what it printed.

    It can import from ``path``, folders, too.
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (ROOT, *path))),
               OMP_NUM_THREADS='1',
               PYTHONWARNINGS=','.join(f'error::DeprecationWarning:{name}' for name in (
                   # of the program itself, and of what it imports
                   '__main__', 'config_args', 'infer_onnx', 'pictures', 'segmentors', 'shared')))
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def load_tool(path):
    """Imports a tool as a module; as when it is run, its own folder comes first on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, 'path', [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module
