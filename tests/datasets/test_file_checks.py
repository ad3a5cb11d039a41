"""Wrong images, labels, classes and checkpoints: one message, with file and remedy, at the start.

Each fault is made in generated scenes, and must be told by tools/misc/check_dataset.py and by the
start of a training.
"""
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image
from program import ROOT, execute
from short_training import SHORT
from small_training import CONFIG, TOOL, config, files, rewrite, tool, train
from toy_cityscapes import generate

from mmseg_kn.datasets.file_checks import rules_of
from mmseg_kn.datasets.headers import decode, read_header


@pytest.fixture
def scenes(tmp_path):
    generate(tmp_path / 'scenes', train=2, val=1, size=(64, 128))
    return tmp_path / 'scenes'


def label_ids(root):
    """All labels as Cityscapes is downloaded: 34 ids."""
    for path in root.rglob('*_labelTrainIds.png'):
        path.write_bytes(Path(str(path).replace('TrainIds', 'Ids')).read_bytes())
    return sorted(root.glob('gtFine/train/*/*TrainIds.png'))[0]


def cut(of_label):
    def fault(root):
        path = files(root)[of_label]
        path.write_bytes(path.read_bytes()[:-20])
        return path
    return fault


def emptied(root):
    files(root)[1].write_bytes(b'')
    return files(root)[1]


def missing(root):
    files(root)[1].unlink()
    return files(root)[1]


FAULTS = {
    'label ids': (label_ids, r'labels must be one of 19 classes, 0 to 18, or ignored, got .*23.*'
                             r'labelIds: .*cityscapes\.py makes'),
    'value': (rewrite(lambda label: np.where(label == 0, 200, label), True),
              r'got 200 in \d+\.\d% of its pixels; renumber them, or name every class'),
    'size': (rewrite(lambda label: label[:, 4:], True),
             r'the size of its image, got 64 x 124 and 64 x 128 .*make it again'),
    'colours': (rewrite(lambda label: cv2.merge([label] * 3), True),
                'labels of one channel are needed.*got 3 channels.*convert colours to indices'),
    '16-bit label': (rewrite(lambda label: label.astype(np.uint16), True),
                     'labels of 8 bits are needed, got 16 bits; convert it'),
    '16-bit image': (rewrite(lambda image: image.astype(np.uint16) * 257),
                     'images of 8 bits a channel are needed, got 16 bits.*convert it'),
    '4 channels': (rewrite(lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)),
                   'images of 3 channels are needed, got 4 channels; convert it to RGB'),
    'grey': (rewrite(lambda image: image[..., 0]),
             'images of 3 channels are needed, got a grey image; convert it to RGB'),
    'cut image': (cut(False), 'is cut off.*copy or convert it again'),
    'cut label': (cut(True), 'is cut off.*copy or convert it again'),
    'empty label': (emptied, 'is empty; copy or convert it again'),
    'missing label': (missing, None),
}


@pytest.mark.parametrize('case', FAULTS)
def test_a_bad_file_is_named_by_the_tool_and_at_the_start(case, scenes, capsys):
    fault, message = FAULTS[case]
    path = fault(scenes)
    code, printed = tool(scenes, capsys)
    found = [line for line in printed.splitlines() if str(path) in line]
    assert code == 1 and re.search(message or 'cannot be read .*restore it', found[0])
    number = 2 if case == 'label ids' else 1
    assert f'problems: {number}\n' in printed

    message = message or 'label files are missing.*seg_map_suffix'
    with pytest.raises(ValueError, match=message) as e:
        train(scenes)
    assert str(path) in str(e.value)
    assert not list(scenes.glob('work/*.pth'))


def test_all_problems_are_listed_up_to_a_number(scenes, capsys):
    bad = [FAULTS[case][0](scenes) for case in ('grey', 'cut label')]
    _, printed = tool(scenes, capsys)
    assert 'problems: 2\n' in printed and all(str(path) in printed for path in bad)
    _, printed = tool(scenes, capsys, '--max-problems', 1)
    assert 'and 1 more: --max-problems' in printed and str(bad[1]) not in printed


def test_an_empty_split(scenes, capsys):
    for path in scenes.glob('leftImg8bit/val/*/*.png'):
        path.unlink()
    code, printed = tool(scenes, capsys, split='val')
    message = r'no image \*_leftImg8bit.png in .*leftImg8bit/val: check img_suffix'
    assert code == 1 and re.search(message, printed)
    with pytest.raises(ValueError, match=message):
        train(scenes)


def test_classes_that_are_not_the_heads(scenes, capsys):
    def message(head, number, split):
        return (f'got {number} in model.{head} and .* in {split}_dataloader .*'
                f'set model.{head}.num_classes=')

    option = 'train_dataloader.dataset.metainfo.classes=(road,car)'
    code, printed = tool(scenes, capsys, options=[option])
    assert code == 1 and re.search(message('decode_head', 19, 'train'), printed)
    assert re.search(message('auxiliary_head', 19, 'train'), printed)
    two = dict(classes=('road', 'car'))
    with pytest.raises(ValueError, match=message('decode_head', 19, 'train')):
        train(scenes, **{'train_dataloader.dataset.metainfo': two})
    with pytest.raises(ValueError, match=message('auxiliary_head', 2, 'train')):
        train(scenes, **{'model.auxiliary_head.num_classes': 2})
    with pytest.raises(ValueError, match=message('decode_head', 19, 'val')):
        train(scenes, **{'val_dataloader.dataset.metainfo': two})
    with pytest.raises(ValueError, match=message('decode_head', 19, 'test')):
        Runner.from_cfg(config(scenes, **{'test_dataloader.dataset.metainfo': two})).test()


def test_a_checkpoint_of_other_classes(scenes, tmp_path):
    two = {f'{split}_dataloader.dataset.metainfo': dict(classes=('road', 'car'))
           for split in ('train', 'val', 'test')}
    two.update({f'model.{head}.num_classes': 2 for head in ('decode_head', 'auxiliary_head')})
    checkpoint = str(Path(train(scenes, **two).work_dir) / 'iter_1.pth')
    message = (r'got for decode_head.conv_seg.weight \(2, 64, 1, 1\) in place of \(19, 64, 1, 1\);'
               ' name the config it was trained with')
    for tta in (False, True):
        cfg = config(scenes, load_from=checkpoint)
        if tta:
            cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
            cfg.model = dict(cfg.tta_model, module=cfg.model)
        with pytest.raises(ValueError, match=message):
            Runner.from_cfg(cfg).test()
    with pytest.raises(ValueError, match=message):
        train(scenes, **{'load_from': checkpoint, 'resume': True, 'train_cfg.max_iters': 2})
    # To start a training from it is fine tuning, and it tests with its own config.
    train(scenes, load_from=checkpoint, work_dir=str(tmp_path / 'tuned'))
    assert 'mIoU' in Runner.from_cfg(config(scenes, **two, load_from=checkpoint)).test()


def test_a_bad_label_that_no_start_saw_is_named_by_the_loss(scenes):
    path = rewrite(lambda label: np.where(label == 0, 200, label), True)(scenes)
    other = path.with_name(path.name.replace('000001', '000000'))
    with pytest.raises(ValueError, match=r'got 200 in .*labelTrainIds.png; .*check_dataset') as e:
        train(scenes, **{'train_dataloader.dataset.check_files': False, 'train_cfg.max_iters': 4})
    assert str(path) in str(e.value) and str(other) not in str(e.value)


@pytest.mark.parametrize('way', ['val', 'test', 'tta'])
def test_a_bad_label_is_named_by_validation_and_test(way, scenes):
    """IoUMetric does not know of it: such a pixel is just wrong."""
    path, = scenes.glob('gtFine/val/*/*_labelTrainIds.png')
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), np.where(label == label[0, 0], 200, label))
    cfg = config(scenes, **{f'{split}_dataloader.dataset.check_files': False
                            for split in ('val', 'test')})
    if way == 'tta':
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match=rf'got 200 in {path}; .*check_dataset'):
        runner.val() if way == 'val' else runner.test()


def test_check_files_can_be_left_out(scenes):
    FAULTS['grey'][0](scenes)
    train(scenes, **{'train_dataloader.dataset.check_files': False})


def test_subsets_of_classes_read_the_same_files(scenes, capsys):
    option = 'train_dataloader.dataset.metainfo.classes=(road,car)'
    _, printed = tool(scenes, capsys, options=[
        option, 'model.decode_head.num_classes=2', 'model.auxiliary_head.num_classes=2'])
    assert 'problems: 0' in printed and '10 ignored' in printed and ' 13 car ' in printed


def test_wrapped_and_other_datasets(scenes, capsys, tmp_path):
    """Within mmengine's wrappers, and of mmseg, which do not check their files themselves."""
    bad = FAULTS['grey'][0](scenes)
    one = config(scenes).train_dataloader.dataset
    other = dict(one, type='CityscapesDataset', metainfo=dict(classes=('road', 'car')))
    cfg = config(scenes)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(type='RepeatDataset', times=2, dataset=one), other], ignore_keys=[
            'classes', 'palette', 'label_map'])
    cfg.dump(tmp_path / 'wrapped.py')
    code, printed = tool(scenes, capsys, config=tmp_path / 'wrapped.py')
    assert code == 1 and printed.count(f'{bad}: images of 3 channels are needed') == 2
    assert 'train[0]: 2 images' in printed and 'got 19 in model.decode_head and 2' in printed


@DATASETS.register_module()
class Tensors(torch.utils.data.Dataset):
    """A data set of torch alone."""

    def __len__(self):
        return 2


@TRANSFORMS.register_module()
class NotSent:
    """A transform that cannot be sent to another process, after which nothing can be loaded."""

    def __init__(self):
        self.change = lambda results: results

    def __call__(self, results):
        return self.change(results)


def test_data_sets_and_models_of_ones_own(scenes, capsys, tmp_path):
    """What cannot be read or built is told, and the rest is checked."""
    cfg = config(scenes)
    cfg.train_dataloader.dataset = dict(type='Tensors')
    cfg.val_dataloader.dataset.pipeline = [dict(type='NotSent'), *cfg.val_dataloader.dataset.
                                           pipeline]
    cfg.model.decode_head.dilations = 'none'
    cfg.dump(tmp_path / 'own.py')
    code, printed = tool(scenes, capsys, '--workers', 2, split='all', config=tmp_path / 'own.py')
    assert code == 1 and 'the model cannot be built: ' in printed
    assert 'train: Tensors is no dataset of mmseg and keeps no list of files' in printed
    assert 'val: 1 images' in printed and printed.count('problems: 0') == 3


def test_processes_and_all_splits(scenes, tmp_path):
    roots = [f'{s}_dataloader.dataset.data_root={scenes}' for s in ('train', 'val', 'test')]
    out = execute(TOOL, CONFIG, '--workers', 2, '--cfg-options', *roots, cwd=tmp_path)
    assert out.count('problems: 0') == 2 and 'test: the data set of val' in out
    label = cv2.imread(str(next(scenes.glob('gtFine/val/*/*TrainIds.png'))), -1)
    assert f'  0 road             {(label == 0).mean():7.2%}' in out.split('val: 1 images')[1]


def test_the_train_tool_ends_in_one_line(scenes, tmp_path):
    path = label_ids(scenes)
    log = execute(ROOT / 'tools/train.py', CONFIG, '--work-dir', tmp_path / 'work',
                  '--cfg-options', *SHORT, f'train_dataloader.dataset.data_root={scenes}',
                  cwd=tmp_path, check=False)
    assert str(path) in log.splitlines()[-1] and 'labelTrainIds' in log.splitlines()[-1]


@pytest.mark.parametrize('mode, bits, channels', [
    ('L', 8, 1), ('RGB', 8, 3), ('RGBA', 8, 4), ('LA', 8, 2), ('P', 8, 1), ('1', 1, 1),
    ('I;16', 16, 1)])
def test_headers_as_pillow_reads_them(mode, bits, channels, tmp_path):
    array = np.zeros((6, 9), np.uint16 if mode == 'I;16' else np.uint8)
    image = Image.fromarray(array)
    if mode not in ('I;16', 'L'):
        image = image.convert(mode)
    for suffix in ('png', 'tif'):
        path = tmp_path / f'a.{suffix}'
        if suffix == 'tif' and mode == 'LA':
            continue
        image.save(path)
        with open(path, 'rb') as file:
            header = read_header(file)
            assert header == ((6, 9), bits, channels, mode == 'P'), suffix
            assert decode(file).shape[:2] == (6, 9)


def test_headers_of_jpegs(tmp_path):
    path = tmp_path / 'a.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which OpenCV does and this counts in
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    with open(path, 'rb') as file:
        assert read_header(file).size == cv2.imread(str(path)).shape[:2] == (24, 16)
    path.write_bytes(path.read_bytes() + b'trailer')  # as some cameras write
    with open(path, 'rb') as file:
        assert read_header(file).channels == 3
    path.write_bytes(path.read_bytes()[:-200])
    with open(path, 'rb') as file, pytest.raises(ValueError, match='cut off'):
        read_header(file)


@pytest.mark.parametrize('zero, classes, expected', [
    (False, 'abcde', {value: value for value in range(256)}),
    (True, 'abcde', {0: 255, **{value: value - 1 for value in range(1, 255)}, 255: 255}),
    (False, 'da', {0: 1, 1: 255, 2: 255, 3: 0, 4: 255,
                   **{value: value for value in range(5, 256)}}),
    (True, 'da', {0: 255, 1: 1, 2: 255, 3: 255, 4: 0, 5: 255,
                  **{value: value - 1 for value in range(6, 255)}, 255: 255}),
])
def test_label_values_become_what_mmseg_makes_of_them(zero, classes, expected):
    class Five(BaseSegDataset):
        METAINFO = dict(classes=tuple('abcde'), palette=[[0, 0, 0]] * 5)

    dataset = Five(metainfo=dict(classes=tuple(classes)), reduce_zero_label=zero, lazy_init=True,
                   pipeline=[dict(type='LoadAnnotations')])
    index = rules_of(dataset).classes.index
    assert index.dtype == np.uint8 and dict(enumerate(index.tolist())) == expected


def test_without_classes_no_value_is_judged():
    assert rules_of(BaseSegDataset(lazy_init=True)).classes is None
