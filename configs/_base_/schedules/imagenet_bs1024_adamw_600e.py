# The authors' schedule of ConvNeXt, which is torchvision's recipe.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=5),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=595,
        begin=5,
        end=600,
        eta_min=0)
]
train_cfg = dict(by_epoch=True, max_epochs=600, val_interval=1)
val_cfg = dict()
test_cfg = dict()
