"""Runs a script of the installed mmseg, so that its flags and behaviour stay mmseg's."""
import runpy
from pathlib import Path

import mmseg


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
            runpy.run_path(str(script), run_name='__main__')
            return
    raise FileNotFoundError(f'mmseg {mmseg.__version__} in {package} carries no tools/{name}; '
                            'reinstall mmsegmentation from its wheel')
