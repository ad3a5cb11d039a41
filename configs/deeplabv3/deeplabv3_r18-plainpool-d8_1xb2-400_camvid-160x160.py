# BatchNorm that trains with one image: no normalization in the pooling branch.
_base_ = './deeplabv3_r18-d8_1xb2-400_camvid-160x160.py'
custom_imports = dict(imports=['mmseg_kn.baselines'])
model = dict(decode_head=dict(type='PlainPoolASPPHead'))
