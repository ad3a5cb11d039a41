# A small experiment with differentially private SGD.
_base_ = './schedule_dp_2k.py'
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-3,
        power=0.9,
        begin=0,
        end=200,
        by_epoch=False)
]
train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
