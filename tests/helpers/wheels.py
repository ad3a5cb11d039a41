"""Builds the wheel as pip does, and says what is wrong with what it holds."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from program import ROOT


def copy_sources(target: Path) -> Path:
    """Copies what the wheel is built from, as building leaves folders in the sources."""
    target.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    for folder in ('configs', 'mmseg_kn', 'tests', 'tools'):
        shutil.copytree(ROOT / folder, target / folder,
                        ignore=shutil.ignore_patterns('__pycache__'))
    return target


def build_wheel(source: Path, folder: Path) -> Path:
    """Runs ``pip wheel`` without network; the environment must hold setuptools."""
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', source,
               '--no-index', '--no-deps', '--no-build-isolation', '--wheel-dir', folder]
    done = subprocess.run([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f'pip wheel failed:\n{done.stdout[-4000:]}')
    wheel, = folder.glob('mmseg_kn-*.whl')
    return wheel


def files_below(root: Path, *folders: str) -> set[str]:
    """Names of files in these folders of ``root``, relative to it."""
    return {path.relative_to(root).as_posix() for folder in folders
            for path in (root / folder).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


def wheel_faults(wheel: Path, root: Path = ROOT) -> list[str]:
    """How the files in ``wheel`` differ from those of the checkout ``root`` that belong there."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if '.dist-info/' not in name}
    left_out = files_below(root, 'tools/toy_cityscapes', 'tools/dev')
    wanted = {name for name in files_below(root, 'mmseg_kn') if name.endswith('.py')}
    wanted.add('mmseg_kn/py.typed')
    wanted |= {f'mmseg_kn/.mim/{name}' for name in
               files_below(root, 'configs', 'tools') - left_out | {'model-index.yml'}}
    return [f'lacks {name}' for name in sorted(wanted - found)] + [
        f'must not hold {name}' for name in sorted(found - wanted)]
