"""Asks the exported model the held-out questions through transformers, and compares with the answers given before the export.

    cd runs/quickstart
    python ../../examples/quickstart/compare_transformers.py huggingface shards/heldout eval-phase2.json

Weights, picture preprocessing and tokenizer come from the exported folder alone. Only the prompt is built by this project,
because a Hugging Face folder knows no conversation template. Ends with exit code 1 if a single answer differs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_mcore.data.conversation import encode_prompt
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.geometry import num_image_embeddings

BATCH = 64
Prompts = dict[str, tuple[np.ndarray, list[bytes]]]  # token ids and pictures, by key


def prompts(dataset: ShardDataset, keys: set[str], folder: Path, config: LlavaConfig, template: str) -> Prompts:
    """Every question that was answered."""
    tokenizer = load_tokenizer(folder)
    feature = "cls_patch" if config.vision_feature_select_strategy == "full" else "patch"
    each = num_image_embeddings(config.vision_config.image_size, config.vision_config.patch_size, feature)
    found: Prompts = {}
    for index in range(len(dataset)):
        if dataset.key(index) in keys:
            sample = dataset.read(index)
            ids = encode_prompt(
                sample.record["conversations"],
                tokenizer,
                template,
                num_images=len(sample.pictures),
                image_tokens_each=each,
                image_token_id=config.image_token_index,
            )
            found[sample.key] = (ids, sample.pictures)
    return found


@torch.inference_mode()
def generate(folder: Path, dataset: ShardDataset, keys: set[str], template: str, max_new_tokens: int) -> dict[str, str]:
    """The answers, by key, generated greedily. Prompts of one length share a batch, so that nothing is padded."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    questions = prompts(dataset, keys, folder, model.config, template)
    by_length = defaultdict(list)
    for key, (ids, pictures) in questions.items():
        by_length[len(ids), len(pictures)].append(key)
    batches = [group[start : start + BATCH] for group in by_length.values() for start in range(0, len(group), BATCH)]
    answers = {}
    for batch in tqdm(batches, desc="transformers", unit="batch"):
        inputs = torch.stack([torch.from_numpy(questions[key][0]) for key in batch])
        images = [Image.open(io.BytesIO(data)).convert("RGB") for key in batch for data in questions[key][1]]
        pixels = processor(images, return_tensors="pt")["pixel_values"] if images else None
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )
        for key, row in zip(batch, output[:, inputs.shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
            answers[key] = tokenizer.decode(row[:end]).strip()
    return answers


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="exported Hugging Face folder")
    parser.add_argument("shards", type=Path, help="shards the questions come from")
    parser.add_argument("answers", type=Path, help="what llava_mcore.evaluation.exact_match wrote with --output")
    parser.add_argument("--template", default="vicuna_v1", help="conversation template (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the comparison here as JSON")
    arguments = parser.parse_args()

    ours = {entry["key"]: entry for entry in json.loads(arguments.answers.read_text(encoding="utf-8"))["answers"]}
    dataset = ShardDataset(arguments.shards)
    theirs = generate(arguments.folder, dataset, set(ours), arguments.template, arguments.max_new_tokens)
    if not ours or ours.keys() - theirs.keys():
        print(f"{arguments.answers}: only {len(theirs)} of {len(ours)} answers are about samples of {arguments.shards}")
        return 1
    different = sorted(key for key in ours if ours[key]["answer"].strip() != theirs[key])
    for key in different[:10]:
        print(f"{key}: {ours[key]['question']!r}: here {ours[key]['answer']!r}, transformers {theirs[key]!r}")
    print(f"{len(ours) - len(different)} of {len(ours)} answers are the same in transformers")
    if arguments.output:
        comparison = {"count": len(ours), "same": len(ours) - len(different), "different": different}
        arguments.output.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
