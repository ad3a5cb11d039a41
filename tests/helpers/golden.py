"""What the paper authors' code (repository norm-torch) computes, in float64, as fingerprints.

A fingerprint of an array is its 2-norm and its first, middle and last element. Inputs and
weights come from numpy's RandomState, whose stream is frozen.
"""
import zlib

import numpy as np
import torch


def fingerprint(array):
    flat = array.detach().double().reshape(-1)
    return [flat.norm().item(), *(flat[i].item() for i in (0, flat.numel() // 2, -1))]


def parameter(name, shape, dtype=np.float64):
    """N(0, 2 / fan_in) for weights, 0.1 * N(0, 1) for biases, seeded by the name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    scale = (2.0 / np.prod(shape[1:]))**0.5 if len(shape) > 1 else 0.1
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(dtype))


def signal(shape, seed=0, dtype=np.float64):
    """Standard normal feature map of ``shape`` (N, C, H, W)."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(dtype))


def image(shape, seed=0):
    """Uniform [0, 1) images of ``shape`` (N, C, H, W), float32."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


# Their ImageNet models: channels of the stem; (channels, inner channels, blocks) of each stage;
# channels after the tail, before the linear layer.
NORM_TORCH = {
    18: (64, [(64, 256, 2), (256, 256, 2), (512, 512, 1), (724, 724, 1)], 512),
    34: (64, [(64, 256, 4), (256, 320, 5), (512, 640, 3), (512, 843, 2)], 512),
    50: (256, [(256, 64, 4), (512, 128, 5), (810, 201, 4), (2048, 512, 2)], 2048),
}


def norm_torch_weights(depth, num_classes=1000, stem_kernel=7, dtype='float32'):
    """A state dict as their released checkpoints name it, of parameter()."""
    stem, stages, last = NORM_TORCH[depth]
    shapes = {'block0.0': (stem, 3, stem_kernel, stem_kernel)}
    previous, block = stem, 0
    for i, (channels, inner, blocks) in enumerate(stages):
        pointwise = depth == 50 and i == 3
        name, kernel = ('.conv1x1', (1, 1)) if pointwise else ('', (2, 2))
        if i > 0:
            shapes[f'trans_block{i}.conv{name}'] = (channels, previous, *kernel)
        for _ in range(blocks):
            block += 1
            shapes[f'res_block{block}.conv1{name}'] = (inner, channels, *kernel)
            if depth == 50:
                shapes[f'res_block{block}.conv2'] = (inner, inner, 3, 3)
            final = 3 if depth == 50 else 2
            shapes[f'res_block{block}.conv{final}{name}'] = (channels, inner, *kernel)
        previous = channels
    if depth != 50:
        shapes['conv_block_f.conv'] = (last, previous, 2, 2)
    shapes['fc'] = (num_classes, last)
    weights = {}
    for name, shape in shapes.items():
        for key, size in ((f'{name}.weight', shape), (f'{name}.bias', shape[:1])):
            weights[key] = parameter(key, size, dtype)
    return weights


# torchvision's sizes of ConvNeXt, which norm-torch takes over: blocks and channels of each stage.
CONVNEXT = {
    'tiny': ((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': ((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': ((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def convnext_shapes(arch='tiny', source='norm-torch', num_classes=1000):
    """Names and shapes of a ConvNeXt: norm-torch's KNConvNeXt, torchvision's, or mmpretrain's."""
    blocks, channels = CONVNEXT[arch]
    shapes = {}

    def layer(name, *shape):
        shapes.update({f'{name}.weight': shape, f'{name}.bias': shape[:1]})

    theirs = source == 'mmpretrain'
    stem = 'backbone.downsample_layers.0' if theirs else 'features.0'
    layer(f'{stem}.0', channels[0], 3, 4, 4)
    layer(f'{stem}.1', channels[0])
    for i, (count, c) in enumerate(zip(blocks, channels, strict=True)):
        opening = f'backbone.downsample_layers.{i}' if theirs else f'features.{2 * i}'
        if i and source != 'norm-torch':
            layer(f'{opening}.0', channels[i - 1])
        if i:
            layer(f'{opening}.1', c, channels[i - 1], 2, 2)
        for j in range(count):
            block = f'backbone.stages.{i}.{j}' if theirs else f'features.{2 * i + 1}.{j}'
            parts = ['block.0', 'block.2', 'block.3', 'block.5']
            if theirs:
                parts = ['depthwise_conv', 'norm', 'pointwise_conv1', 'pointwise_conv2']
            shapes.update({f'{block}.gamma': (c, )} if theirs else {
                f'{block}.layer_scale': (c, 1, 1)})
            for part, shape in zip(parts, ((c, 1, 7, 7), (c, ), (4 * c, c), (c, 4 * c)),
                                   strict=True):
                layer(f'{block}.{part}', *shape)
    layer('backbone.norm3' if theirs else 'classifier.0', channels[-1])
    layer('head.fc' if theirs else 'classifier.2', num_classes, channels[-1])
    return shapes


def convnext_weights(shapes):
    """parameter() of each, but scales 0.2 |p| and the weights of LayerNorms 1 + 0.1 p."""
    weights = {name: parameter(name, shape) for name, shape in shapes.items()}
    for name, value in weights.items():
        if name.endswith(('layer_scale', 'gamma')):
            weights[name] = 0.2 * value.abs()
        elif name.endswith('weight') and value.dim() == 1:
            weights[name] = 1 + 0.1 * value
    return weights


# in_channels, out_channels, kernel_size, stride, padding, groups, bias; input (2, C, 11, 9),
# upstream gradient signal(y.shape, seed=1). Paddings of 4 are (left, right, top, bottom).
KN_CONV = {
    'knconv_3x3': dict(
        args=(6, 8, (3, 3), (1, 1), (1, 1), 1, True),
        y=[54.0200265712448, -1.51794237159353, 0.748929493169641, 1.52353405503673],
        grad_x=[56.2336540820946, 0.122907539867764, -1.72765992844567, -0.942491591606073],
        grad_weight=[298.91963846167, 7.96777694937608, 2.69874107968433, 22.1513485414425],
        grad_bias=[50.7706496907152, 24.3685160080589, 28.5159991518037, -18.6177269310934],
    ),
    'knconv_2x2_grow': dict(
        args=(6, 8, (2, 2), (1, 1), (1, 1), 1, True),
        y=[55.3997664058006, 0.214234101606087, -1.70177484357153, 1.82758364863034],
        grad_x=[60.2557285906886, -0.332176290999615, 1.87068760688693, -2.05166117673014],
        grad_weight=[237.701961800981, -13.704845684909, 24.1112565971037, -22.7936606594414],
        grad_bias=[44.8453082010735, -4.64642311281281, 15.9862945040245, 15.1778828668301],
    ),
    'knconv_2x2_shrink': dict(
        args=(6, 8, (2, 2), (1, 1), (0, 0), 1, True),
        y=[58.8153943822426, -2.39251284338349, 1.92649184972473, -1.04040101999832],
        grad_x=[60.6031236396632, -0.349367326423143, -2.71640014188242, -1.20437757572804],
        grad_weight=[169.261843494327, 6.18491167791475, 18.9397882524176, 0.436879920742219],
        grad_bias=[46.2813931360933, 2.92587244550967, -15.9776914488386, 27.1100036214518],
    ),
    'knconv_2x2_pad_left_top': dict(
        args=(6, 8, (2, 2), (1, 1), (1, 0, 1, 0), 1, True),
        y=[62.4662395853534, 1.53631511927575, 0.127837556217776, -0.461162156198396],
        grad_x=[60.7597550963553, -2.19915353190984, 1.26516912247062, -0.464421833399298],
        grad_weight=[183.747470975467, 8.42088543355358, 2.9435010558289, 9.48512684919123],
        grad_bias=[50.7706496907152, 24.3685160080589, 28.5159991518037, -18.6177269310934],
    ),
    'knconv_7x7_s2': dict(
        args=(3, 8, (7, 7), (2, 2), (3, 3), 1, True),
        y=[30.1096652006456, -0.354672664066416, -0.733731002508785, 3.7025668512808],
        grad_x=[30.7902228156031, -1.43207384744109, -0.0379050421299172, -0.470607542231906],
        grad_weight=[257.927701304684, -2.46260742452178, -5.8691573751486, -0.999607971377202],
        grad_bias=[21.7646107951203, -2.73490823542665, 4.19216166493037, 2.39350073709914],
    ),
    'knconv_3x3_s2_nobias': dict(
        args=(4, 6, (3, 3), (2, 2), (1, 1), 1, False),
        y=[26.6371052194791, 1.00938021555581, 1.82812116471389, 0.41893217182123],
        grad_x=[25.4612567074853, -0.616179024938593, -1.43045816926702, -0.0374562380165017],
        grad_weight=[108.766783054972, -4.87331258198166, 4.17278736434947, 0.883063126673752],
    ),
    'knconv_3x3_groups2': dict(
        args=(6, 8, (3, 3), (1, 1), (1, 1), 2, True),
        y=[59.2491935727542, 1.12758097663024, -0.252883409922485, 0.906035319700929],
        grad_x=[62.8781730027415, -0.259846084613352, -1.48168406569262, -0.00752013221479367],
        grad_weight=[224.876208808649, 7.96777694937608, 1.91863957405893, 22.1513485414425],
        grad_bias=[50.7706496907152, 24.3685160080589, 28.5159991518037, -18.6177269310934],
    ),
    'knconv_1x1': dict(
        args=(6, 8, (1, 1), (1, 1), (0, 0), 1, True),
        y=[63.8378262854357, 0.179807692827761, 0.125285864966981, 0.0653394325115104],
        grad_x=[69.7812893295895, 3.88055341530644, -1.24243490298838, 0.253157399276917],
        grad_weight=[87.5972853083557, 8.45125707591721, 3.72054250793752, 14.1814775813584],
        grad_bias=[50.7706496907152, 24.3685160080589, 28.5159991518037, -18.6177269310934],
    ),
}

# kernel_size, stride, padding; input (2, 5, 9, 8), upstream gradient as above.
KERNEL_NORM = {
    'kernelnorm_3x3_s1_p1': dict(
        args=((3, 3), (1, 1), (1, 1)),
        y=[80.4978801755303, -0.178010463029911, 0.329692490625121, -0.14137461299092],
        grad_x=[84.1546236753702, -3.73732675941678, 4.1207393595487, 2.15302292728853],
    ),
    'kernelnorm_2x2_s2': dict(
        args=((2, 2), (2, 2), (0, 0)),
        y=[25.2980747190428, 1.49943705974267, 1.38476002999159, 0.356500379310548],
        grad_x=[25.9962974497834, 0.895503786087891, -0.227816268817508, 0.0],
    ),
    'kernelnorm_3x2_s2x1': dict(
        args=((3, 2), (2, 1), (0, 0)),
        y=[40.9875757552836, 1.52443771632457, 1.55791881603067, -0.743690594406182],
        grad_x=[41.9049464048087, 1.47352326369613, 1.5002477016894, 1.66377726165756],
    ),
    'kernelnorm_1x1': dict(
        args=((1, 1), (1, 1), (0, 0)),
        y=[26.832405827938, 0.687541040654469, 1.06938913666757, -0.0521253515666714],
        grad_x=[35.0773483100884, 1.2445224480383, -0.973284682760626, -0.491722351007291],
    ),
}

# Mean of 40,000 passes of a 3x3 KNConv2d, 16 to 8 channels, padding 1, with dropout 0.25 left
# on, over relu(signal((1, 16, 12, 12), seed=3, float32)): [0, :, 5, 5] and [0, 0, 0, :4].
EXPECT_CENTRE = [-2.1619, 0.691547, -2.730355, -0.157221, 0.16417, 0.940822, -0.059922, 0.855934]
EXPECT_CORNER = [-1.222672, 0.196176, -1.299731, -0.109126]

# Logits of their ImageNet models with norm_torch_weights, without dropout, over
# image((2, 3, 128, 160)).
LOGITS = {
    18: [40.3866635258151, 0.0805693041093944, 1.11850157289177, -0.939049352787963],
    34: [38.4795238701291, 0.0749335757093434, 0.915243726874187, -0.0656315152225387],
    50: [28.0377118892548, 0.42676320967927, 0.619637160918663, -0.645141250717445],
}

# Logits of their knconvnext_tiny with convnext_weights, over image((2, 3, 96, 128)), and of the
# KNResNet-18 with Mish of their repository dp-torch with norm_torch_weights in float64, over
# image((2, 3, 64, 64))[:, :, :32, :32]; without dropout.
LOGITS_KNCONVNEXT_TINY = [
    65.6956611449177, -2.27702951800551, -2.08893131784697, -1.19374426943789]
LOGITS_MISH = [
    19.7161714841706, 0.144712637028918, 0.174384703944409, -0.203219856995606]

# The same for their models of low resolution with 10 classes, over image((2, 3, 33, 40)), in an
# independent transcription of their published code.
LOGITS_LOW_RESOLUTION = {
    18: [3.11075857818429, 0.650083201012881, 0.554098182969209, -0.80540527872622],
    34: [3.71557507422862, 0.911623212173681, 0.957549218309468, -1.11636334174967],
    50: [2.90903526700595, 0.329872768933307, 0.426956617908444, -0.115732627957453],
}

# Their blocks: fingerprints of image 0, every (C // 16)th channel. 'kn_f' is the final KernelNorm.
BLOCKS = {
    18: {
        'block0': [327.5585, 0.484907, 2.84887, 2.690238],
        'res_block2': [456.1356, 1.408665, 2.270101, 2.839137],
        'trans_block1': [120.5871, 2.615579, 1.56012, 2.617035],
        'res_block5': [78.6061, 4.263663, 0.5436745, 4.298562],
        'trans_block3': [35.5897, 1.005655, 0.6781754, 1.59471],
        'res_block6': [47.96128, 4.195856, -0.4269434, 0.3280865],
        'conv_block_f': [7.832733, 2.465268, -1.387588, 0.8295671],
        'kn_f': [5.428477, 1.724349, -0.9698293, 0.5977513],
    },
    34: {
        'res_block4': [542.9361, 1.622453, -0.6894414, 4.45708],
        'res_block12': [106.849, 3.24677, -0.3708211, 0.4529356],
        'trans_block3': [34.94215, 0.8965833, 0.8959532, 0.8918317],
        'res_block14': [55.848, 0.4402013, 2.94578, -0.8877212],
        'conv_block_f': [7.691418, -1.205098, 0.2999021, -0.1015352],
        'kn_f': [5.381069, -0.8185638, 0.258368, -0.09830916],
    },
    50: {
        'res_block4': [524.8055, -1.116252, -0.3650972, 0.9233406],
        'res_block9': [276.0176, 0.8334545, -0.1996761, -0.5404554],
        'res_block13': [117.0388, 2.99066, 1.88473, 3.610682],
        'res_block15': [42.88813, 1.46057, 0.4854523, 1.191325],
        'kn_f': [16.73109, 0.008192292, -0.4269489, -0.09881898],
    },
}
