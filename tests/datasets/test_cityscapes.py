import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), array)


def make_root(root, labelled=2, images=2):
    for i in range(images):
        stem = f'a/a_{i:06d}_000019'
        write(root / f'leftImg8bit/train/{stem}_leftImg8bit.png', np.zeros((8, 16, 3), np.uint8))
        if i < labelled:
            write(root / f'gtFine/train/{stem}_gtFine_labelTrainIds.png',
                  np.full((8, 16), i, np.uint8))
    return root


def build(root, **options):
    return DATASETS.build(dict(
        type='KNCityscapesDataset', data_root=str(root),
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        **{'pipeline': PIPELINE, **options}))


def test_reads_as_mmsegs(tmp_path):
    dataset = build(make_root(tmp_path))
    assert len(dataset) == 2 and len(dataset.metainfo['classes']) == 19
    assert (dataset[1]['data_samples'].gt_sem_seg.data == 1).all()


def test_labels_that_the_pipeline_does_not_load_are_not_asked_for(tmp_path):
    root = make_root(tmp_path, labelled=0)
    assert len(build(root, pipeline=[PIPELINE[0], PIPELINE[2]], test_mode=True)) == 2
    tta = dict(type='TestTimeAug', transforms=[[PIPELINE[1]], [PIPELINE[2]]])
    with pytest.raises(ValueError, match='2 of 2 label files are missing'):
        build(root, pipeline=[PIPELINE[0], tta])


@pytest.mark.parametrize('make, message', [
    (lambda root: root / 'nowhere', 'no image folder .*nowhere.*set data_root'),
    (lambda root: (root / 'leftImg8bit/train').mkdir(parents=True) or root,
     r'no image \*_leftImg8bit.png in .*leftImg8bit.train.*img_suffix'),
    (lambda root: make_root(root, labelled=0),
     r'2 of 2 label files are missing, e.g. .*a_000000_000019_gtFine_labelTrainIds.png'),
    (lambda root: make_root(root, labelled=1), '1 of 2 label files are missing, e.g. .*a_000001'),
])
def test_what_is_missing_is_named(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(make(tmp_path))
