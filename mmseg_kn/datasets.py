"""Cityscapes as mmseg reads it, refused at the start if images or labels are missing."""
import os.path as osp

from mmcv.transforms import LoadAnnotations
from mmengine import fileio
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS

_REMEDY = ('set data_root, e.g. --cfg-options train_dataloader.dataset.data_root=... '
           'val_dataloader.dataset.data_root=... test_dataloader.dataset.data_root=...')


def _loads_labels(transforms) -> bool:
    """Whether a pipeline reads label files, in a branch of test-time augmentation too."""
    return any(
        isinstance(t, LoadAnnotations) or _loads_labels(getattr(t, 'transforms', ())) or
        _loads_labels(getattr(t, 'subroutines', ())) for t in transforms)


@DATASETS.register_module()
class KNCityscapesDataset(CityscapesDataset):
    """mmseg's ``CityscapesDataset``, with its arguments, which checks its files.

    mmseg finds a missing label when a worker loads it, and an empty folder not at all.

    Raises:
        ValueError: The image folder is missing or empty, or a label file that the pipeline
            loads is missing; names the path and the remedy.
    """

    def load_data_list(self) -> list[dict]:
        img_dir = self.data_prefix['img_path']
        if not fileio.isdir(img_dir, backend_args=self.backend_args):
            raise ValueError(f'no image folder {img_dir}: {_REMEDY}')
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(f'no image *{self.img_suffix} in {img_dir}: check img_suffix, or '
                             f'{_REMEDY}')
        ann_dir = self.data_prefix.get('seg_map_path')
        if ann_dir and _loads_labels(self.pipeline.transforms):
            self._check_labels(data_list, ann_dir)
        return data_list

    def _check_labels(self, data_list: list[dict], ann_dir: str) -> None:
        found = set()
        if fileio.isdir(ann_dir, backend_args=self.backend_args):
            found.update(
                osp.normpath(osp.join(ann_dir, name)) for name in fileio.list_dir_or_file(
                    ann_dir, list_dir=False, suffix=self.seg_map_suffix, recursive=True,
                    backend_args=self.backend_args))
        missing = [d['seg_map_path'] for d in data_list
                   if osp.normpath(d['seg_map_path']) not in found]
        if missing:
            raise ValueError(
                f'{len(missing)} of {len(data_list)} label files are missing, e.g. {missing[0]}: '
                "mmseg's tools/dataset_converters/cityscapes.py makes *_labelTrainIds.png from "
                f"Cityscapes' polygons; for other data check seg_map_path and seg_map_suffix, or "
                f'{_REMEDY}')
