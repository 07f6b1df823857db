"""From nothing to the first image, in a process of its own: imports, the network, what is compiled or captured, a loop.

    python benchmarks/cold.py ours|max-autotune [--model DDPM-CIFAR10] [--device cuda] [--backend auto] [--steps 50]

Prints one line of JSON: seconds since the script began, at the end of each part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
sys.path.append(str(Path(__file__).resolve().parents[1]))

WHAT = ("ours", "max-autotune")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def image(what: str, model: str, device: str, backend: str, steps: int) -> dict[str, float]:
    """The first image; seconds at the end of each part."""
    import torch

    from benchmarks.models import MODELS, Pair, build
    from benchmarks.nets import Nets, Setting
    from benchmarks.plain import PlainUNet
    from benchmarks.variants import loops

    at = {"imported": time.perf_counter() - BEGIN}
    cuda = device.startswith("cuda")
    ours: Any = build(MODELS[model], quiet=True)
    pair = Pair(ours.to(device), ours if what == "ours" else PlainUNet(ours).to(device), "plain")
    setting = Setting(Nets(MODELS[model], device, pair, torch.bfloat16 if cuda else torch.float32), 1)
    mode = f"torch.compile {what}"
    name = f"prepared ({backend}), " + ("fd.graph" if cuda else "fd.eager") if what == "ours" else f"plain, {mode}"
    (variant,) = [v for v in loops("plain", [backend], [] if what == "ours" else [mode]) if v.name == name]
    setting.nets.net(variant.net)
    at["network"] = time.perf_counter() - BEGIN
    with torch.no_grad():
        ready = variant.make(setting)
        # copied to the host: the image is there
        ready.run(steps).cpu()
        at["first image"] = time.perf_counter() - BEGIN
        ready.run(steps).cpu()
    return {**at, "second image": time.perf_counter() - BEGIN}


def measure(what: str, model: str, device: str, backend: str, timeout: float) -> dict[str, float]:
    """Seconds of each part in a new process with empty caches. RuntimeError as of `process.command`."""
    from benchmarks.process import command

    given = (what, "--model", model, "--device", device, "--backend", backend)
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: str(Path(empty, name)) for name in CACHES}
        return command("cold.py", *given, variables=caches, timeout=timeout)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--model", default="DDPM-CIFAR10")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print(json.dumps(image(args.what, args.model, args.device, args.backend, args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
