# The BatchNorm twin: mmseg's ResNet-18 with its usual input, the rest as in
# the KernelNorm config.
_base_ = './fcn_knr18-d8_1xb2-400_camvid-160x160.py'
norm_cfg = dict(type='BN', requires_grad=True)
act_cfg = dict(_delete_=True, type='ReLU')
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='ResNetV1c',
        depth=18,
        out_indices=(2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=norm_cfg,
        style='pytorch',
        contract_dilation=True),
    decode_head=dict(
        in_channels=512,
        conv_cfg=None,
        norm_cfg=dict(_delete_=True, **norm_cfg),
        act_cfg=act_cfg),
    auxiliary_head=dict(
        in_channels=256,
        conv_cfg=None,
        norm_cfg=dict(_delete_=True, **norm_cfg),
        act_cfg=act_cfg))
