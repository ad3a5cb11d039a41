"""Runs a script of the installed mmseg, so that its flags and behaviour stay mmseg's."""
import errno
import os
import re
import runpy
from pathlib import Path

import mmseg
import torch

FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def cannot_write(error: OSError) -> bool:
    """Whether a file or folder cannot be made or written, and nobody has said what to do."""
    if isinstance(error.__cause__, OSError):  # mmseg_kn.engine.safe_checkpoint_hook has
        return False
    denied = error.errno == errno.EACCES and not os.path.exists(error.filename or '.')
    return denied or error.errno in FULL_OR_READ_ONLY


def run(name: str) -> None:
    """Runs mmseg's ``tools/<name>`` as the main program, with this process's arguments.

    Raises:
        FileNotFoundError: The installed mmseg carries no such script.
        SystemExit: The work directory cannot be written, or mmpretrain is missing.
    """
    package = Path(mmseg.__file__).parent
    # A wheel keeps the tools in .mim, a source checkout beside the package.
    candidates = [package / '.mim' / 'tools' / name, package.parent / 'tools' / name]
    for script in candidates:
        if script.is_file():
            try:
                runpy.run_path(str(script), run_name='__main__')
            except (KeyError, RuntimeError) as error:
                # Where mmpretrain cannot be imported, mmengine looks for its classes elsewhere.
                if not re.search('ImageClassifier is not in|torchvision::', str(error)):
                    raise
                raise SystemExit(
                    'image classifiers need mmpretrain, pip install "mmseg_kn[mmpretrain]", and '
                    f'the torchvision that fits torch {torch.__version__}: docs/pretraining.md '
                    f'({str(error.args[0]).split(". ")[0]})') from None
            except OSError as error:
                if not cannot_write(error):
                    raise
                raise SystemExit(
                    f'the work directory must be writable and have room, got {error}; make room '
                    'or name another with --work-dir. Checkpoints written before are whole: '
                    '--resume goes on from them') from None
            return
    raise FileNotFoundError(f'mmseg {mmseg.__version__} in {package} carries no tools/{name}; '
                            'reinstall mmsegmentation from its wheel')
