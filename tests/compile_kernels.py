"""Compiles every Triton kernel for GPUs that need not be there; prints registers and spills.

A process of its own, since tests on a machine without a GPU interpret the kernels instead:

    TRITON_INTERPRET=0 python tests/compile_kernels.py
"""
import inspect
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmseg_kn.ops import triton_kernels as kernels

# Pointers of each kernel that are not of the activations' dtype
MAPS = {
    '_channel_sums': dict(maps_ptr='*fp64', seed_ptr='*i64'),
    '_moments': dict(maps_ptr='*fp64', live_ptr='*i8'),
    '_normalize': {},
    '_scale_grad': {},
    '_add_moment_grads': dict(seed_ptr='*i64'),
}
ACTIVATIONS = {'x_ptr', 'dx_ptr', 'z_ptr', 'y_ptr', 'residual_ptr', 'grad_ptr', 'saved_ptr',
               'h_ptr'}
FLOATS = {'q', 'factor', 'eps', 'inv_k'}
SIZES = dict(P=kernels.PIXELS, C4=kernels.CHANNELS, B=kernels.OUTPUTS)


def compile_kernel(name: str, dtype: str, capability: int,
                   unit_stride: str) -> tuple[int, int]:
    """Registers and spilled bytes of ``name``, all options on; one stride is known to be 1."""
    kernel = getattr(kernels, name)
    signature, constants = {}, {}
    for parameter in inspect.signature(kernel.fn).parameters.values():
        key = parameter.name
        if parameter.annotation is triton.language.constexpr:
            signature[key] = 'constexpr'
            constants[key] = SIZES.get(key, True)
            if name == '_moments' and key == 'P':
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
    print(f'{"kernel":18} {"dtype":6} {"layout":14} {"sm":4} {"registers":10} spilled bytes')
    for name in MAPS:
        for dtype in ('fp32',) if name == '_moments' else ('fp32', 'fp16', 'bf16'):
            for layout, unit_stride in (('channels_first', 'stride_p'),
                                        ('channels_last', 'stride_c')):
                for capability in (80, 90):
                    registers, spilled = compile_kernel(name, dtype, capability, unit_stride)
                    print(f'{name:18} {dtype:6} {layout:14} {capability:<4} {registers:<10} '
                          f'{spilled}')


if __name__ == '__main__':
    main()
