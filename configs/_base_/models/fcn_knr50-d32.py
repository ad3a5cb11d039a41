# The fully convolutional network of the paper's Table 3, at output stride 32 and
# with one head. The authors never published its KernelNorm form: KNResNet as a
# backbone, and KNConv in place of convolution, normalization and ReLU in the head,
# are inferred.
_base_ = './fcn_knr50-d8.py'
model = dict(
    backbone=dict(
        out_indices=(3, ),
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        zero_init_residual=False),
    decode_head=dict(
        type='PaperFCNHead',
        in_index=0,
        num_convs=1,
        concat_input=False,
        init_cfg=dict(
            type='Kaiming',
            layer='Conv2d',
            mode='fan_out',
            nonlinearity='relu')),
    auxiliary_head=None)
