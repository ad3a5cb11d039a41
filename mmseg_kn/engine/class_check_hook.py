"""Stops a run whose heads, data set, labels or checkpoint disagree about the classes."""
import re

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel

from .wrappers import unwrap


def heads_of(model) -> dict:
    """The segmentation heads of a model by name, one per stage of a cascade; {} without any."""
    heads = {}
    for name in ('decode_head', 'auxiliary_head'):
        head = getattr(model, name, None)
        parts = {f'{name}[{i}]': h for i, h in enumerate(head)} if isinstance(
            head, torch.nn.ModuleList) else {name: head}
        heads.update({n: h for n, h in parts.items() if hasattr(h, 'num_classes')})
    return heads


def class_fault(name: str, number: int, split: str, classes, filename: str) -> str | None:
    """What is wrong with ``num_classes=number`` of a head for a data set of these classes."""
    if number == len(classes):
        return None
    shown = ', '.join(classes[:3]) + ', ...' * (len(classes) > 3)
    return (f'num_classes of a head must be the number of classes of the data set, got {number} '
            f'in model.{name} and {len(classes)} in {split}_dataloader ({shown}), config '
            f'{filename}; set model.{name}.num_classes={len(classes)}, or choose classes in the '
            'dataset by metainfo=dict(classes=...)')


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Compares the number of classes of heads, data sets, labels and checkpoint.

    mmseg trains with more classes in the heads than in the data set, fails in the loss with
    fewer (on a GPU without naming a file), and tests a checkpoint of other classes with a random
    last layer, at a line in the log; wrong labels in validation and test lower the IoU without a
    word. Models without a ``decode_head`` are left alone, and so are checkpoints of models that
    FSDP shards, where torch itself refuses weights of another shape.

    Raises:
        ValueError: Before training and testing: a head's ``num_classes`` is not the data set's
            number of classes, or the checkpoint that is tested or resumed has another decode
            head. At each batch: a label is neither a class nor ignored; names the file.
    """

    def __init__(self) -> None:
        self.unlike = None  # what to say of a loaded checkpoint of other classes
        self.limit = None  # number of classes, and the value that is ignored

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        if isinstance(runner.model, FullyShardedDataParallel):
            # Its shapes are those of shards; to ask for the inner module's makes that the root
            # of the sharding, which then does not load. No hook runs before it is wrapped.
            return
        # A training may start from another head's checkpoint; what it is for is known later.
        weights = checkpoint.get('state_dict', checkpoint)
        given = {re.sub(r'^module\.', '', name): value for name, value in weights.items()}
        own = {name: value for name, value in unwrap(runner.model).state_dict().items()
               if name.startswith('decode_head.') and 'num_batches_tracked' not in name}
        unlike = [name for name, value in own.items()
                  if name not in given or given[name].shape != value.shape]
        if not unlike:
            self.unlike = None
            return
        name = next((n for n in unlike if n.endswith('conv_seg.weight')), unlike[0])
        found = 'none' if name not in given else tuple(given[name].shape)
        self.unlike = (
            'the checkpoint must hold the decode head of the config, got for '
            f'{name} {found} in place of {tuple(own[name].shape)}; name the config it was trained '
            'with, or set num_classes of the heads to match')

    def before_train(self, runner) -> None:
        if self.unlike and runner.iter:  # resumed, not only started from it
            raise ValueError(self.unlike)
        self.unlike = None
        self._compare(runner, 'train', runner.train_dataloader)
        if runner.val_loop is not None:
            self._compare(runner, 'val', runner.val_dataloader)
        self._set_limit(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def before_val(self, runner) -> None:
        if self.unlike:
            raise ValueError(self.unlike)
        self._set_limit(runner)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def before_test(self, runner) -> None:
        self._compare(runner, 'test', runner.test_dataloader)
        if self.unlike:
            raise ValueError(self.unlike)
        self._set_limit(runner)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def _set_limit(self, runner) -> None:
        head = next(iter(heads_of(unwrap(runner.model)).values()), None)
        self.limit = head and (head.num_classes, head.ignore_index)

    def _check_labels(self, data_batch) -> None:
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not self.limit or not isinstance(samples, list):
            return
        number, ignored = self.limit
        if samples and isinstance(samples[0], (list, tuple)):  # one for each augmentation
            samples = [sample for same in samples for sample in same]
        for sample in samples:
            if 'gt_sem_seg' not in sample:
                continue
            label = sample.gt_sem_seg.data
            wrong = label[(label >= number) & (label != ignored)]
            if len(wrong):
                raise ValueError(
                    f'labels must be one of {number} classes, 0 to {number - 1}, or '
                    f'{ignored}, got {", ".join(map(str, wrong.unique().tolist()[:8]))} in '
                    f'{sample.get("seg_map_path")}; tools/misc/check_dataset.py lists all such '
                    'files, docs/troubleshooting.md the usual causes')

    def _compare(self, runner, split, dataloader) -> None:
        classes = (getattr(dataloader.dataset, 'metainfo', None) or {}).get('classes')
        if not classes:
            return
        for name, head in heads_of(unwrap(runner.model)).items():
            if fault := class_fault(name, head.num_classes, split, classes, runner.cfg.filename):
                raise ValueError(fault)
