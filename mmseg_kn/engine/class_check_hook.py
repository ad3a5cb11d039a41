"""Stops a run whose heads, data set, labels or checkpoint disagree about the classes."""
import re

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel

from ..datasets.file_checks import summary
from ..datasets.first_look import look
from .class_checks import heads_of, limits_of, setting_faults
from .wrappers import unwrap


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Compares the classes of heads, data sets, labels and checkpoint, and what is ignored.

    mmseg trains with more classes in the heads than in the data set, fails in the loss with
    fewer (on a GPU without naming a file), and tests a checkpoint of other classes with a random
    last layer, at a line in the log; wrong labels in validation and test lower the IoU without a
    word, and masks of 0 and 255 train to an mIoU of 100. All heads are looked at. Models without
    a head of mmseg are left alone, and so are checkpoints of models that FSDP shards, where torch
    itself refuses weights of another shape.

    Before training, validation and testing, the values of labels are looked at, in random order
    for at most a second of each data set; ``check_files=False`` in a data set leaves that out.

    Raises:
        ValueError: Before training and testing: a head's ``num_classes`` is not the data set's
            number of classes, or that is 1; classes are a string; a loss cannot train a head of
            one output channel; labels are padded, or evaluated, with another ignored index than
            the heads'; a label has values that are no class; all labels hold one class alone
            and ignored pixels; or the checkpoint that is tested or resumed has another decode
            head. At each batch: a label is neither a class nor ignored; names the file.
    """

    def __init__(self) -> None:
        self.unlike = None  # what to say of a loaded checkpoint of other classes
        self.limits = []  # of each head: number of classes, and the value that is ignored

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
        if hasattr(unwrap(runner.model), 'conversion') and any(
                name.endswith('.running_var') for name in given):
            self.unlike = (
                'the checkpoint must be that of the converted network, got one of a network with '
                'BatchNorm, whose function it does not have; convert it by tools/'
                'model_converters/batchnorm2kernelnorm.py, or train from it by load_from')
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
        splits = [('train', runner.train_dataloader, ())]
        if runner.val_loop is not None:
            splits.append(('val', runner.val_dataloader, runner.val_evaluator.metrics))
        self._compare(runner, splits)
        self._look(runner, splits)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def before_val(self, runner) -> None:
        if self.unlike:
            raise ValueError(self.unlike)
        if not self.limits:  # else training has looked
            self._look(runner, [('val', runner.val_dataloader, ())])

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def before_test(self, runner) -> None:
        if self.unlike:
            raise ValueError(self.unlike)
        splits = [('test', runner.test_dataloader, runner.test_evaluator.metrics)]
        self._compare(runner, splits)
        self._look(runner, splits)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._check_labels(data_batch)

    def _check_labels(self, data_batch) -> None:
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not isinstance(samples, list):
            return
        if samples and isinstance(samples[0], (list, tuple)):  # one for each augmentation
            samples = [sample for same in samples for sample in same]
        for sample in samples:
            if 'gt_sem_seg' not in sample:
                continue
            label = sample.gt_sem_seg.data
            for number, ignored in self.limits:
                wrong = label[((label >= number) | (label < 0)) & (label != ignored)]
                if len(wrong):
                    raise ValueError(
                        f'labels must be one of {number} classes, 0 to {number - 1}, or '
                        f'{ignored}, got {", ".join(map(str, wrong.unique().tolist()[:8]))} in '
                        f'{sample.get("seg_map_path")}; tools/misc/check_dataset.py lists all '
                        'such files, docs/troubleshooting.md the usual causes')

    def _compare(self, runner, splits) -> None:
        """Raises the first fault of the settings."""
        model = unwrap(runner.model)
        for split, loader, metrics in splits:
            if faults := setting_faults(model, loader.dataset, split, runner.cfg.filename,
                                        metrics):
                raise ValueError(faults[0])

    def _look(self, runner, splits) -> None:
        """Sets the limits, and raises the first fault of the labels."""
        self.limits = limits_of(heads_of(unwrap(runner.model)))
        for split, loader, _ in splits if self.limits else ():
            seen = look(loader.dataset, self.limits)
            if seen.faults:
                raise ValueError(summary(seen.faults))
            if seen.lone and split == 'train':
                if seen.seen == seen.number:
                    raise ValueError(f'{split}_dataloader: {seen.lone}')
                runner.logger.warning(
                    f'{split}_dataloader, {seen.seen} of {seen.number} labels: {seen.lone}')
