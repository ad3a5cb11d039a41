# The private KNResNet-18 of the paper's Table 4. Weights start by torch's default,
# as in the authors' code.
_base_ = [
    '../_base_/models/knresnet18.py', '../_base_/datasets/imagenet32_dp.py',
    '../_base_/schedules/imagenet32_dp-eps8.py',
    '../_base_/dp_classification_runtime.py'
]
model = dict(
    backbone=dict(
        low_resolution=True,
        activation='mish',
        init_cfg=dict(type='TorchConv', layer='KNConv2d')),
    head=dict(init_cfg=None))
