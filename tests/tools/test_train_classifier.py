"""From street scenes to crops to a classifier to a segmentor's backbone, through the tools."""
import csv
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from program import ROOT, execute, load_tool
from torch import nn
from toy_cityscapes import generate

from mmseg_kn import KNResNet, KNResNetClassifier

# isort: split
from mmseg.registry import MODELS

TOOLS = ROOT / 'tools/benchmarks'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    generate(root, train=3, val=2, size=(64, 128))
    return root


def cut(scenes, folder, *args):
    return execute(TOOLS / 'street_crops.py', scenes, folder, '--size', 16,
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
                stem = path.stem.partition('_')[2].rpartition('_')[0]  # city_STEM_number
                assert crop.shape == (16, 16, 3)
                found = (images[stem] == crop[8, 8]).all(2) & (labels[stem] == index)
                assert found.any()


def test_crops_are_reproducible_and_lose_nothing(scenes, crops, tmp_path):
    cut(scenes, tmp_path / 'again')
    first, second = ({p.relative_to(root): p.read_bytes() for p in root.rglob('*.png')}
                     for root in (crops, tmp_path / 'again'))
    assert first == second
    log = execute(TOOLS / 'street_crops.py', scenes, crops, cwd=tmp_path,
                  check=False)
    assert f'{crops} must be a new or an empty folder' in log
    log = execute(TOOLS / 'street_crops.py', tmp_path, tmp_path / 'new',
                  cwd=tmp_path, check=False)
    assert 'no *_gtFine_labelTrainIds.png in' in log.splitlines()[-1]


@pytest.fixture(scope='module')
def stripes(tmp_path_factory):
    """Two classes that anything which learns tells apart: level and upright stripes."""
    root = tmp_path_factory.mktemp('stripes')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('level', 'upright'):
            (root / split / name).mkdir(parents=True)
            for i in range(16):
                image = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                image[i % 2::4] += 160
                image = image if name == 'level' else image.transpose(1, 0, 2)
                cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    return root


def train(folder, work, *args, **options):
    return execute(TOOLS / 'train_classifier.py', folder, '--low-resolution', '--epochs', 2,
                   '--seeds', 0, '--csv', work / 'results' / 'all.csv', *args, cwd=work,
                   **options)


def read(work):
    with open(work / 'results' / 'all.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_learns_and_repeats_nothing(stripes, tmp_path):
    args = (stripes, tmp_path, '--batch-sizes', 4, '--lr', 0.01, '--clip-grad', 1)
    log = train(*args)
    rows = read(tmp_path)
    assert [row['norm'] for row in rows] == ['KN', 'BN', 'GN']
    # BatchNorm's running statistics need longer than these few steps
    assert all(float(row['accuracy']) > 75 for row in rows if row['norm'] != 'BN'), rows
    assert '| KNResNet-18 | 4 | 0.01 | ' in log and '| ResNet-18, GN | 4 | 0.01 | ' in log
    again = train(*args)
    assert 'Epoch(train)' not in again and '(kept)' in again and read(tmp_path) == rows
    # but another setting is another run
    assert 'Epoch(train) [2]' in train(*args, '--norms', 'GN', '--flip')
    assert 'Epoch(train) [2]' in train(*args, '--norms', 'GN', '--crop-padding', 1)

    # the checkpoint is one of the classifier, whose stem is not a segmentor's
    path, = (tmp_path / 'work_dirs/classifier').glob('KN18_b4_s0-*/epoch_2.pth')
    weights = CheckpointLoader.load_checkpoint(str(path))['state_dict']
    net = KNResNetClassifier(18, 2, low_resolution=True)
    before = net.state_dict()['backbone.layer4.0.conv.weight'].clone()
    net.load_state_dict(weights)
    assert not torch.equal(net.state_dict()['backbone.layer4.0.conv.weight'], before)
    net = KNResNet(18, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'))
    with pytest.raises(ValueError, match=r'its stem has a kernel of \(3, 3\)'):
        net.init_weights()


def test_private_training(stripes, tmp_path):
    pytest.importorskip('opacus')
    log = train(stripes, tmp_path, '--norms', 'KN', '--batch-sizes', 8, '--lr', 0.5, '--epochs', 1,
                '--activation', 'mish', '--private', 8, '--max-physical-batch-size', 4)
    assert 'differentially private training: noise multiplier' in log
    row, = read(tmp_path)
    assert (row['epsilon'], row['delta'], row['activation']) == ('8.0', '1e-05', 'mish')
    path, = (tmp_path / 'work_dirs/classifier').glob('KN18_b8_s0-*/iter_4.pth')
    checkpoint = CheckpointLoader.load_checkpoint(str(path))
    assert checkpoint['meta']['privacy']['steps'] == 4
    net = KNResNetClassifier(18, 2, low_resolution=True, activation='mish')
    net.load_state_dict(checkpoint['state_dict'])


def test_clipped_without_noise_and_without_normalization(stripes, tmp_path):
    pytest.importorskip('opacus')
    log = train(stripes, tmp_path, '--norms', 'none', '--batch-sizes', 8, '--lr', 0.5, '--epochs',
                1, '--private', 'inf')
    assert 'noise multiplier 0' in log
    row, = read(tmp_path)
    assert (row['epsilon'], row['norm']) == ('inf', 'none')


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / 'train_classifier.py')


@pytest.mark.parametrize(('norm', 'twin'), [
    ('KN', 'knr18'), ('BN', 'r18'), ('GN', 'r18-gn'), ('LN', 'r18-ln')])
def test_its_backbones_are_the_segmentors(tool, norm, twin):
    """mmengine would leave out weights that do not fit, and train the stem from scratch."""
    cfg = Config.fromfile(
        ROOT / f'configs/deeplabv3/deeplabv3_{twin}-d8_1xb2-400_camvid-160x160.py')
    args = SimpleNamespace(depth=18, low_resolution=False, zero_init_residual=True,
                           activation='relu')
    backbones = tool.build_backbone(norm, args), MODELS.build(cfg.model.backbone)
    given, needed = (b.state_dict() for b in backbones)
    assert {name: given[name].shape for name in needed} == {
        name: value.shape for name, value in needed.items()}
    given, needed = ([m.num_groups for m in b.modules() if isinstance(m, nn.GroupNorm)]
                     for b in backbones)
    assert given == needed


def test_digest_tells_data_apart(tool, stripes, tmp_path):
    def digest(folder):
        return tool.digest(tool.Images(*tool.find(folder / 'train', ['level', 'upright'])))

    copy = shutil.copytree(stripes, tmp_path / 'copy')
    assert digest(copy) == digest(stripes)
    (copy / 'train/level/0.png').unlink()
    assert digest(copy) != digest(stripes)
    image = np.zeros((2, 2, 3), np.uint8)
    assert tool.digest(tool.Images([image], [0])) != tool.digest(tool.Images([image + 1], [0]))


@pytest.mark.parametrize('args, message', [
    (('--private', '8', '--norms', 'KN'), '--private needs --lr and'),
    (('--norms', 'none', '--low-resolution'), 'the norm none need --lr'),
    (('--digits-size', '0'), 'digits size must be positive'),
    (('--private', '8', '--lr', '1'), '--private needs --lr and --norms without BN'),
    (('--private', '8', '--lr', '1', '--norms', 'KN', '--clip-grad', '1'), 'the place of'),
    (('--activation', 'mish'), '--activation needs --low-resolution'),
])
def test_arguments_that_exclude_each_other(tool, monkeypatch, capsys, args, message):
    monkeypatch.setattr('sys.argv', ['train_classifier.py', 'digits', *args])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert message in capsys.readouterr().err


def test_accuracy(tool):
    metric = tool.Accuracy()
    metric.process(None, [(1, 1), (0, 2)])
    metric.process(None, [(3, 3), (3, 3)])
    assert metric.compute_metrics(metric.results) == dict(top1=75)


def test_learning_rates_are_the_authors(tool):
    assert tool.initial_lr('KN', 32) == .05 and tool.initial_lr('BN', 32) == .025
    assert tool.initial_lr('KN', 2) == .0015625 and tool.initial_lr('BN', 2) == .00078125
    assert tool.initial_lr('LN', 32) == .0125 and tool.initial_lr('LN', 2) == .0015625
    assert tool.initial_lr('KN', 1) == .0015625 / 2 and tool.initial_lr('GN', 64) == .05


def test_images(tool):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    plain = tool.Images([image], [5])[0]
    assert plain['data_samples'] == 5
    assert torch.equal(plain['inputs'], torch.from_numpy(image).permute(2, 0, 1))
    np.random.seed(0)
    flipped = {tuple(tool.Images([image], [5], flip=True)[0]['inputs'].flatten().tolist())
               for _ in range(20)}
    assert flipped == {tuple(plain['inputs'].flatten().tolist()),
                       tuple(plain['inputs'].flip(2).flatten().tolist())}
    moved = [tool.Images([image], [5], crop_padding=2)[0]['inputs'] for _ in range(50)]
    assert all(m.shape == plain['inputs'].shape for m in moved)
    assert any((m[:, 0] == 0).all() for m in moved) and any((m[:, -1] == 0).all() for m in moved)
    mean, std = tool.moments(tool.Images([image], [5]))
    assert mean == pytest.approx(image.reshape(-1, 3).mean(0).tolist())
    assert std == pytest.approx(image.reshape(-1, 3).std(0, ddof=1).tolist())


def test_bad_input_is_one_clear_line(stripes, tmp_path):
    def last(*args):
        log = train(*args, check=False)
        assert 'Traceback' not in log
        return log.splitlines()[-1]

    assert 'no folder' in last(tmp_path / 'absent', tmp_path)
    (tmp_path / 'train' / 'car').mkdir(parents=True)
    assert 'no images *.png in the folders of classes in' in last(tmp_path, tmp_path)
    (tmp_path / 'val' / 'bus').mkdir(parents=True)
    assert "val has classes that" in last(tmp_path, tmp_path)
    assert 'must be positive' in last(stripes, tmp_path, '--batch-sizes', 0)
    assert 'need --lr' in last(stripes, tmp_path, '--depth', 50)
    log = execute(TOOLS / 'train_classifier.py', stripes, cwd=tmp_path, check=False)
    assert log.splitlines()[-1].endswith('which needs 93: --low-resolution')
    assert not (tmp_path / 'work_dirs').exists()
