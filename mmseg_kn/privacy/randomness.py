"""Random numbers that nobody can repeat.

The seed of a training is written into its log and checkpoints. Whoever knows it could take the
noise away, tell who was in which batch, and tell how the dropout of all others shifts when one
item is left out. So nothing of a private training, but its first weights, comes from that seed.
"""
import random
import secrets

import numpy as np
import torch
from mmengine.registry import FUNCTIONS

_WORDS = 624  # of 32 bits: the state of the Mersenne twister


def _words() -> np.ndarray:
    return np.frombuffer(secrets.token_bytes(4 * _WORDS), np.uint32)


def secret_generator(device: torch.device | str = 'cpu') -> torch.Generator:
    """A generator seeded by the operating system.

    torch seeds those of the CPU with 32 bits, which can be tried one after the other: here all of
    the state is drawn.
    """
    generator = torch.Generator(device).manual_seed(secrets.randbits(63))
    if generator.device.type == 'cpu':
        state = generator.get_state()
        # at::CPUGeneratorImplStateLegacy: 24 bytes of others, then the words, 8 bytes each
        words = torch.from_numpy(_words().astype(np.int64))
        state[24:24 + 8 * _WORDS].copy_(words.view(torch.uint8))
        generator.set_state(state)
    return generator


def seed_secretly() -> None:
    """Seeds the generators of torch, numpy and Python that dropout and augmentation draw from."""
    torch.set_rng_state(secret_generator().get_state())
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(secrets.randbits(63))
    np.random.seed(_words())
    random.seed(secrets.token_bytes(64))


@FUNCTIONS.register_module()
def seed_worker_secretly(worker_id: int) -> None:
    """``worker_init_fn`` of a data loader: :func:`seed_secretly`."""
    seed_secretly()
