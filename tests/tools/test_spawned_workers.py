"""Loaders whose workers are spawned, as they always are on Windows."""
from pathlib import Path

import mmseg
import pytest
from program import ROOT, execute
from short_training import CONFIG, SHORT
from toy_cityscapes import generate

MMSEG_TOOLS = Path(mmseg.__file__).parent / '.mim/tools'
# Only mmseg is imported here: nothing but a loader's own process can import mmseg_kn for it.
OWN = '''
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS, TRANSFORMS
from mmcv.transforms import BaseTransform


@TRANSFORMS.register_module()
class Passed(BaseTransform):
    def transform(self, results):
        return results


@DATASETS.register_module()
class Own(CityscapesDataset):
    pass
'''
SPAWNED = f'''
_base_ = '{CONFIG}'
custom_imports = dict(imports=['mmseg_kn', 'own_data'], allow_failed_imports=False)
env_cfg = dict(mp_cfg=dict(mp_start_method='spawn'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='Passed'), dict(type='PackSegInputs')]
kinds = [dict(type=kind, data_root='scenes', pipeline=pipeline,
              data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'))
         for kind in ('CityscapesDataset', 'Own', 'KNCityscapesDataset')]
train_dataloader = dict(num_workers=1, dataset=dict(
    _delete_=True, type='ConcatDataset', datasets=kinds))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(_delete_=True, **kinds[1]))
test_dataloader = dict(num_workers=1, dataset=dict(_delete_=True, **kinds[0]))
'''
OPTIONS = ['--cfg-options', *(o for o in SHORT if '_dataloader' not in o),
           'train_dataloader.batch_size=1', 'train_cfg.max_iters=3', 'train_cfg.val_interval=3',
           'default_hooks.checkpoint.interval=3']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('spawned')
    generate(folder / 'scenes', train=1, val=1, size=(64, 128))
    (folder / 'own_data.py').write_text(OWN)
    (folder / 'spawn.py').write_text(SPAWNED)
    return folder


def test_spawned_workers(folder):
    """Data sets of mmseg, of ours and of one's own; our script, and mmseg's."""
    log = execute(ROOT / 'tools/train.py', 'spawn.py', '--work-dir', 'work', *OPTIONS,
                  cwd=folder, path=[folder])
    assert 'Iter(train) [3/3]' in log and 'mIoU' in log
    log = execute(MMSEG_TOOLS / 'test.py', 'spawn.py', 'work/iter_3.pth', *OPTIONS, cwd=folder,
                  path=[folder])
    assert 'mIoU' in log
