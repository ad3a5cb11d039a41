_base_ = './fcn_knr50-d32_4xb3-484e_cityscapes-512x1024.py'
model = dict(
    backbone=dict(depth=34), decode_head=dict(in_channels=512))
