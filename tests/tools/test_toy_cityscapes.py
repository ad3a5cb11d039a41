"""Tests of the generated street scenes."""
import ast
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import toy_cityscapes as toy
from toy_cityscapes.__main__ import main
from toy_cityscapes.compose import MIN_SIZE
from toy_cityscapes.files import MANIFEST
from toy_cityscapes.labels import KINDS

import mmseg_kn  # noqa: F401  (makes mmseg importable next to mmcv-lite)

SIZE = (64, 128)
ARGS = {'train': 8, 'val': 4, 'size': SIZE, 'seed': 3}


def pictures(root, pattern):
    """Return {path below root: picture} in the order of the names."""
    return {str(path.relative_to(root)): cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            for path in sorted(root.rglob(pattern))}


def tree_bytes(root):
    return {str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    return root, toy.generate(root, **ARGS)


def test_layout(made):
    root, summary = made
    for split, count in (('train', 8), ('val', 4)):
        images = sorted(root.glob(f'leftImg8bit/{split}/*/*.png'))
        assert len(images) == count
        for image in images:
            city, sequence, frame, last = image.name.split('_')
            assert (city, last) == (image.parent.name, 'leftImg8bit.png')
            assert len(sequence) == len(frame) == 6 and (sequence + frame).isdigit()
            truth = root / 'gtFine' / split / city
            stem = image.name.removesuffix('_leftImg8bit.png')
            for kind in ('labelTrainIds', 'labelIds', 'color'):
                assert (truth / f'{stem}_gtFine_{kind}.png').is_file()
    assert summary['files'] == 4 * 12 == len(list(root.rglob('*.png')))


def test_mmseg_reads_it(made):
    datasets = pytest.importorskip('mmseg.datasets', exc_type=ImportError)
    root, _ = made
    for split, count in (('train', 8), ('val', 4)):
        data = datasets.CityscapesDataset(
            data_root=str(root), pipeline=[],
            data_prefix={'img_path': f'leftImg8bit/{split}', 'seg_map_path': f'gtFine/{split}'})
        assert len(data) == count
        for index in range(count):
            info = data.get_data_info(index)
            assert cv2.imread(info['img_path']).shape == (*SIZE, 3)
            label = cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED)
            assert label.shape == SIZE and set(np.unique(label)) <= {*range(19), 255}


def test_table_is_that_of_mmseg():
    datasets = pytest.importorskip('mmseg.datasets', exc_type=ImportError)
    meta = datasets.CityscapesDataset.METAINFO
    known = KINDS[:19]
    assert tuple(kind.name for kind in known) == tuple(meta['classes'])
    assert [list(kind.colour) for kind in known] == meta['palette']
    assert [kind.train_id for kind in known] == list(range(19))
    assert [kind.id for kind in known] == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26,
                                           27, 28, 31, 32, 33]
    assert all(kind.train_id == 255 for kind in KINDS[19:])


def test_pictures_agree(made):
    root, _ = made
    images = pictures(root, '*_leftImg8bit.png')
    train_ids, ids, colours = (list(pictures(root, f'*_gtFine_{kind}.png').values())
                               for kind in ('labelTrainIds', 'labelIds', 'color'))
    for image, train_id, label_id, colour in zip(images.values(), train_ids, ids, colours,
                                                   strict=True):
        assert all(part.dtype == np.uint8 for part in (image, train_id, label_id, colour))
        assert image.shape == colour.shape == (*SIZE, 3)
        assert train_id.shape == label_id.shape == SIZE
        seen = np.zeros(SIZE, bool)
        for kind in KINDS:
            here = label_id == kind.id
            assert (train_id[here] == kind.train_id).all()
            assert (colour[here] == kind.colour[::-1]).all()
            seen |= here
        assert seen.all()


def test_same_seed_same_bytes(made, tmp_path):
    root, summary = made
    assert toy.generate(tmp_path / 'two', **ARGS, workers=2) == summary
    assert tree_bytes(tmp_path / 'two') == tree_bytes(root)


def test_scenes_depend_on_seed_and_index_only(made, tmp_path):
    root, _ = made
    toy.generate(tmp_path / 'few', train=2, val=0, size=SIZE, seed=3)
    toy.generate(tmp_path / 'other', train=2, val=0, size=SIZE, seed=4)
    few, other = (pictures(tmp_path / name, '*.png') for name in ('few', 'other'))
    whole = pictures(root, '*.png')
    assert few.keys() == other.keys() and len(few) == 8
    for name in few:
        assert np.array_equal(few[name], whole[name])
        assert not np.array_equal(few[name], other[name])


def test_no_scene_twice(made):
    root, _ = made
    images = [image.tobytes() for image in pictures(root, '*_leftImg8bit.png').values()]
    assert len(set(images)) == 12


def test_all_classes_in_any_four_scenes(made):
    root, summary = made
    for split in ('train', 'val'):
        assert len(summary['shares'][split]) == 20
        assert min(share for name, share in summary['shares'][split].items()
                   if name != 'void') > .0005
        assert sum(summary['shares'][split].values()) == pytest.approx(1)
        labels = pictures(root / 'gtFine' / split, '*_labelTrainIds.png')
        by_index = [labels[name] for name in sorted(labels, key=lambda name: name.split('_')[1])]
        for start in range(len(by_index) - 3):
            counts = np.bincount(np.stack(by_index[start:start + 4]).ravel(), minlength=256)
            assert counts[:19].min() >= SIZE[0] * SIZE[1] // 1000
        for label in by_index:
            assert len(np.unique(label[label < 255])) >= 14


@pytest.mark.parametrize('size', [MIN_SIZE, (64, 256), (160, 120), (300, 500)])
def test_other_sizes(size):
    image, label = toy.scene(np.random.default_rng(0), size, turn=1)
    assert image.shape == (*size, 3) and label.shape == size
    assert image.dtype == label.dtype == np.uint8


def test_scene_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    toy.scene(np.random.default_rng(0), SIZE)
    assert np.array_equal(before, np.random.get_state()[1])


def test_colour_alone_does_not_decide():
    """A majority vote per colour bin (16 x 16 x 16), fitted on one half, fails on the other."""
    def sample(indices):
        scenes = [toy.scene(np.random.default_rng(i), SIZE, turn=i) for i in indices]
        bgr, label = (np.stack(part) for part in zip(*scenes, strict=True))
        bins = (bgr >> 4).astype(int) @ [256, 16, 1]
        return bins[label < 19], label[label < 19].astype(int)

    bins, label = sample(range(16))
    vote = np.bincount(bins * 19 + label, minlength=4096 * 19).reshape(4096, 19).argmax(1)
    bins, label = sample(range(100, 108))
    table = np.bincount(label * 19 + vote[bins], minlength=361).reshape(19, 19)
    iou = np.diag(table) / np.maximum(table.sum(0) + table.sum(1) - np.diag(table), 1)
    assert 100 * iou.mean() < 20


@pytest.mark.parametrize('bad, message', [
    ({'size': (63, 128)}, 'at least 64 96'), ({'size': (64, 95)}, 'at least 64 96'),
    ({'size': (64.5, 128)}, 'whole'), ({'train': -1}, 'train must'), ({'val': -1}, 'val must'),
    ({'train': 0, 'val': 0}, r'train \+ val'), ({'seed': -1}, 'seed must'),
    ({'workers': 0}, 'workers must')])
def test_bad_arguments(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        toy.generate(tmp_path / 'new', **{'train': 1, 'val': 0, 'size': SIZE, **bad})
    assert not (tmp_path / 'new').exists()


def test_keeps_what_it_did_not_write(tmp_path):
    root, small = tmp_path / 'set', {'val': 0, 'size': SIZE}
    root.mkdir()
    (root / 'mine.txt').write_text('mine')
    for force in (False, True):
        with pytest.raises(ValueError, match='other files'):
            toy.generate(root, train=1, **small, force=force)
    (root / 'mine.txt').unlink()
    toy.generate(root, train=2, **small)
    with pytest.raises(ValueError, match='--force'):
        toy.generate(root, train=1, **small)
    (root / 'mine.txt').write_text('mine')
    toy.generate(root, train=1, **small, force=True)
    assert (root / 'mine.txt').read_text() == 'mine'
    assert len(list(root.rglob('*.png'))) == 4
    assert json.loads((root / MANIFEST).read_text())['train'] == 1

    own = root / 'leftImg8bit/train/marbeck/marbeck_000001_000019_leftImg8bit.png'
    own.parent.mkdir(exist_ok=True)
    own.write_text('mine')  # in the way of scene 1
    before = tree_bytes(root)
    with pytest.raises(ValueError, match='not written by this tool'):
        toy.generate(root, train=2, **small, force=True)
    (root / MANIFEST).write_text('[]')
    with pytest.raises(ValueError, match='damaged'):
        toy.generate(root, train=1, **small, force=True)
    (root / MANIFEST).write_bytes(before[MANIFEST])
    assert tree_bytes(root) == before
    with pytest.raises(ValueError, match='not a folder'):
        toy.generate(root / 'mine.txt', train=1, **small)


def test_command_line(tmp_path, capsys):
    main([str(tmp_path / 'set'), '--train', '1', '--val', '1', '--size', '64', '128'])
    out, err = capsys.readouterr()
    assert '8 files' in out and 'traffic light' in out and '2/2 scenes' in err
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / 'set')])
    assert stop.value.code == 2 and '--force' in capsys.readouterr().err


def test_needs_only_numpy_and_opencv():
    """No module imports torch or mmseg, nor mmseg_kn."""
    allowed = sys.stdlib_module_names | {'cv2', 'numpy', 'toy_cityscapes'}
    for path in Path(toy.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split('.')[0] for name in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (
                    node.level == 0 and node.module.split('.')[0] in allowed)
