"""Checkpoint files: reading them safely, writing them whole, telling whose they are.

Nothing is imported from here: :mod:`.norm_torch` needs the networks, and the networks need
:mod:`.diagnose`.
"""
