# The authors' schedule for 32 images an iteration. The cosine steps once an
# epoch.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.0005))
param_scheduler = dict(
    type='CosineAnnealingLR', by_epoch=True, T_max=150, eta_min_ratio=0.01)
train_cfg = dict(by_epoch=True, max_epochs=150, val_interval=1)
val_cfg = dict()
test_cfg = dict()
