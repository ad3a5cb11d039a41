"""The wheel: what it holds, and training from it where there is no clone."""
import os
import subprocess
import sys
import venv
import zipfile

import pytest
from program import ROOT
from short_training import CONFIG, SHORT
from toy_cityscapes import generate
from wheels import build_wheel, copy_sources, wheel_faults

# As docs/getting_started.md has them: what finds the configs, and how a config names one as base.
FIND = 'export MIM=$(python -c "import mmseg_kn; print(mmseg_kn.__path__[0])")/.mim'
BASE = "_base_ = '{{$MIM:.}}/configs/"
CONFIG_NAME = CONFIG.relative_to(ROOT / 'configs').as_posix()
# --help of every tool that has one, each beside its own folder as Python runs it.
HELP = """
import runpy, sys
path = list(sys.path[1:])
for tool in sys.argv[1:]:
    sys.argv, sys.path[:] = [tool, '--help'], [tool.rpartition('/')[0], *path]
    try:
        runpy.run_path(tool, run_name='__main__')
    except SystemExit as end:
        assert end.code == 0, tool
    else:
        raise AssertionError(f'{tool} has no --help')
"""


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp('copy') / 'sources')


@pytest.fixture(scope='module')
def wheel(sources, tmp_path_factory):
    return build_wheel(sources, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def shell(wheel, tmp_path_factory):
    """Runs Bash in a virtual environment that holds the wheel, and not the clone.

    The rest of the stack is found where it is installed. A path in a .pth file does not activate
    the .pth files that lie there, so that the clone's editable install is out of reach.
    """
    home = tmp_path_factory.mktemp('venv')
    venv.create(home, symlinks=os.name != 'nt', with_pip=False)
    site, = home.glob('lib/python*/site-packages')
    subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', wheel,
                    '--quiet', '--no-index', '--no-deps', '--target', site], check=True)
    stack = [path for path in sys.path if path.endswith('-packages')]
    (site / 'stack.pth').write_text('\n'.join(stack))
    env = {name: value for name, value in os.environ.items()
           if name not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'MIM')}
    env.update(PATH=f'{home}/bin{os.pathsep}{env["PATH"]}', OMP_NUM_THREADS='1')

    def run(command, cwd):
        done = subprocess.run(['bash', '-c', command], cwd=cwd, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    env['MIM'] = run(f'{FIND} && echo $MIM', cwd=home).splitlines()[-1]
    assert env['MIM'] == f'{site}/mmseg_kn/.mim'
    return run


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    """Two iterations, without validation, on generated scenes."""
    scenes = tmp_path_factory.mktemp('scenes')
    generate(scenes, train=2, val=1, size=(64, 128))
    settings = [*SHORT, 'train_cfg.max_iters=2',
                *(f'{split}_dataloader.dataset.data_root={scenes}'
                  for split in ('train', 'val', 'test'))]
    return '--cfg-options ' + ' '.join(f"'{setting}'" for setting in settings)


def test_it_holds_what_it_should(wheel):
    assert wheel_faults(wheel) == []


def test_missing_and_unwanted_files_are_found(wheel, tmp_path):
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, 'w') as new:
        for name in old.namelist():
            if name not in ('mmseg_kn/py.typed', f'mmseg_kn/.mim/configs/{CONFIG_NAME}'):
                new.writestr(name, old.read(name))
        new.writestr('mmseg_kn/.mim/tools/toy_cityscapes/__init__.py', '')
    assert wheel_faults(changed) == [
        f'lacks mmseg_kn/.mim/configs/{CONFIG_NAME}', 'lacks mmseg_kn/py.typed',
        'must not hold mmseg_kn/.mim/tools/toy_cityscapes/__init__.py']


def test_what_an_earlier_build_left_behind_stays_out(sources, wheel, tmp_path):
    stale = sources / 'build/lib/mmseg_kn/toy_cityscapes.py'
    assert stale.parent.is_dir()
    stale.touch()
    assert wheel_faults(build_wheel(sources, tmp_path)) == []
    assert not (sources / 'mmseg_kn/.mim').exists()


def test_the_source_archive_builds_the_same_wheel(sources, wheel, tmp_path):
    build = 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
    subprocess.run([sys.executable, '-c', build, tmp_path], cwd=sources, check=True,
                   stdout=subprocess.DEVNULL)
    archive, = tmp_path.glob('mmseg_kn-*.tar.gz')
    again = build_wheel(archive, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist()} == {
            i.filename: i.CRC for i in second.infolist()}


def test_an_editable_install_writes_nothing_into_the_clone(sources, tmp_path):
    build = 'import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])'
    subprocess.run([sys.executable, '-c', build, tmp_path], cwd=sources, check=True,
                   stdout=subprocess.DEVNULL)
    assert list(tmp_path.glob('*.whl'))
    assert not (sources / 'mmseg_kn/.mim').exists()


def test_getting_started_says_how():
    page = (ROOT / 'docs/getting_started.md').read_text()
    assert FIND in page and BASE in page


def test_training_from_a_config_of_the_wheel(shell, options, tmp_path):
    log = shell(f'python $MIM/tools/train.py $MIM/configs/{CONFIG_NAME} {options}', cwd=tmp_path)
    assert 'Iter(train) [2/2]' in log
    assert list(tmp_path.glob('work_dirs/*/iter_2.pth'))


def test_training_from_a_config_of_ones_own(shell, options, tmp_path):
    (tmp_path / 'my_config.py').write_text(
        f"{BASE}{CONFIG_NAME}'\nmodel = dict(backbone=dict(dropout_p=0.125))\n")
    log = shell(f'python $MIM/tools/train.py my_config.py {options}', cwd=tmp_path)
    assert 'Iter(train) [2/2]' in log
    used = (tmp_path / 'work_dirs/my_config/my_config.py').read_text()
    assert 'dropout_p=0.125' in used and "type='KNResNet'" in used


def test_a_config_of_mmseg_is_converted(shell, tmp_path):
    """From configs/kernelized of the wheel, over the configs that mmseg's own wheel carries."""
    build = """
import sys, torch
from mmengine.config import Config
import mmseg_kn
from mmengine.registry import MODELS, DefaultScope
cfg = Config.fromfile(sys.argv[1])
with torch.device('meta'), DefaultScope.overwrite_default_scope('mmseg'):
    print(mmseg_kn.conversion_table(MODELS.build(cfg.model)))
"""
    (tmp_path / 'build.py').write_text(build)
    config = '$MIM/configs/kernelized/stdc1-kn_4xb12-80k_cityscapes-512x1024.py'
    table = shell(f'python build.py {config}', cwd=tmp_path)
    assert table.count('became') == 1 and table.count('KNConv2d ') == 41


def test_every_tool_runs_where_it_lies(shell, tmp_path):
    (tmp_path / 'show_help.py').write_text(HELP)
    find = 'grep -rl "^if __name__" --include=*.py $MIM/tools'
    shown = shell(f'test -x $MIM/tools/dist_train.sh && python show_help.py $({find})',
                  cwd=tmp_path)
    assert shown.count('usage: ') > 10
