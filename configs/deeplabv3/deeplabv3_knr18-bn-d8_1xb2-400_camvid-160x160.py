# The architecture of KNResNet with BatchNorm, which takes its usual input.
_base_ = './deeplabv3_r18-d8_1xb2-400_camvid-160x160.py'
custom_imports = dict(imports=['mmseg_kn.baselines'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='NormKNResNet',
        depth=18,
        out_indices=(2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=dict(type='BN')),
    decode_head=dict(in_channels=724),
    auxiliary_head=dict(in_channels=512))
