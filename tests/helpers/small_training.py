"""Trainings of one iteration on generated scenes, and the tool that checks their files."""
import itertools
import runpy
import sys
from unittest import mock

import cv2
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from program import ROOT

CONFIG = ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'
TOOL = ROOT / 'tools/misc/check_dataset.py'
NUMBER = itertools.count()


def files(root):
    """The second training image, and its label."""
    image = sorted(root.glob('leftImg8bit/train/*/*.png'))[1]
    name = image.name.replace('leftImg8bit', 'gtFine_labelTrainIds')
    return image, root / 'gtFine/train' / image.parent.name / name


def config(root, **options):
    cfg = Config.fromfile(CONFIG)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
    cfg.train_dataloader.batch_size = 1
    cfg.model.data_preprocessor.size = (64, 128)
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = 1
    cfg.default_hooks.checkpoint.interval = 1
    cfg.work_dir = str(root / 'work')
    cfg.experiment_name = f'bad_data_{next(NUMBER)}'
    cfg.merge_from_dict(options)
    return cfg


def train(root, **options):
    """Starts a training of one iteration in this process."""
    runner = Runner.from_cfg(config(root, **options))
    runner.train()
    return runner


def tool(root, capsys, *args, options=None, split='train', config=CONFIG):
    """Runs the tool in this process; returns its exit code and what it printed."""
    roots = [f'{s}_dataloader.dataset.data_root={root}' for s in ('train', 'val', 'test')]
    argv = [TOOL, config, '--split', split, '--workers', 1, *args, '--cfg-options',
            *(options or []), *(roots if config == CONFIG else ['randomness.seed=0'])]
    with mock.patch.object(sys, 'argv', list(map(str, argv))), pytest.raises(SystemExit) as done:
        runpy.run_path(str(TOOL), run_name='__main__')
    return done.value.code, capsys.readouterr().out


def rewrite(change, of_label=False):
    """A fault that changes the pixels of the image, or of its label."""
    def fault(root):
        path = files(root)[of_label]
        assert cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
        return path
    return fault
