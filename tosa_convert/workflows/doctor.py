"""What this machine can do, on one screen: for issues, and for people who ask why it is slow."""

import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from tosa_convert.base.environment import instructions, int8_instructions, machine
from tosa_convert.base.errors import gist
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import processors
from tosa_convert.export.quiet import silence
from tosa_convert.export.runtimes import PRECISIONS, missing, providers
from tosa_convert.export.self_test import try_export

HUB = "https://huggingface.co"
PATIENCE = 5.0
"""Seconds to wait for the hub."""
WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd")
"""Instructions for float numbers that are worth a word."""


def examine_machine(progress: Progress) -> dict:
    """Each thing looked at → {"value": what was found, "advice": what could be done, or nothing}."""
    looks: dict[str, Callable[[], tuple[str, str]]] = {
        "tosa-convert": _tool,
        "Python": lambda: (f"{platform.python_version()}, {platform.system()} {platform.machine()}", ""),
        "processor": _processor,
        "threads": _threads,
        "memory": _memory,
        "GPU": _gpu,
        "libraries": _libraries,
        "runtimes": _runtimes,
        "torch.compile": _compiler,
        "export and INT8": _export,
        "weights": _weights,
    }
    found = {}
    with progress.track("look", len(looks)) as advance:
        for name, look in looks.items():
            try:
                value, advice = look()
            except Exception as error:  # what does not work is what people come for
                value, advice = f"does not work: {gist(error)}", ""
            found[name] = {"value": value, "advice": advice}
            advance()
    return found


def _tool() -> tuple[str, str]:
    return f"{machine().get('tosa-convert')} in {Path(sys.prefix)}", ""


def _processor() -> tuple[str, str]:
    found = [*int8_instructions(), *(name for name in WIDE if name in instructions())]
    slow = "" if int8_instructions() or not instructions() else "no VNNI: INT8 gains little here, see export and INT8"
    return f"{machine()['cpu']}: {', '.join(found) or 'instructions unknown'}", slow


def _threads() -> tuple[str, str]:
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    advice = "" if waiting.upper() == "PASSIVE" else "set OMP_WAIT_POLICY=PASSIVE: small models are slowed by spinning"
    return f"{processors()} usable, torch takes {torch.get_num_threads()}, OMP_WAIT_POLICY {waiting}", advice


def _memory() -> tuple[str, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return (
        f"{total:.0f} GiB, and {free:.0f} GiB free on disk here",
        "" if free > 2 else "little room for runs and exports",
    )


def _gpu() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "none that torch sees", ""
    slow = "CUDAExecutionProvider" not in providers()
    return (
        torch.cuda.get_device_name(),
        "onnxruntime sees none: install onnxruntime-gpu to time files on it" if slow else "",
    )


def _libraries() -> tuple[str, str]:
    names: tuple[str, ...] = ("torch", "timm", "transformers", "onnxruntime", "accelerate")
    known = machine()
    advice = "" if "transformers" in known else "hf: models need it: install tosa-convert[hf]"
    names += tuple(name for name in ("onnx", "openvino", "huggingface_hub") if name in known)
    return ", ".join(f"{name} {known.get(name, 'missing')}" for name in names), advice


def _runtimes() -> tuple[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = {name: why for name in PRECISIONS if (why := missing(name, device))}
    return ", ".join(name for name in PRECISIONS if name not in lacking), "; ".join(lacking.values())


def _compiler() -> tuple[str, str]:
    with silence():
        compiled = torch.compile(lambda value: value * 2 + 1)
        compiled(torch.ones(4))
    return "works", ""


def _export() -> tuple[str, str]:
    found = try_export()
    gain = found["int8_speedup"]
    advice = "" if gain > 1.2 else "INT8 does not pay here: export --precision float32"
    return f"work: a layer in {found['seconds']:.0f} s; INT8 {gain:.1f}× as fast as float32 on one thread", advice


def _weights() -> tuple[str, str]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    known = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    here = f"{known} model{'' if known == 1 else 's'} in the cache"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return f"HF_HUB_OFFLINE is set; {here}", "unset it to download weights"
    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=PATIENCE)
    except urllib.error.HTTPError:  # it answers
        pass
    except (OSError, ValueError):
        return f"{HUB} cannot be reached; {here}", "download weights elsewhere and add --checkpoint FILE"
    return f"{HUB} can be reached; {here}", ""
