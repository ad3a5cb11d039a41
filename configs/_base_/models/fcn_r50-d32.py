# The authors' fully convolutional ResNet: torchvision's, not mmseg's V1c, and a
# 3x3 convolution to 512 channels, normalization, ReLU, dropout, 1x1.
_base_ = './fcn_r50-d8.py'
model = dict(
    backbone=dict(
        type='ResNet',
        out_indices=(3, ),
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        zero_init_residual=False),
    decode_head=dict(
        type='PaperFCNHead',
        in_index=0,
        num_convs=1,
        concat_input=False,
        init_cfg=dict(
            type='Kaiming',
            layer='Conv2d',
            mode='fan_out',
            nonlinearity='relu')),
    auxiliary_head=None)
