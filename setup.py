"""Adds configs and tools to the wheel; everything else is in setup.cfg and pyproject.toml."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs, tools and model-index.yml to mmseg_kn/.mim, as OpenMMLab's packages do.

    An editable install has no such folder: the clone holds them, and nothing is written there.
    """

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        package = Path(self.build_lib, 'mmseg_kn')
        # An earlier build may have left files here that are gone from the sources.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        # The renderer of scenes and the developers' scripts are no part of the package.
        for folder, left_out in (('configs', ()), ('tools', ('toy_cityscapes', 'dev'))):
            shutil.copytree(folder, package / '.mim' / folder,
                            ignore=shutil.ignore_patterns('__pycache__', *left_out))
        shutil.copy('model-index.yml', package / '.mim')


setup(cmdclass=dict(build_py=BuildWithConfigs))
