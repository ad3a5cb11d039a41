_base_ = [
    '../_base_/models/knresnet18.py', '../_base_/datasets/cifar100_bs32.py',
    '../_base_/schedules/cifar100_bs32.py',
    '../_base_/classification_runtime.py'
]
model = dict(
    backbone=dict(low_resolution=True), head=dict(num_classes=100))
