# The twin with LayerNorm in the downsamplings and BatchNorm in the heads.
_base_ = './knconvnext-atto_upernet_1xb2-1600_camvid-160x160.py'
custom_imports = dict(imports=['mmseg_kn.baselines'])
norm = dict(
    conv_cfg=None,
    norm_cfg=dict(_delete_=True, type='SyncBN'),
    act_cfg=dict(_delete_=True, type='ReLU'))
model = dict(
    backbone=dict(type='LNConvNeXt'), decode_head=norm, auxiliary_head=norm)
