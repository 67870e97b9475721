"""An HTML page of samples as the model sees them: pixels after resizing, tokens, and which of them are learned."""

from __future__ import annotations

import base64
import html
import io
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from llava_mcore.data.conversation import IGNORE, EncodedSample
from llava_mcore.data.decode import Decoder
from llava_mcore.data.errors import SampleError
from llava_mcore.data.sample import Reading
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.settings.schema import DataSettings, Settings

_HEAD = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: 1em 0 }} h2 {{ font-size: 1em; margin: 0 0 .5em }}
img {{ margin-right: 8px; image-rendering: pixelated; max-width: 336px }} .text {{ white-space: pre-wrap }}
.learned {{ background: #cdeccd }} .medium {{ background: #dde6f7; border-radius: 3px; padding: 0 4px }}
.token {{ border-right: 1px solid #bbb }} .bad {{ color: #a00 }}
</style><h1>{title}</h1><p>Every token ends at a thin line. <span class="learned">Green tokens are learned</span>,
<span class="medium">blue ones are places of picture embeddings</span>; what is beyond data.sequence_length is cut off.</p>"""


def write_preview(output: Path, dataset: ShardDataset, tokenizer: Tokenizer, settings: Settings, count: int) -> int:
    """Writes the page; returns how many samples it shows.

    Args:
        output: the file.
        dataset: samples are taken from it at even distances.
        tokenizer: of the run.
        settings: of the run: template, picture mode, sizes.
        count: samples to show.
    """
    model, data = settings.model, settings.data
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    title = f"{dataset.path}: {len(indices)} of {len(dataset):,} samples, template {data.template}"
    reading = Reading.from_settings(tokenizer, data, model.geometry, model.image_token_id)
    with open(output, "w", encoding="utf-8") as page, Decoder.from_settings(data, model.geometry) as decoder:
        page.write(_HEAD.format(title=html.escape(title)))
        for index in indices:
            page.write(f"<section><h2>{index}: {html.escape(dataset.name(index))}</h2>\n")
            try:
                tokens = reading.encode(dataset, index, dataset.read_record(index))
                pixels = reading.pixels(decoder, dataset, index)
                page.write("".join(_shown(picture, data) for picture in pixels))
                page.write(_tokens(tokens, tokenizer, data.sequence_length))
            except SampleError as error:
                page.write(f'<p class="bad">cannot be used: {html.escape(error.reason)}</p>')
            page.write("</section>\n")
    return len(indices)


def _tokens(tokens: EncodedSample, tokenizer: Tokenizer, length: int) -> str:
    learned = int((tokens.labels[:length] != IGNORE).sum())
    count = f"{len(tokens.input_ids)} tokens, {learned} learned"
    if len(tokens.input_ids) > length:
        count += f', <span class="bad">longer than data.sequence_length={length}</span>'
    return f'<p>{count}</p><p class="text">{_text(tokens, tokenizer, length)}</p>'


def _shown(pixels: np.ndarray, data: DataSettings) -> str:
    """A picture after all that is done to it, made visible again."""
    seen = pixels.transpose(1, 2, 0) * np.array(data.image_std) + np.array(data.image_mean)
    file = io.BytesIO()
    Image.fromarray((seen * 255).round().clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _text(tokens: EncodedSample, tokenizer: Tokenizer, length: int) -> str:
    """The ids as text, one box a token; a token is learned where the one before it predicts it."""
    places = set(tokens.image_slots.tolist())
    learned = [False, *(tokens.labels[:-1] != IGNORE).tolist()]
    ids = tokens.input_ids.tolist()
    parts = []
    for is_medium, run in groupby(range(min(len(ids), length)), places.__contains__):
        numbers = list(run)
        if is_medium:
            parts.append(f'<span class="medium">{len(numbers)} picture embeddings</span>')
            continue
        for number in numbers:
            style = "token learned" if learned[number] else "token"
            parts.append(f'<span class="{style}">{html.escape(_piece(ids, number, places, tokenizer))}</span>')
    return "".join(parts)


def _piece(ids: list[int], number: int, places: set[int], tokenizer: Tokenizer) -> str:
    """The text one token adds to the one before it, which says whether a blank stands between; an id that has none as <id>."""
    if number and number - 1 not in places:
        both, before = tokenizer.decode(ids[number - 1 : number + 1]), tokenizer.decode(ids[number - 1 : number])
        if both.startswith(before) and len(both) > len(before):
            return both[len(before) :]
    return tokenizer.decode([ids[number]]) or f"<{ids[number]}>"
