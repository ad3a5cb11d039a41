"""Says how private a checkpoint is, and by which account. See --help."""
import argparse

import mmseg_kn  # noqa: F401  before mmengine: it keeps checkpoints from being unpickled freely

# isort: split
from mmengine.runner import CheckpointLoader

from mmseg_kn.privacy.optim_wrapper import ACCOUNTANTS, spent_epsilon

COVERS = """\
Covered: one item of the training data (an image with its labels). Whoever sees the weights, and
those of every earlier checkpoint of this training, learns about as little of any one item as if it
had never been there: probabilities of what they conclude differ by at most a factor
exp(epsilon), but for delta.
Not covered: several images of one person or place (each adds its own epsilon); losses and
accuracies in the log; settings or checkpoints chosen by private data; an earlier training on the
same data, load_from included; noise from a known noise_seed."""


def report(path: str, accountant: str | None = None, delta: float | None = None) -> str:
    """The report of the checkpoint at ``path``; accountant and delta are the training's own.

    Raises:
        ValueError: It was not trained privately, or is damaged.
    """
    meta = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent').get('meta') or {}
    state = meta.get('privacy')
    if state is None:
        raise ValueError(f"{path} holds no account of privacy (meta['privacy']); only trainings "
                         'with DPHook write one')
    accountant = accountant or state['accountant']
    delta = state['target_delta'] if delta is None else delta
    if not 0 < delta < 1:
        raise ValueError(f'delta must be in (0, 1), got {delta}')
    history, repeatable = state['history'], state['noise_seed'] is not None
    epsilon = 'infinite: noise_seed was set' if repeatable else (
        f'{spent_epsilon(accountant, history, delta):.3f}')
    rows = [('epsilon', epsilon),
            ('delta', f'{delta:g}'), ('accountant', f'{accountant} (opacus)')]
    for sigma, rate, steps in history:
        rows += [('noise multiplier (sigma)', f'{sigma:.4f}'),
                 ('sampling rate (q)', f'{rate:.6g}'), ('steps', str(steps))]
    target = state['target_epsilon']
    rows += [('clipping norm (C)', f'{state["max_grad_norm"]:g}, {state["clipping"]}'),
             ('batch, expected', f'{state["batch_size"]} of {state["num_items"]} items'),
             ('planned', f'{state["steps"]} steps' + (
                 '' if target is None else f', epsilon {target:g}'))]
    width = max(len(name) for name, _ in rows)
    return '\n'.join([*(f'{name:{width}}  {value}' for name, value in rows), '', COVERS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Prints epsilon of a private training and what it rests on: noise '
        'multiplier, sampling rate, steps and clipping norm of its checkpoint, the accountant, '
        'and what the guarantee covers.')
    parser.add_argument('checkpoint', help='of a training with DPHook')
    parser.add_argument('--accountant', choices=ACCOUNTANTS, help="by default the training's")
    parser.add_argument('--delta', type=float, help="by default the training's")
    args = parser.parse_args()
    try:
        print(report(args.checkpoint, args.accountant, args.delta))
    except (ValueError, OSError) as error:
        parser.exit(1, f'{error}\n')


if __name__ == '__main__':
    main()
