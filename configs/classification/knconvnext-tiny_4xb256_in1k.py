# The paper's KNConvNeXt. Their script takes TrivialAugment from torchvision.
_base_ = [
    '../_base_/datasets/imagenet_bs256_trivial-augment.py',
    '../_base_/schedules/imagenet_bs1024_adamw_600e.py',
    '../_base_/classification_runtime.py'
]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='KNConvNeXt',
        arch='tiny',
        out_indices=(3, ),
        gap_before_final_norm=True,
        drop_path_rate=0.1),
    neck=dict(type='GlobalAveragePooling'),  # of one position: to (N, 768)
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[
        dict(type='Mixup', alpha=0.2),
        dict(type='CutMix', alpha=1.0)
    ]))
# Every 32 iterations the average moves by 2e-5 * (1024 * 32 / 600).
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', momentum=0.00109, interval=32)
]
