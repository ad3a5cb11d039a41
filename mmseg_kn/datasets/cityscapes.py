"""Cityscapes as mmseg reads it, refused at the start if images or labels are missing or wrong."""
import os.path as osp
import random
import time

from mmengine import fileio
from mmengine.logging import print_log
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS

from .file_checks import faults_of, label_pixels, rules_of, summary
from .label_values import value_fault

_REMEDY = ('set data_root, e.g. --cfg-options train_dataloader.dataset.data_root=... '
           'val_dataloader.dataset.data_root=... test_dataloader.dataset.data_root=...')
_SECONDS = 1.  # for the headers; on a slow disk, as many as that allows
_DECODED = 5  # labels whose values are looked at


@DATASETS.register_module()
class KNCityscapesDataset(CityscapesDataset):
    """mmseg's ``CityscapesDataset``, with its arguments, which checks its files.

    mmseg finds a missing or wrong label when a worker loads it, an empty folder not at all, and
    takes 16-bit, grey and 4-channel images as they come. Here all headers of local files are
    read, in random order for at most a second. Where a transform of another kind than mmcv's
    ``LoadImageFromFile`` and mmseg's ``LoadAnnotations`` loads them, that is run instead, and
    what it can read is taken. The values of five labels are looked at, too; a single one that is
    no class may be what the heads ignore, as ``ClassCheckHook`` knows.
    ``tools/misc/check_dataset.py`` reads everything.

    Args:
        check_files: Look at labels and headers, here and in ``ClassCheckHook``; a missing or
            empty image folder is refused anyway.

    Raises:
        ValueError: The image folder is missing or empty, a label file that the pipeline loads is
            missing, a file is cut off, an image is not of 8-bit colours while it is loaded as
            such, a label is of another size than its image, has several channels or not 8 bits,
            or has values that are no class; names the path and the remedy.
    """

    def __init__(self, *args, check_files: bool = True, **kwargs) -> None:
        self.check_files = check_files
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        img_dir = self.data_prefix['img_path']
        if not fileio.isdir(img_dir, backend_args=self.backend_args):
            raise ValueError(f'no image folder {img_dir}: {_REMEDY}')
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(f'no image *{self.img_suffix} in {img_dir}: check img_suffix, or '
                             f'{_REMEDY}')
        if self.check_files:
            rules = rules_of(self)
            ann_dir = self.data_prefix.get('seg_map_path')
            if ann_dir and rules.loaders.need_label_files():
                self._check_labels(data_list, ann_dir)
            backend = fileio.get_file_backend(img_dir, backend_args=self.backend_args)
            if isinstance(backend, fileio.LocalBackend):
                self._check_headers(data_list, rules)
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

    def _check_headers(self, data_list: list[dict], rules) -> None:
        faults, stop = [], time.monotonic() + _SECONDS
        # a generator of its own: the training's draws stay as they are
        order = random.Random(0).sample(data_list, len(data_list))
        headers = rules._replace(classes=None)
        for seen, sample in enumerate(order, 1):
            faults += faults_of(sample, headers)
            if time.monotonic() > stop and seen < len(order):
                print_log(f'looked at {seen} of {len(order)} images in {_SECONDS:.0f} s; '
                          'tools/misc/check_dataset.py looks at all', 'current')
                break
        faults = faults or self._value_faults(order[:_DECODED], rules)
        if faults:
            raise ValueError(summary(faults))

    def _value_faults(self, data_list: list[dict], rules) -> list[str]:
        """Labels with values that are no class, of which heads could ignore but one."""
        faults, wrong = [], set()
        for sample in data_list:
            pixels = label_pixels(sample, rules)
            if pixels is not None and (fault := value_fault(pixels, rules.classes)):
                faults.append(f'{sample["seg_map_path"]}: {fault}')
                wrong.update(rules.classes.index[rules.classes.wrong(pixels)].tolist())
        return faults if len(wrong) > 1 else []
