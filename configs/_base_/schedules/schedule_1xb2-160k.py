# schedule_80k for one GPU with 2 images an iteration instead of 8: the learning
# rate is a quarter. It sees half as many images.
_base_ = './schedule_80k.py'
optim_wrapper = dict(optimizer=dict(lr=0.0025))
param_scheduler = [
    dict(_base_.param_scheduler[0], eta_min=2.5e-5, end=160000)
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
