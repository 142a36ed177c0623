"""The cost of capturing models and of the whole pipeline, in processor seconds on one thread.

    python -m benchmarks.capture
    python -m benchmarks.capture --lengths 1000 --json capture.json

It captures chains of linear layers and ReLUs of several lengths. It also decouples three large
models with ``cuts=8``: ResNet-152, a vision transformer of 24 blocks and a GPT-2 of 24 blocks.
These need the extra ``models``; without it they are skipped.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dnifx
from benchmarks.timing import as_json
from dnifx.ir import Program
from dnifx.passes.capture.capture import CaptureGraph
from tests.real_models.families import shim

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
PARTS = 8


def chain(layers: int) -> nn.Sequential:
    """Return linear layers and ReLUs in turn, ``layers`` in all."""
    return nn.Sequential(*(nn.ReLU() if index % 2 else nn.Linear(8, 8) for index in range(layers)))


def capture_chain(layers: int, verify: bool) -> Callable[[], Any]:
    """Return a function that captures a chain of layers."""
    program = Program(chain(layers), (torch.randn(2, 8),))
    return lambda: CaptureGraph(verify=verify).run(program)


def resnet() -> Example:
    """Return ResNet-152 and a small batch."""
    shim()
    model = import_module("torchvision.models").resnet152(weights=None)
    return model, (torch.randn(2, 3, 64, 64),), {}


def vision_transformer() -> Example:
    """Return a vision transformer of 24 blocks and a small batch."""
    shim()
    library = import_module("transformers")
    size = {"hidden_size": 192, "num_hidden_layers": 24, "num_attention_heads": 3, "intermediate_size": 768}
    config = library.ViTConfig(image_size=64, patch_size=16, **size)
    return library.ViTForImageClassification(config), (), {"pixel_values": torch.randn(2, 3, 64, 64)}


def language_model() -> Example:
    """Return a GPT-2 of 24 blocks and a small batch of tokens."""
    shim()
    library = import_module("transformers")
    config = library.GPT2Config(vocab_size=512, n_embd=192, n_layer=24, n_head=6, n_positions=64)
    ids = torch.randint(0, 512, (2, 32))
    return library.GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


def whole_pipeline(example: Example) -> Callable[[], Any]:
    """Return a function that decouples a model, with every pass and every check."""
    model, args, kwargs = example
    return lambda: dnifx.decouple(model, PARTS, args=args, kwargs=kwargs)


def processor_time(run: Callable[[], Any]) -> float:
    """Return the processor seconds of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def figures(lengths: list[int]) -> Iterator[tuple[str, float, str]]:
    """Yield the title of each measurement, its seconds, and the time for a layer."""
    capture_chain(10, True)()
    for verify in (False, True):
        for layers in lengths:
            seconds = processor_time(capture_chain(layers, verify))
            title = f"capture of {layers:,} layers, {'verified' if verify else 'not verified'}"
            yield title, seconds, f"{seconds / layers * 1e6:.0f} us a layer"
    for make in (resnet, vision_transformer, language_model):
        try:
            example = make()
        except ModuleNotFoundError as error:
            yield f"{make.__name__}: {error}", float("nan"), "not installed"
            continue
        layers = sum(1 for module in example[0].modules() if not list(module.children()))
        seconds = processor_time(whole_pipeline(example))
        yield f"{make.__name__}: {layers} layers, every pass, cuts={PARTS}", seconds, ""


def main() -> None:
    """Measure, print, and write the figures to ``--json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000], help="layers of the chains")
    options.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    table = Table("measurement", "processor seconds", "for a layer")
    found = {}
    for title, seconds, share in figures(chosen.lengths):
        table.add_row(title, f"{seconds:.2f}", share)
        found[title] = seconds
    Console().print(table)
    if chosen.json is not None:
        chosen.json.write_text(as_json("capture", torch.device("cpu"), found))


if __name__ == "__main__":
    main()
