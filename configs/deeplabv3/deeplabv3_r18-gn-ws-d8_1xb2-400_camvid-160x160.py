_base_ = './deeplabv3_r18-gn-d8_1xb2-400_camvid-160x160.py'
# weight standardization; the heads' conv_cfg is None in the base
model = dict(
    backbone=dict(conv_cfg=dict(type='ConvWS')),
    decode_head=dict(conv_cfg=dict(_delete_=True, type='ConvWS')),
    auxiliary_head=dict(conv_cfg=dict(_delete_=True, type='ConvWS')))
