"""Runs a script of the installed mmseg, so that its flags and behaviour stay mmseg's."""
import re
import runpy
from pathlib import Path

import mmseg
import torch


def run(name: str) -> None:
    """Runs mmseg's ``tools/<name>`` as the main program, with this process's arguments.

    Raises:
        FileNotFoundError: The installed mmseg carries no such script.
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
            return
    raise FileNotFoundError(f'mmseg {mmseg.__version__} in {package} carries no tools/{name}; '
                            'reinstall mmsegmentation from its wheel')
