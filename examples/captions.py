"""Captions of class labels, and a tiny CLIP that reads them: tokenizer and text encoder of random weights.

A text encoder need not be trained for so few captions: the denoiser learns any fixed encoding that tells them
apart. What it has not seen in training means nothing to it.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("{name}", "{article} {name}", "a photo of {article} {name}")
MAX_TOKENS = 16
HIDDEN_SIZE = 64
WORD_END = "</w>"  # of the last symbol of a word, in CLIP's vocabularies


def captions(template: str, names: Sequence[str] = CIFAR10_NAMES) -> list[str]:
    """The caption of every class."""
    return [template.format(name=name, article="an" if name[0] in "aeiou" else "a") for name in names]


def all_captions() -> list[str]:
    """Of every template and class, in this order, and the empty one behind them."""
    return [*(text for template in TEMPLATES for text in captions(template)), ""]


def merges_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word, in order: the most frequent pair first."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges = []
    while any(len(symbols) > 1 for symbols in split):
        pairs = Counter(pair for symbols in split for pair in zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merged(symbols, best) for symbols in split]
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Symbols with each occurrence of a pair made one, from left to right."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def make_tokenizer() -> CLIPTokenizer:
    """One token for each word of the captions; letters and digits for anything else."""
    merges = merges_of(" ".join(all_captions()).split())
    letters = string.ascii_lowercase + string.digits + string.punctuation
    symbols = [letter + end for letter in letters for end in ("", WORD_END)]
    vocabulary = [*symbols, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
        files[0].write_text(json.dumps({symbol: number for number, symbol in enumerate(vocabulary)}))
        files[1].write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer(*map(str, files), model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """One layer of 64 channels with random weights."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """What Stable Diffusion gives its U-Net for texts, [N, MAX_TOKENS, HIDDEN_SIZE] f32."""
    ids = tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    states: Tensor = text_encoder(ids)[0]
    return states.float()
