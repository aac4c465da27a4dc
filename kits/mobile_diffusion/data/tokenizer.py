"""A CLIP tokenizer whose vocabulary is that of the scenes: one token a word, letters for whatever else is typed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from kits.mobile_diffusion.data.scenes import vocabulary

MAX_LENGTH = 24  # tokens, start and end included
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the config files into a folder and load the tokenizer from there."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(_byte_letters().values())
    pairs = _merges(vocabulary())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs), _START, _END]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE, as in GPT-2 and CLIP."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges in the order learned, until every word is one token (Sennrich et al., arXiv:1508.07909)."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)]
    merges = []
    while counts := Counter(pair for parts in spellings for pair in zip(parts, parts[1:])):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spellings = [_joined(parts, best) for parts in spellings]
    return merges


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(parts):
        together = tuple(parts[i : i + 2]) == pair
        out.append("".join(pair) if together else parts[i])
        i += 2 if together else 1
    return out
