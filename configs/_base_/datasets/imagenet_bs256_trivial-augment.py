# The data of torchvision's recipe for ConvNeXt, which the authors use: crops of
# 176, TrivialAugment, random erasing, each image four times in an epoch.
_base_ = './imagenet_bs32.py'
data_preprocessor = dict(
    num_classes=1000,  # for labels of mixed images
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
# TrivialAugment (wide) is one of these, of a strength that is drawn uniformly.
# Translations are of up to 32 of 176 pixels.
policies = [
    dict(type='AutoContrast', prob=0.),  # as it is
    dict(type='AutoContrast'),
    dict(type='Equalize'),
    dict(type='Rotate', magnitude_range=(0, 135)),
    dict(type='Posterize', magnitude_range=(8, 2)),
    dict(type='Solarize', magnitude_range=(256, 0)),
    dict(type='ColorTransform', magnitude_range=(0, 0.99)),
    dict(type='Contrast', magnitude_range=(0, 0.99)),
    dict(type='Brightness', magnitude_range=(0, 0.99)),
    dict(type='Sharpness', magnitude_range=(0, 0.99)),
    dict(type='Shear', magnitude_range=(0, 0.99), direction='horizontal'),
    dict(type='Shear', magnitude_range=(0, 0.99), direction='vertical'),
    dict(type='Translate', magnitude_range=(0, 0.18), direction='horizontal'),
    dict(type='Translate', magnitude_range=(0, 0.18), direction='vertical')
]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=176, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies=policies,
        num_policies=1,
        total_level=30,
        magnitude_level=30,
        magnitude_std='inf',
        hparams=dict(pad_val=0, interpolation='bilinear')),
    # of the images' mean colour, in the order BGR
    dict(
        type='RandomErasing',
        erase_prob=0.1,
        min_area_ratio=0.02,
        max_area_ratio=0.33,
        fill_color=(103.53, 116.28, 123.675)),
    dict(type='PackInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=232, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=256,
    sampler=dict(
        _delete_=True, type='RepeatAugSampler', num_repeats=4, shuffle=True),
    dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
