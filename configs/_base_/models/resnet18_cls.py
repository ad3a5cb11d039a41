# A twin: mmseg's ResNet, of the same depths and stems.
_base_ = './knresnet18.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNetCls',
        depth=18,
        norm_cfg=dict(type='GN', num_groups=32)))
