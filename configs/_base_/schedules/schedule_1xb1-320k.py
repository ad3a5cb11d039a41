# schedule_40k for 1 image an iteration instead of 8: learning rate / 8,
# iterations x 8, so that as many images are seen.
_base_ = './schedule_40k.py'
optim_wrapper = dict(optimizer=dict(lr=0.00125))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1.25e-5,
        power=0.9,
        begin=0,
        end=320000,
        by_epoch=False)
]
train_cfg = dict(max_iters=320000, val_interval=32000)
default_hooks = dict(checkpoint=dict(interval=32000))
