"""Python runs this when it starts, if this folder is on PYTHONPATH: llmquant is registered, then all goes on as usual.

Any Python may meet it, also one without llmquant, so it uses nothing new and says nothing.
"""

import os
import sys


def _register() -> None:
    """Light: neither torch nor transformers is imported before the program does."""
    try:
        import llmquant  # noqa: F401
    except ImportError as error:
        if error.name != "llmquant":
            raise


def _run_the_next() -> None:
    """A `sitecustomize` of the user's own, which this one hides, runs as if this one were not there."""
    here, path, own = os.path.dirname(os.path.abspath(__file__)), sys.path[:], sys.modules.pop(__name__)
    sys.path[:] = [folder for folder in path if os.path.abspath(folder) != here]
    without = sys.path[:]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault(__name__, own)
        if sys.path == without:  # otherwise it arranged the path, and is right
            sys.path[:] = path


try:
    _register()
finally:
    _run_the_next()
