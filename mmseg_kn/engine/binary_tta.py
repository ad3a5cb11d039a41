"""Lets test-time augmentation of a segmentor with one output average its probabilities."""
import torch
from mmseg.models import SegTTAModel
from torch import nn

_merge_preds = SegTTAModel.merge_preds


def setup() -> None:
    """Replaces ``SegTTAModel.merge_preds`` for ``out_channels=1``; a second call changes nothing.

    mmseg's takes the sigmoid of ``seg_logits``, which with one output are probabilities already
    (``BaseSegmentor.postprocess_result``). It finds at least 0.5 everywhere, which is foreground
    for thresholds below that, as the default 0.3. So it is in mmsegmentation 1.2.2 and
    onedl-mmsegmentation 1.4.2.
    """
    SegTTAModel.merge_preds = merge_preds


def merge_preds(self, data_samples_list: list[list]) -> list:
    """One prediction for each image, of those of its augmentations.

    Args:
        data_samples_list: For each image the samples of its augmentations, ``seg_logits``
            (1, H, W) with probabilities, turned back to the image.
    """
    if self.module.out_channels > 1:
        return _merge_preds(self, data_samples_list)
    head = self.module.decode_head
    threshold = (head[-1] if isinstance(head, nn.ModuleList) else head).threshold
    predictions = []
    for samples in data_samples_list:
        # The last sample is the result, as mmseg has it.
        first, merged = samples[0], samples[-1]
        probability = torch.stack([s.seg_logits.data for s in samples]).mean(0)
        merged.pred_sem_seg.data = (probability > threshold).to(probability)
        if 'gt_sem_seg' in first:
            merged.gt_sem_seg = first.gt_sem_seg
        merged.set_metainfo(dict(img_path=first.img_path))
        predictions.append(merged)
    return predictions
