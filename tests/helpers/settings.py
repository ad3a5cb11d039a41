"""Settings of configs as a flat table."""


def flat(value, prefix=''):
    """{'a.b.0': value} of nested settings."""
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, (list, tuple)) else None)
    if items is None:
        return {prefix: value}
    return {path: leaf for key, part in items
            for path, leaf in flat(part, f'{prefix}.{key}'.lstrip('.')).items()}
