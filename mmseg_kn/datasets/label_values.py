"""What is wrong with the values of labels: no class, or one class alone."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Classes(NamedTuple):
    """What the values of labels mean.

    ``names`` are the data set's classes; ``index`` is what becomes of the 256 values of a label,
    which its loader may renumber; ``heads`` holds (num_classes, ignore_index) of each head.
    ``own`` says whether the data set's class names no classes, so that metainfo may name any.
    """
    names: Sequence[str]
    index: np.ndarray
    heads: Sequence[tuple[int, int]]
    own: bool

    def ignored(self) -> np.ndarray:
        """Which of the 256 values every head ignores."""
        return np.all([self.index == ignore for _, ignore in self.heads], axis=0)

    def allowed(self) -> np.ndarray:
        """Which of the 256 values are a class or ignored, for every head."""
        return np.all([(self.index < number) | (self.index == ignore)
                       for number, ignore in self.heads], axis=0)

    def wrong(self, pixels: np.ndarray) -> np.ndarray:
        """Which values are neither, given how many pixels have each of the 256."""
        return np.flatnonzero((pixels > 0) & ~self.allowed())


def value_fault(pixels: np.ndarray, classes: Classes | None) -> str | None:
    """Which label values are no class, given how many pixels have each, (256,); or None."""
    if classes is None:
        return None
    wrong = classes.wrong(pixels)
    if not len(wrong):
        return None
    number = len(classes.names)
    valid = np.flatnonzero(classes.allowed() & ~classes.ignored())
    share = pixels[wrong].sum() / pixels.sum()
    values = ', '.join(map(str, wrong[:8])) + ', ...' * (len(wrong) > 8)
    where = 'metainfo=dict(classes=...)' if classes.own else \
        'METAINFO of a dataset class of your own (docs/getting_started.md)'
    remedy = (f'renumber them, or name every class in {where} and set num_classes of the heads '
              'to match')
    if number == 19 and 19 < wrong.max() < 34:  # 19 alone would be a class more
        remedy = ("these look like Cityscapes' labelIds: mmseg's "
                  'tools/dataset_converters/cityscapes.py makes *_labelTrainIds.png of the '
                  'polygons, and seg_map_suffix must name those')
    return (f'labels must be one of {number} classes, {valid.min()} to {valid.max()}, or ignored, '
            f'got {values} in {share:.1%} of its pixels; {remedy}')


def lone_class_fault(pixels: np.ndarray, classes: Classes | None) -> str | None:
    """Says so if the labels of a data set hold one class alone, and ignored pixels; or None.

    A network learns nothing from them, and reaches an mIoU of 100, in which the absent classes
    do not count.

    Args:
        pixels: How many pixels of all labels have each value, (256,).
        classes: Of the data set.
    """
    if classes is None or len(classes.names) < 2:
        return None
    ignored = classes.ignored()
    values = np.flatnonzero((pixels > 0) & ~ignored)
    void = np.flatnonzero((pixels > 0) & ignored)
    if not len(void) or len({int(classes.index[value]) for value in values}) > 1:
        return None
    names = [classes.names[i] for i in dict.fromkeys(classes.index[values].tolist())
             if i < len(classes.names)]
    return (f'labels must hold two classes or more, got only {", ".join(names) or "no class"} '
            f'({", ".join(map(str, values)) or "no value"}) and ignored pixels '
            f'({", ".join(map(str, void))}), from which nothing is learnt; if those are a class, '
            'as in masks of 0 and 255, renumber them with its index')
