# CamVid (480 x 360) in Cityscapes layout and with Cityscapes train ids: sky 10,
# building 2, pole 5, road 0, sidewalk 1, vegetation 8, traffic sign 7, fence 4,
# car 13, person 11, rider 12, void 255. IoUMetric reports nan for the other
# eight and leaves them out of the mean, unless one is predicted somewhere.
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
