"""Where torch computes."""

import torch

from .errors import UserError


def pick_device(name: str) -> str:
    """The device to use: `name`, or for auto cuda if there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"`device` must be usable here. Got {name!r}: {error}. Use cpu or auto."
        ) from error
    return name
