"""Compile and register the pretended accelerator of `pretended.cpp`, once in a process."""

import functools
import shutil
from pathlib import Path
from types import ModuleType

import torch

# PyTorch lets a device of one's own be called anything. accelerate refuses fp16 on devices that it has not heard of:
# this one has the name of one that it has.
NAME = "sdaa"


@functools.cache
def device() -> str:
    """Return the device's name for PyTorch."""
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend(NAME)
    source = Path(__file__).with_name("pretended.cpp")
    load("pretended", [str(source)], extra_cflags=["-O0", "-g0"], is_python_module=False)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return NAME


def why_not() -> str | None:
    """Say what is missing for it to be compiled; None where nothing is."""
    missing = [program for program in ("c++", "ninja") if shutil.which(program) is None]
    return f"{' and '.join(missing)} is missing, which compiles the pretended device" if missing else None


def _module() -> ModuleType:
    """What PyTorch, accelerate and transformers ask of `torch.<device>`. Its numbers come from the CPU's generator."""
    module = ModuleType(f"torch.{NAME}")
    module.device_count = lambda: 2
    module.current_device = torch.ops.pretended.current_device
    module.set_device = lambda device: torch.ops.pretended.set_device(torch.device(device).index or 0)
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_rng_state_all = lambda: [torch.get_rng_state()]
    module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_bf16_supported = lambda: True
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(module, name, lambda *_: None)
    module.max_memory_allocated = module.memory_allocated = lambda *_: 0
    return module
