"""Compiles every Triton kernel for GPUs that need not be there; prints registers and spills.

A process of its own, since tests on a machine without a GPU interpret the kernels instead:

    TRITON_INTERPRET=0 python tools/dev/compile_kernels.py
"""
import inspect
import itertools
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmseg_kn.ops import triton_kernels as kernels
from mmseg_kn.ops import triton_passes as passes

# Pointers of each kernel that are not of the activations' dtype
MAPS = {
    'channel_sums': dict(maps_ptr='*fp64', seed_ptr='*i64'),
    'moments': dict(maps_ptr='*fp64', live_ptr='*i8'),
    'normalize': {},
    'scale_grad': {},
    'add_moment_grads': dict(seed_ptr='*i64'),
}
ACTIVATIONS = {'x_ptr', 'dx_ptr', 'z_ptr', 'y_ptr', 'residual_ptr', 'grad_ptr', 'kept_ptr',
               'h_ptr'}
FLOATS = {'q', 'excess', 'eps', 'inv_k'}
# Flags of each kernel beside all on: other code, not less of it
VARIANTS = {
    'channel_sums': [dict(DROPOUT=False)],
    'scale_grad': [dict(RELU=False), dict(RELU=False, HAS_Y=False)],
    'add_moment_grads': [dict(DROPOUT=False)],
}
SIZES = dict(P=passes.PIXELS, C4=passes.CHANNELS, B=passes.OUTPUTS)


def compile_kernel(name: str, dtype: str, capability: int,
                   unit_stride: str, flags: dict[str, bool]) -> tuple[int, int]:
    """Registers and spilled bytes of ``name``; one stride is known to be 1.

    Options are on but for those that ``flags`` turns off.
    """
    kernel = getattr(kernels, name)
    signature, constants = {}, {}
    for parameter in inspect.signature(kernel.fn).parameters.values():
        key = parameter.name
        if parameter.annotation is triton.language.constexpr:
            signature[key] = 'constexpr'
            constants[key] = {**SIZES, **flags}.get(key, True)
            if name == 'moments' and key == 'P':
                constants[key] = 128
        elif key == unit_stride:
            signature[key], constants[key] = 'constexpr', 1
        elif key.endswith('_ptr'):
            signature[key] = MAPS[name].get(key, f'*{dtype}' if key in ACTIVATIONS else '*fp32')
        elif key in FLOATS:
            signature[key] = 'fp32'
        else:
            wide = key in ('threshold', 'stride_n', 'pixels', 'units')
            signature[key] = 'i64' if wide else 'i32'
    target = GPUTarget('cuda', capability, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
    return resources(compiled.asm['cubin'])


def resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name],
                                capture_output=True, text=True, check=True).stdout
    # spilled registers lie on the stack, which these kernels do not use otherwise
    return tuple(int(re.search(rf'{what}:(\d+)', report)[1]) for what in ('REG', 'STACK'))


def main() -> None:
    print(f'{"kernel":18} {"options":17} {"dtype":6} {"layout":14} {"sm":4} {"registers":10} '
          'spilled bytes')
    for name in MAPS:
        for flags in ({}, *VARIANTS.get(name, ())):
            # what the flags change does not depend on dtype and layout: one of each
            layouts = [('channels_first', 'stride_p'), ('channels_last', 'stride_c')]
            dtypes = ('fp32', ) if name == 'moments' or flags else ('fp32', 'fp16', 'bf16')
            options = ' '.join(f'no {flag}' for flag in flags) or 'all'
            for dtype, (layout, unit_stride), capability in itertools.product(
                    dtypes, layouts[:1] if flags else layouts, (80, 90)):
                registers, spilled = compile_kernel(name, dtype, capability, unit_stride, flags)
                print(f'{name:18} {options.replace(" ", "_"):17} {dtype:6} {layout:14} '
                      f'{capability:<4} {registers:<10} {spilled}')


if __name__ == '__main__':
    main()
