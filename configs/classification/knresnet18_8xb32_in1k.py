_base_ = [
    '../_base_/models/knresnet18.py', '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256.py',
    '../_base_/classification_runtime.py'
]
