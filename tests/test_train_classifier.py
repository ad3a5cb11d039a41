"""From street scenes to crops to a classifier to a segmentor's backbone, through the tools."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmseg_kn import KNResNet, KNResNetClassifier
from mmseg_kn.toy_cityscapes import generate

TOOLS = Path(__file__).parents[1] / 'tools'


def execute(*args, cwd, check=True):
    env = dict(os.environ, PYTHONPATH=str(TOOLS.parent), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    generate(root, train=3, val=2, size=(64, 128))
    return root


def cut(scenes, folder, *args):
    return execute(TOOLS / 'dataset_converters/street_crops.py', scenes, folder, '--size', 16,
                   '--per-class', 4, *args, cwd=scenes)


@pytest.fixture(scope='module')
def crops(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('crops') / 'set'
    assert 'train: 4 crops of each of' in cut(scenes, folder)
    return folder


def test_crops_show_the_class_at_their_centre(scenes, crops):
    for split, number in (('train', 4), ('val', 1)):
        labels = {p.name.split('_gtFine')[0]: cv2.imread(str(p), cv2.IMREAD_UNCHANGED)
                  for p in (scenes / 'gtFine' / split).rglob('*_labelTrainIds.png')}
        images = {p.name.split('_leftImg8bit')[0]: cv2.imread(str(p))
                  for p in (scenes / 'leftImg8bit' / split).rglob('*.png')}
        assert {len(list(d.iterdir())) for d in (crops / split).iterdir()} == {number}
        for name, index in (('road', 0), ('car', 13)):
            for path in (crops / split / name).iterdir():
                crop = cv2.imread(str(path))
                stem = path.stem.rpartition('_')[0]
                assert crop.shape == (16, 16, 3)
                found = (images[stem] == crop[8, 8]).all(2) & (labels[stem] == index)
                assert found.any()


def test_crops_are_reproducible_and_lose_nothing(scenes, crops, tmp_path):
    cut(scenes, tmp_path / 'again')
    first, second = ({p.relative_to(root): p.read_bytes() for p in root.rglob('*.png')}
                     for root in (crops, tmp_path / 'again'))
    assert first == second
    log = execute(TOOLS / 'dataset_converters/street_crops.py', scenes, crops, cwd=tmp_path,
                  check=False)
    assert f'{crops} is not empty' in log
    log = execute(TOOLS / 'dataset_converters/street_crops.py', tmp_path, tmp_path / 'new',
                  cwd=tmp_path, check=False)
    assert 'no *_gtFine_labelTrainIds.png in' in log.splitlines()[-1]


def train(folder, work, *args, **options):
    return execute(TOOLS / 'train_classifier.py', folder, '--low-resolution', '--epochs', 1,
                   '--seeds', 0, '--csv', work / 'results.csv', *args, cwd=work, **options)


def test_trains_all_and_repeats_nothing(crops, tmp_path):
    args = ('--batch-sizes', 40, '--crop-padding', 2, '--flip', '--clip-grad', 1)
    log = train(crops, tmp_path, *args)
    assert '| KNResNet-18 | 40 | 0.0625 | ' in log and '| ResNet-18, GN | 40 | 0.03125 | ' in log
    with open(tmp_path / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['norm'] for row in rows] == ['KN', 'BN', 'GN']
    assert all(0 <= float(row['accuracy']) <= 100 for row in rows)
    log = train(crops, tmp_path, *args)
    assert 'Epoch(train)' not in log and '| KNResNet-18 | 40 | ' in log

    # the checkpoint is one of the classifier, whose stem is not a segmentor's
    path = tmp_path / 'work_dirs/classifier/KN18_b40_s0/epoch_1.pth'
    weights = torch.load(path, weights_only=False)['state_dict']
    classes = len(list((crops / 'train').iterdir()))
    KNResNetClassifier(18, classes, low_resolution=True).load_state_dict(weights)
    net = KNResNet(18, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'))
    with pytest.raises(ValueError, match='1 of 32 weights .* of another shape, e.g. stem.weight'):
        net.init_weights()


def test_bad_data_is_one_clear_line(tmp_path):
    log = train(tmp_path / 'absent', tmp_path, check=False)
    assert 'no folder' in log.splitlines()[-1]
    (tmp_path / 'train' / 'car').mkdir(parents=True)
    log = train(tmp_path, tmp_path, check=False)
    assert 'no images *.png in the folders of classes in' in log.splitlines()[-1]
    assert not np.any([p.suffix == '.csv' for p in tmp_path.iterdir()])
