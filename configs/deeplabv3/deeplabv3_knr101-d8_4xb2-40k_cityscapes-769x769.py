_base_ = './deeplabv3_knr50-d8_4xb2-40k_cityscapes-769x769.py'
model = dict(backbone=dict(depth=101))
