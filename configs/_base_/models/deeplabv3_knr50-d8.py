# KNConv is convolution, normalization and, here, ReLU in one: the heads have
# neither norm_cfg nor act_cfg.
conv_cfg = dict(type='KNConv', activation='relu')
# RGB in [0, 1], neither shifted nor scaled by the data set's statistics.
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[0, 0, 0],
    std=[255, 255, 255],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='KNResNet',
        depth=50,
        # every output passes a normalization of its own: those in use, no more
        out_indices=(2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        zero_init_residual=True),
    decode_head=dict(
        type='ASPPHead',
        in_channels=2048,
        in_index=1,
        channels=512,
        dilations=(1, 12, 24, 36),
        dropout_ratio=0.1,
        num_classes=19,
        conv_cfg=conv_cfg,
        norm_cfg=None,
        act_cfg=None,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=810,
        in_index=0,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        conv_cfg=conv_cfg,
        norm_cfg=None,
        act_cfg=None,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    # model training and testing settings
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
