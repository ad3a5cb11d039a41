# CamVid (480 x 360) in Cityscapes layout and with Cityscapes train ids: 11 of
# the 19 classes occur, IoUMetric reports nan for the others and averages over
# the ones that do.
_base_ = './cityscapes.py'
data_root = 'data/camvid/'
img_suffix = '_leftImg8bit.jpg'
crop_size = (360, 360)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(480, 360),
        ratio_range=(0.5, 2.0),
        keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    # the ground truth keeps its size, so it is loaded after Resize
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root, img_suffix=img_suffix, pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root, img_suffix=img_suffix, pipeline=test_pipeline))
test_dataloader = val_dataloader
