# schedule_40k for 2 images an iteration instead of 8: learning rate / 4,
# iterations x 4, so that as many images are seen.
_base_ = './schedule_40k.py'
optim_wrapper = dict(optimizer=dict(lr=0.0025))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=2.5e-5,
        power=0.9,
        begin=0,
        end=160000,
        by_epoch=False)
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
