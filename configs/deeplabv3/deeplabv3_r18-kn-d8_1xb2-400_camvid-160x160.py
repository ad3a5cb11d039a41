# The architecture of ResNet with kernel normalization.
_base_ = './deeplabv3_knr18-d8_1xb2-400_camvid-160x160.py'
custom_imports = dict(imports=['mmseg_kn.baselines'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNetV1c',
        depth=18,
        out_indices=(2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        conv_cfg=dict(type='KNConv'),
        norm_cfg=dict(type='NoNorm'),
        contract_dilation=True),
    decode_head=dict(in_channels=512),
    auxiliary_head=dict(in_channels=256))
