"""DoRA and LoRA for transformers' models: adapt, train, evaluate, probe, merge, and fast layers for PEFT's models.

The names below are imported when they are first used, so `import dora_nb` is quick. Everything else is in the parts
of the package: layers, data, models, training, curvature, runs and results.
"""

import importlib
import importlib.util

__version__ = "0.2.0"

_PUBLIC = {
    "layers.linear": ("DoRALinear", "LoRALinear"),
    "data.assets": ("load_model",),
    "data.tasks": ("TASKS", "Task", "load_task"),
    "data.items": ("check_items",),
    "data.tokens": ("check_tokens",),
    "models.methods": ("METHODS", "AdapterConfig", "Method"),
    "models.adapt": ("adapt", "count_parameters", "trainable_parameters"),
    "models.magnitude": ("parameter_groups",),
    "models.merge": ("merge", "remove_adapter", "unmerge"),
    "models.disable": ("disable_adapter",),
    "models.adapter_files": ("load_adapter", "save_adapter"),
    "models.compress": ("compress",),
    "models.peft": ("accelerate", "restore"),
    "training.config": ("TrainConfig",),
    "training.train": ("train",),
    "training.evaluate": ("evaluate",),
    "curvature.probe": ("probe",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_NEEDS = {"models.peft": "peft"}  # module → a library that may not be installed; its names are then not listed
_LISTED = (n for n, m in _HOME.items() if m not in _NEEDS or importlib.util.find_spec(_NEEDS[m]))
__all__ = ["__version__", *sorted(_LISTED)]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
