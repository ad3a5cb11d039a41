# The downsamplings of the backbone and all of the heads are kernel normalized.
# Where ConvNeXt has LayerNorm, it stays; there is no BatchNorm anywhere.
conv_cfg = dict(type='KNConv', activation='relu')
# The stem is a convolution with LayerNorm, and weights of ConvNeXt were trained
# with images that are shifted and scaled.
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
head = dict(
    dropout_ratio=0.1,
    num_classes=19,
    conv_cfg=conv_cfg,
    norm_cfg=None,
    act_cfg=None,
    align_corners=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(type='KNConvNeXt', arch='tiny', drop_path_rate=0.4),
    decode_head=dict(
        type='UPerHead',
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        **head),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=384,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
        **head),
    # model training and testing settings
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
