"""What tests share: one tiny Llama (and models of other classes with its sizes), and examples made of token ids."""
import copy
import io
import json
import math
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from IPython.core import pylabtools
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from cap_nb import calibration
from cap_nb.calibration import Calibration
from cap_nb.core.errors import BadInput
from cap_nb.data.prompts import made_up_example
from cap_nb.jobs import report
from cap_nb.models import lab
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import tokenizer_fingerprint

# Head size 6 although hidden size over heads is 5, and two query heads to a key-value head: sizes that go wrong when
# something is assumed
TINY = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=6, vocab_size=50, max_position_embeddings=64, initializer_range=0.3)


def refuses(words, call, *given, **named):
    """A call ends in `BadInput`, whose sentence these words are found in."""
    with pytest.raises(BadInput, match=words):
        call(*given, **named)


@contextmanager
def pools_encoded_once():
    """Rendering and tokenising a task's thousands of problems takes seconds, and hundreds of calibration sets are drawn: each problem once."""
    encode, known = calibration.encode_problems, {}

    def encoded(tokenizer, problems, style):
        if len(problems) < 250:  # a test's own file
            return encode(tokenizer, problems, style)
        examples = known.setdefault((tokenizer_fingerprint(tokenizer), style), {})
        if new := [problem for problem in problems if problem not in examples]:
            examples.update(zip(new, encode(tokenizer, new, style)))
        return [examples[problem] for problem in problems]

    with patch.object(calibration, "encode_problems", encoded):
        yield


@contextmanager
def labs_read_once():
    """The lab's checkpoints are read hundreds of times; a copy takes a fifth of the time. Whether one is whole is still asked each time."""
    read, models = AutoModelForCausalLM.from_pretrained, {}

    def copied(folder, dtype, **options):
        if folder not in lab.LABS.values():
            return read(folder, dtype=dtype, **options)
        if (folder, dtype) not in models:
            models[folder, dtype] = read(folder, dtype=dtype, **options)
        return copy.deepcopy(models[folder, dtype])

    with patch.object(lab, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=copied)):
        yield


@contextmanager
def blank_pictures():
    """A run's five pictures take two seconds to draw; what they show is looked at where they are drawn alone, and on the pages."""
    drawn = report.figures_of
    with patch.object(report, "figures_of", lambda run: dict.fromkeys(drawn(run), partial(Figure, (1, 1)))):
        yield


@contextmanager
def small_pictures():
    """A cell's picture is laid out, and then drawn for a screen of twice the resolution; where nobody looks, a fifth of it, drawn once, is enough."""
    def once(figure, fmt="png", **how):
        buffer = io.BytesIO()
        figure.set_layout_engine("none")
        figure.set_dpi(40)
        FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()

    with patch.object(pylabtools, "print_figure", once):
        yield


def tiny_config(kind=LlamaConfig, **settings):
    """The configuration of `tiny_llama`, for tests that need no weights."""
    return kind(**TINY | settings)


def tiny_llama(kind=LlamaConfig, seed=0, **settings):
    """A random Llama of 3 layers and 4 heads in float32; `kind` names another class, and settings replace those of
    `TINY`."""
    torch.manual_seed(seed)
    loading = {key: settings.pop(key) for key in ("attn_implementation",) if key in settings}
    return AutoModelForCausalLM.from_config(tiny_config(kind, **settings), **loading).float().eval()


def with_settings(path, **settings):
    """A JSON file with other settings."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def contents(folder, under="."):
    """All files of a folder, or of one in it, byte for byte."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted((folder / under).rglob("*")) if path.is_file()}


def linked(blobs, src):
    """A folder of links, as the hub's cache is one."""
    src.mkdir()
    for path in blobs.iterdir():
        (src / path.name).symlink_to(path)


def zeros_of(model):
    """Which weights in scope are zero, by projection."""
    return {p.name: p.weight == 0 for p in projections(model)}


def counted(work):
    """The operations of some work, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def made_up_calibration(count=9, shortest=8, k=3, step=1, **options):
    """A calibration set of made-up examples, each `step` tokens longer than the last, so that batches have padding."""
    examples = [made_up_example(number, shortest + step * number, **options) for number in range(count)]
    return Calibration.from_examples(examples, k=k)


def write_large(path, shapes, noise):
    """A safetensors file of hundreds of megabytes, 16 bits a number, written piece by piece from a million numbers."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}, at + size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            for left in range(math.prod(shape), 0, -len(noise)):
                file.write(noise.roll(number)[:left].view(torch.uint8).numpy())
    return path.stat().st_size
