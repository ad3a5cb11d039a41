"""From generated scenes to mIoU through the tools, as a user runs them, on any stack."""
import subprocess
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
from program import ROOT, execute
from short_training import CONFIG, SHORT
from toy_cityscapes import generate

MMSEG_TOOLS = Path(mmseg.__file__).parent / '.mim/tools'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    generate(root, train=4, val=4, size=(64, 128))
    return root


@pytest.fixture(scope='module')
def options(scenes):
    roots = [f'{split}_dataloader.dataset.data_root={scenes}'
             for split in ('train', 'val', 'test')]
    return ['--cfg-options', *SHORT, *roots]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, options):
    """A folder in which tools/train.py ran two iterations, and then resumed to the fourth."""
    work = tmp_path_factory.mktemp('work')
    execute(ROOT / 'tools/train.py', CONFIG, '--work-dir', work, *options,
            'train_cfg.max_iters=2', cwd=work)
    assert (work / 'last_checkpoint').read_text().endswith('iter_2.pth')
    log = execute(ROOT / 'tools/train.py', CONFIG, '--work-dir', work, '--resume', *options,
                  cwd=work)
    assert 'resumed' in log.lower() and 'Iter(train) [3/4]' in log
    assert 'Iter(train) [1/4]' not in log
    return work


def test_train_resume_and_validate(trained):
    scalars = [f.read_text() for f in trained.glob('*/vis_data/scalars.json')]
    assert any('"mIoU"' in text for text in scalars)
    assert all('"stem_signal"' in text for text in scalars)
    assert (trained / 'iter_4.pth').is_file()


@pytest.mark.parametrize('tta', [False, True])
def test_test(trained, options, tmp_path, tta):
    log = execute(ROOT / 'tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path,
                  *['--tta'] * tta, *options, cwd=tmp_path)
    assert 'mIoU' in log and 'motorcycle' in log


def test_mmsegs_own_scripts_work_unmodified(trained, options, tmp_path):
    execute(MMSEG_TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path, *options,
            'train_cfg.max_iters=2', 'train_cfg.val_interval=2', cwd=tmp_path)
    log = execute(MMSEG_TOOLS / 'test.py', CONFIG, tmp_path / 'iter_2.pth', *options,
                  cwd=tmp_path)
    assert 'mIoU' in log


def test_a_damaged_checkpoint_is_one_clear_line(trained, options, tmp_path):
    damaged = tmp_path / 'iter_4.pth'
    damaged.write_bytes((trained / 'iter_4.pth').read_bytes()[:-1000])
    log = execute(ROOT / 'tools/test.py', CONFIG, damaged, *options, cwd=tmp_path, check=False)
    assert f'ValueError: {damaged} is damaged or not a checkpoint' in log.splitlines()[-1]


def test_a_missing_data_folder_is_one_clear_line(options, tmp_path):
    log = execute(ROOT / 'tools/train.py', CONFIG, '--work-dir', tmp_path, *options,
                  'train_dataloader.dataset.data_root=nowhere', cwd=tmp_path, check=False)
    assert 'no image folder nowhere' in log.splitlines()[-1]


def test_without_mmpretrain_its_configs_are_one_clear_line(tmp_path):
    config = ROOT / 'configs/classification/knresnet18_1xb2_cifar100.py'
    # Hides an installed one.
    absent = "raise ModuleNotFoundError(\"No module named 'mmpretrain'\", name='mmpretrain')\n"
    (tmp_path / 'mmpretrain.py').write_text(absent)
    log = execute(ROOT / 'tools/train.py', config, '--work-dir', tmp_path, cwd=tmp_path,
                  check=False, path=[tmp_path])
    assert 'image classifiers need mmpretrain, pip install' in log.splitlines()[-1]
    assert 'Traceback' not in log


def test_compare_predictions(trained, options, tmp_path):
    out = tmp_path / 'scenes.png'
    execute(ROOT / 'tools/analysis_tools/compare_predictions.py', CONFIG, trained / 'iter_4.pth',
            '--out', out, '--device', 'cpu', *options, cwd=tmp_path)
    picture = cv2.imread(str(out))
    assert picture.shape[1] > 1000 and len(np.unique(picture)) > 100


def test_inferencer(trained, scenes):
    from mmseg.apis import MMSegInferencer
    image = next((scenes / 'leftImg8bit/val').rglob('*.png'))
    inferencer = MMSegInferencer(str(CONFIG), str(trained / 'iter_4.pth'), device='cpu')
    prediction = inferencer(str(image), show=False)['predictions']
    assert prediction.shape == (64, 128) and set(np.unique(prediction)) <= set(range(19))
    assert np.array_equal(prediction, inferencer(str(image), show=False)['predictions'])


def test_scene_tool(tmp_path):
    log = execute(ROOT / 'tools/toy_cityscapes', tmp_path / 'set',
                  '--train', 1, '--val', 1, '--size', 64, 96, cwd=tmp_path)
    assert 'motorcycle' in log
    assert len(list(tmp_path.rglob('*_labelTrainIds.png'))) == 2


def test_dist_scripts_say_how_to_call_them(tmp_path):
    for script in ('dist_train.sh', 'dist_test.sh'):
        done = subprocess.run(['bash', str(ROOT / 'tools' / script)], text=True, cwd=tmp_path,
                              stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
        assert done.returncode == 2 and f'Usage: tools/{script} CONFIG' in done.stdout
