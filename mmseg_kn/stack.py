"""Checks the installed OpenMMLab stack, and lets mmseg import where it would not by itself.

Two stacks are supported: the official one (mmsegmentation 1.2.2, mmengine 0.10.7, mmcv or
mmcv-lite 2.1.0) and the maintained fork (onedl-mmsegmentation 1.4, the same import names).
"""
import importlib
import multiprocessing
import sys
import types
from importlib.util import find_spec

_INSTALL = 'pip install "mmseg_kn[lite]" (no compiled ops), "mmseg_kn[mmcv]" or "mmseg_kn[onedl]"'


def setup() -> None:
    """Checks the stack, and lets mmseg import beside mmcv-lite, which has no compiled ops.

    Called when mmseg_kn is imported, and so in every process that is spawned afterwards; calling
    it again changes nothing.

    Raises:
        ImportError: A package is missing, or is of a version that does not fit.
    """
    version = _import_stack()
    if version < (1, 3):  # the official mmsegmentation ended at 1.2.2
        _check_undeclared()
        _import_ops()
    # A spawned process, such as a loader's worker on Windows, imports the program's main script
    # and then what its arguments are made of. This mark, which Python hands down before the
    # arguments, lets it import mmseg_kn first, whoever's the script and the data set are.
    multiprocessing.current_process()._config['mmseg_kn'] = setup


def _import_stack():
    """Imports mmengine, mmcv and mmseg, or says in one line what to install.

    Returns mmseg's (major, minor). mmseg 1.2.2 checks mmcv's version in a bare assert.
    """
    for name in ('mmengine', 'mmcv', 'mmseg'):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f'mmseg_kn needs {name}, which is missing: {_INSTALL}') from None
        except AssertionError:
            found = ' and '.join(f'{n} {sys.modules[n].__version__}' for n in ('mmcv', 'mmengine'))
            raise ImportError(
                f'the installed {name} refuses {found}; mmsegmentation 1.2.2 needs '
                f'mmcv >= 2.0, < 2.2 and mmengine < 1.0: {_INSTALL}'
            ) from None
    return tuple(int(part) for part in module.__version__.split('.')[:2])


def _check_undeclared():
    """mmsegmentation 1.2.2 imports ftfy and regex in mmseg.models and does not declare them."""
    for name in ('ftfy', 'regex'):
        if find_spec(name) is None:
            raise ImportError(
                f'mmsegmentation 1.2.2 needs {name}, which is missing: pip install {name}, '
                f'or everything at once: {_INSTALL}'
            )


def _import_ops():
    """Imports mmcv.ops although mmcv-lite has no compiled `mmcv._ext`.

    mmseg 1.2.2 imports mmcv.ops unconditionally (san_head.py, focal_loss.py). The stand-in
    leaves sys.modules at once: mmengine's mmcv_full_available() looks there and must say no.
    """
    if find_spec('mmcv._ext') is not None:
        return
    extension = types.ModuleType('mmcv._ext')
    extension.__getattr__ = _missing_op
    # Called by mmcv.utils.collect_env, whose own word for "not compiled" this is.
    extension.get_compiler_version = extension.get_compiling_cuda_version = lambda: 'n/a'
    sys.modules['mmcv._ext'] = extension
    try:
        importlib.import_module('mmcv.ops')
    finally:
        del sys.modules['mmcv._ext']


def _missing_op(name):
    """Stands for any function of the compiled extension; raises when it is called."""
    if name.startswith('__'):
        raise AttributeError(name)

    def op(*args, **kwargs):
        raise RuntimeError(
            f'the op {name!r} of mmcv.ops is compiled code, which mmcv-lite lacks. Install the '
            'compiled mmcv in its place, extra "mmseg_kn[mmcv]": see "Choosing a stack" in the '
            'README'
        )

    return op
