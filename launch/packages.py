"""Check the packages that the programs need beyond grass_ds, at their start: one message instead of a name that is missing later."""

from __future__ import annotations

from importlib.util import find_spec

REMEDY = "pip install 'grass_ds[launch]', which wants transformers>=5.3,<6 and datasets>=4.0,<6"


def check() -> None:
    """Raise ImportError if datasets is not installed, or transformers lacks what `launch.trainer` overrides (before 5.3)."""
    if find_spec("datasets") is None:
        raise ImportError(f"the programs in launch/ need datasets, which is not installed: {REMEDY}")
    import deepspeed  # noqa: F401  # before transformers: some of their releases import each other in a circle
    import transformers

    if not hasattr(transformers.Trainer, "_run_epoch"):
        raise ImportError(
            f"the programs in launch/ need transformers.Trainer._run_epoch, which transformers {transformers.__version__} does not have: "
            f"{REMEDY}"
        )


check()
