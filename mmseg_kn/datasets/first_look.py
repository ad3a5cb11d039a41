"""A short look at the values of labels before a training starts."""
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from .file_checks import label_pixels, rules_of
from .label_values import lone_class_fault, value_fault
from .walk import innermost


class Look(NamedTuple):
    """What was seen: faults of labels with their paths, one of all together, how many of all."""
    faults: list
    lone: str | None
    seen: int
    number: int


def look(dataset, heads: Sequence[tuple[int, int]], seconds: float = 1.) -> Look:
    """Looks at labels in random order, as the pipelines of a dataset load them.

    Datasets that keep no list of files, and those with ``check_files=False``, are passed over.

    Args:
        dataset: Of mmseg's kind, also within wrappers.
        heads: (num_classes, ignore_index) of each head.
        seconds: After which no other label is read, of each dataset within the wrappers.
    """
    faults, total, classes, seen, number = [], 0, None, 0, 0
    for part in innermost(dataset):
        if not getattr(part, 'check_files', True) or not all(
                hasattr(part, name) for name in ('pipeline', 'get_data_info', 'metainfo')):
            continue
        rules, stop = rules_of(part, heads), time.monotonic() + seconds
        if rules.classes is None:
            continue
        # a generator of its own: the training's draws stay as they are
        order = random.Random(0).sample(range(len(part)), len(part))
        number += len(order)
        for index in order:
            sample = part.get_data_info(index)
            pixels = label_pixels(sample, rules)
            if pixels is not None:
                if fault := value_fault(pixels, rules.classes):
                    path = sample.get('seg_map_path') or sample.get('img_path')
                    faults.append(f'{path}: {fault}')
                total = total + pixels
                seen += 1
            classes = rules.classes
            if time.monotonic() > stop:
                break
    lone = lone_class_fault(total, classes) if seen and not faults else None
    return Look(faults, lone, seen, number)
