"""The one place that chooses which implementation of an operation runs.

Every public operation of ``memlm.cuda`` has a ``reference`` (the readable formula), an ``eager``
(fast torch) and possibly faster implementations. The environment variable ``MEMLM_KERNELS`` forces
one of them by name; ``auto`` (the default) takes the fastest one that is available.
"""

import logging
import os
from collections.abc import Callable, Mapping

from memlm.errors import UserError, nearest

logger = logging.getLogger(__name__)

VARIABLE = "MEMLM_KERNELS"
SPEED_ORDER = ("cuda", "triton", "native", "eager", "reference")  # fastest first

_logged: set[tuple[str, str]] = set()


def choose(operation: str, implementations: Mapping[str, Callable | str]) -> Callable:
    """Return the implementation of `operation` that ``MEMLM_KERNELS`` asks for.

    Args:
        operation: name of the operation, used in messages.
        implementations: from a name of `SPEED_ORDER` to a callable, or to a string that says why
            this implementation is unavailable here.

    Raises:
        UserError: ``MEMLM_KERNELS`` is not ``auto`` or a name of `SPEED_ORDER`.
        RuntimeError: the forced implementation is unavailable; the message names the reason.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "auto":
        return _fastest(operation, implementations)
    if wanted not in SPEED_ORDER:
        options = ("auto", *reversed(SPEED_ORDER))
        raise UserError(
            f"{VARIABLE}={wanted} is not one of {', '.join(options)}{nearest(wanted, options)}"
        )
    found = implementations.get(wanted, "it has no such implementation")
    if isinstance(found, str):
        raise RuntimeError(f"{VARIABLE}={wanted} is unavailable for {operation}: {found}")
    return found


def _fastest(operation: str, implementations: Mapping[str, Callable | str]) -> Callable:
    for name in SPEED_ORDER:
        found = implementations.get(name)
        if callable(found):
            if (operation, name) not in _logged:
                _logged.add((operation, name))
                logger.info("%s: using the %s implementation", operation, name)
            return found
    raise RuntimeError(f"{operation} has no available implementation")
