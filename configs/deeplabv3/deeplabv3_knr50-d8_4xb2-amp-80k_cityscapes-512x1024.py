_base_ = './deeplabv3_knr50-d8_4xb2-80k_cityscapes-512x1024.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
