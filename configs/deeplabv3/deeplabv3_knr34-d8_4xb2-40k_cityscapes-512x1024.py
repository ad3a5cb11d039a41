_base_ = './deeplabv3_knr18-d8_4xb2-40k_cityscapes-512x1024.py'
model = dict(backbone=dict(depth=34), decode_head=dict(in_channels=512))
