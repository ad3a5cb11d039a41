"""What heads, data set and paddings of a config must have in common, and where they do not."""
from collections.abc import Iterable, Sequence

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

from ..datasets.pipeline_loaders import transforms_of
from ..datasets.walk import walk

# mmseg's heads that make targets of their own from the labels: edges, and depths.
_OWN_TARGETS = ('STDCHead', 'VPDDepthHead')


def heads_of(model: torch.nn.Module) -> dict:
    """The segmentation heads of a model by name, those of cascades and lists too; {} without any.

    Left out are heads whose classes are not the data set's, such as STDC's, which finds edges.
    """
    heads = {}
    for name, module in model.named_modules():
        top = name in ('decode_head', 'auxiliary_head') and hasattr(module, 'num_classes')
        if (top or isinstance(module, BaseDecodeHead)) and not any(
                base.__name__ in _OWN_TARGETS for base in type(module).__mro__):
            first, *rest = name.split('.')
            heads[first + ''.join(f'[{p}]' if p.isdigit() else f'.{p}' for p in rest)] = module
    return heads


def limits_of(heads: dict) -> list[tuple[int, int]]:
    """(num_classes, ignore_index) of each head, every pair once."""
    return list(dict.fromkeys(
        (head.num_classes, getattr(head, 'ignore_index', 255)) for head in heads.values()))


def setting_faults(model: torch.nn.Module, dataset, split: str, filename: str,
                   metrics: Iterable = ()) -> list[str]:
    """All that heads, data set, paddings and metrics of a split disagree about.

    Args:
        model: Without wrappers around it.
        dataset: That of the split, in whatever wrappers.
        split: 'train', 'val' or 'test', as in ``train_dataloader``.
        filename: The config's, for the messages.
        metrics: Those that the split is evaluated with.
    """
    heads, parts = heads_of(model), list(walk(dataset))
    every = [(getattr(part, 'metainfo', None) or {}).get('classes') for part in parts]
    faults = []
    for classes in every if heads else ():
        if not classes:
            continue
        if fault := _names_fault(classes, split):
            return [fault]  # which numbers are right follows from the names
        faults += [class_fault(name, head.num_classes, split, classes, filename)
                   for name, head in heads.items()]
    faults += [output_fault(name, head) for name, head in heads.items()]
    faults += _ignore_faults(model, heads, parts, split, metrics)
    return list(dict.fromkeys(fault for fault in faults if fault))


def _names_fault(classes: Sequence[str], split: str) -> str | None:
    if isinstance(classes, str):
        return (f'classes of a data set must be a list of names, got the string {classes!r} in '
                f'{split}_dataloader, whose letters mmseg would count; write a list with all '
                f"classes, the rest of the image too, such as ['background', {classes!r}]")
    if len(classes) == 1:
        return ('classes of a data set must be two or more, since a network that tells one class '
                f'from nothing does not learn, got {classes[0]!r} alone in {split}_dataloader; '
                "name the rest of the image too, such as classes=['background', "
                f'{classes[0]!r}], labelled 0 and 1, and set num_classes=2 in each head')
    return None


def class_fault(name: str, number: int, split: str, classes, filename: str) -> str | None:
    """What is wrong with ``num_classes=number`` of a head for a data set of these classes."""
    if number == len(classes):
        return None
    shown = ', '.join(classes[:3]) + ', ...' * (len(classes) > 3)
    return (f'num_classes of a head must be the number of classes of the data set, got {number} '
            f'in model.{name} and {len(classes)} in {split}_dataloader ({shown}), config '
            f'{filename}; set model.{name}.num_classes={len(classes)}, or choose classes in the '
            'dataset by metainfo=dict(classes=...)')


def output_fault(name: str, head) -> str | None:
    """What is wrong with a head of one output channel, which must stand for class 1 of two."""
    if getattr(head, 'out_channels', None) != 1:
        return None
    if head.num_classes == 1:
        return (f'num_classes of a head must be 2 or more, got 1 in model.{name}, whose softmax '
                f'is 1 everywhere, so that the loss is 0; set model.{name}.num_classes=2, and in '
                "the data set classes=['background', ...], labelled 0 and 1")
    losses = head.loss_decode
    losses = losses if isinstance(losses, torch.nn.ModuleList) else [losses]
    wrong = [type(loss).__name__ for loss in losses if not _tells_apart(loss, head)]
    if not wrong:
        return None
    return ('a head with out_channels=1 needs losses that are lower where its output is high on '
            f'class 1, got {", ".join(wrong)} in model.{name}, which is not as it is set; set '
            f"model.{name}.loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True), or leave "
            'out out_channels')


def _tells_apart(loss, head) -> bool:
    """Whether a loss, which is asked, is lower for right outputs of one channel than for wrong."""
    device = next((p.device for p in head.parameters()), None)
    label = torch.tensor([[[0, 1], [1, 0]]], device=device).repeat(1, 4, 4)
    output = 4. * (2 * label[:, None] - 1)
    try:
        with torch.no_grad():
            right, wrong = (loss(x, label, ignore_index=head.ignore_index)
                            for x in (output, -output))
        return bool(right < wrong)
    except Exception:  # as softmax does: `Target 1 is out of bounds`
        return False


def _ignore_faults(model, heads: dict, parts: list, split: str, metrics: Iterable):
    """Where pixels get a value that a head neither knows nor ignores, or a metric counts them."""
    sources = _fillings(model, parts, split) if split == 'train' else []
    for name, head in heads.items():
        number, ignored = head.num_classes, getattr(head, 'ignore_index', 255)
        for value, where, remedy in sources:
            if not 0 <= value < number and value != ignored:
                yield ('pixels that do not count must have the ignore_index of the heads, got '
                       f'{where} and ignore_index={ignored} of model.{name}; '
                       + remedy.format(ignored=ignored, name=name, value=value))
        for metric in metrics:
            value = getattr(metric, 'ignore_index', ignored)
            if value != ignored and not 0 <= ignored < number and not 0 <= value < number:
                yield ('metrics must ignore what the heads ignore, got '
                       f'{type(metric).__name__}(ignore_index={value}) in {split}_evaluator and '
                       f'ignore_index={ignored} of model.{name}; set '
                       f'ignore_index={ignored} in {split}_evaluator')


def _fillings(model, parts: list, split: str) -> list[tuple[int, str, str]]:
    """(value, where it is set, remedy) for each setting that fills labels with a value."""
    found = []
    value = getattr(getattr(model, 'data_preprocessor', None), 'seg_pad_val', None)
    if value is not None:
        found.append((value, f'seg_pad_val={value} of model.data_preprocessor',
                      'set model.data_preprocessor.seg_pad_val={ignored}'))
    for part in parts:
        pipeline = getattr(part, 'pipeline', None) or ()
        for transform in transforms_of(getattr(pipeline, 'transforms', pipeline)):
            settings = {name: getattr(transform, name, None)
                        for name in ('seg_pad_val', 'seg_fill_in')}
            padding = getattr(transform, 'pad_val', None)
            settings['pad_val.seg'] = padding.get('seg') if isinstance(padding, dict) else None
            for name, value in settings.items():
                if value is not None:
                    kind = type(transform).__name__
                    found.append((value, f"{kind}'s {name}={value} in {split}_dataloader",
                                  f'set {name}={{ignored}} in {kind}'))
        if getattr(part, 'reduce_zero_label', False) or 255 in (
                getattr(part, 'label_map', None) or {}).values():
            found.append((255, 'labels in which mmseg sets 255 (reduce_zero_label, or classes '
                          f'chosen by metainfo) in {split}_dataloader',
                          'set model.{name}.ignore_index=255'))
    return found
