"""Texts as numbers: words cut by jieba and kept in a cache, vocabularies, and batches with little padding."""

import hashlib
import logging
import zipfile
from collections import Counter
from itertools import chain, repeat
from operator import add

import jieba
import numpy as np
import torch

import datasets

PAIR_MIN_FREQ = 20  # of pairs of characters, which are many


def cut_words(texts):
    """Each text as the list of its words, by jieba in precise mode."""
    jieba.setLogLevel(logging.WARNING)
    return [jieba.lcut(text) for text in texts]


def cached_words(texts, sha256):
    """`cut_words` of a file's texts, kept under data/ by file, column, and jieba's version: cutting takes a while.

    Words put together are the text again, so the cache holds only their lengths.
    """
    key = hashlib.sha256(f"{sha256} {jieba.__version__} {len(texts)} {''.join(texts)}".encode("utf-8", "replace"))
    path = datasets.DATA_DIR / f"words_{key.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as cache:
            lengths, counts = cache["lengths"], cache["counts"]
        if len(counts) != len(texts) or lengths.sum() != sum(map(len, texts)):
            raise ValueError
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, broken, or of other texts
        print("cutting words ...", flush=True)
        cuts = cut_words(texts)
        lengths = np.fromiter((len(word) for cut in cuts for word in cut), np.int32)
        counts = np.fromiter(map(len, cuts), np.int32)
        with datasets.whole_file(path) as stream:
            np.savez_compressed(stream, lengths=lengths, counts=counts)
        return cuts
    text, ends = "".join(texts), np.cumsum(lengths)
    words = [text[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    firsts = np.cumsum(counts) - counts
    return [words[first : first + count] for first, count in zip(firsts.tolist(), counts.tolist(), strict=True)]


def build_vocabulary(tokens, min_freq):
    """The tokens that occur at least min_freq times, most frequent first, behind <pad> (0) and <unk> (1)."""
    return ["<pad>", "<unk>", *(token for token, count in Counter(tokens).most_common() if count >= min_freq)]


def pairs(cut):
    """Each character of a text cut into words with the one behind it; the last one with a line feed."""
    text = "".join(cut)
    return map(add, text, text[1:] + "\n")


def build_vocabularies(cuts, kind, min_freq):
    """The vocabularies {"char": [...], "word": [...], "pair": [...]} that tokens of this kind need ("both": all three,
    otherwise one), from the training texts' words. A pair must occur PAIR_MIN_FREQ times."""
    sources = {
        "char": (chain.from_iterable(chain.from_iterable(cuts)), min_freq),
        "word": (chain.from_iterable(cuts), min_freq),
        "pair": (chain.from_iterable(map(pairs, cuts)), max(min_freq, PAIR_MIN_FREQ)),
    }
    return {name: build_vocabulary(*source) for name, source in sources.items() if kind in (name, "both")}


def vocab_sizes(vocabularies, kind):
    """How many values each aspect of a token can take."""
    return [len(vocabulary) for vocabulary in vocabularies.values()] + ([5] if kind == "both" else [])


def encode(cuts, kind, vocabularies):
    """Texts cut into words as numbers: ids (all tokens, aspects) int32, one text behind the other, and counts (texts,).

    The aspects of a token: "word" its word; "char" its character; "both" its character, the word that the character
    belongs to, the pair that it makes with the next character, and its place in the word (1 alone, 2 first, 3 within,
    4 last). A text without tokens becomes one <unk>.
    """
    cuts = [cut or ["\0"] for cut in cuts]
    words = list(chain.from_iterable(cuts))
    lookup = {name: {token: i for i, token in enumerate(tokens)} for name, tokens in vocabularies.items()}

    def numbers(tokens, name):
        return np.fromiter(map(lookup[name].get, tokens, repeat(1)), np.int32)

    words_in_text = np.fromiter(map(len, cuts), np.int64)
    if kind == "word":
        return numbers(words, "word")[:, None], words_in_text
    lengths = np.fromiter(map(len, words), np.int64)
    ends = np.cumsum(words_in_text)
    characters_before = np.concatenate([[0], np.cumsum(lengths)])
    counts = characters_before[ends] - characters_before[ends - words_in_text]
    characters = numbers(chain.from_iterable(words), "char")
    if kind == "char":
        return characters[:, None], counts
    words_of_characters = np.repeat(numbers(words, "word"), lengths)
    places = np.full(len(characters), 3, np.int32)
    firsts = characters_before[:-1]
    places[firsts + lengths - 1] = 4
    places[firsts] = 2
    places[firsts[lengths == 1]] = 1
    following = numbers(chain.from_iterable(map(pairs, cuts)), "pair")
    return np.stack([characters, words_of_characters, following, places], axis=1), counts


class Corpus:
    """All tokens of all texts on the device, and the batches made of them there."""

    def __init__(self, ids, counts, labels, max_tokens, device):
        """ids, counts as `encode` returns them; labels (texts,), or None."""
        firsts = np.cumsum(counts) - counts
        self.lengths = torch.from_numpy(np.minimum(counts, max_tokens))  # stays on the CPU, where batches are planned
        self.device = device
        self.ids, self.firsts = torch.from_numpy(ids).to(device), torch.from_numpy(firsts).to(device)
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)

    def plan(self, rows, batch_size, shuffle):
        """Rows (n,) as a list of index tensors of texts of similar length, so that little padding is computed.

        Shuffled: sorted by length within pools of fifty batches drawn at random, the batches in random order.
        """
        if not shuffle:
            return rows[torch.argsort(self.lengths[rows], stable=True)].split(batch_size)
        rows = rows[torch.randperm(len(rows))]
        pools = rows.split(50 * batch_size)
        batches = [batch for pool in pools for batch in pool[torch.argsort(self.lengths[pool])].split(batch_size)]
        return [batches[i] for i in torch.randperm(len(batches)).tolist()]

    def batch(self, rows):
        """(tokens (T, B, aspects), lengths (B,)) of some texts, padded on the right with 0 to the longest."""
        lengths = self.lengths[rows]
        steps = torch.arange(int(lengths.max()), device=self.device)[:, None]  # (T, 1)
        if self.device.type == "cuda":  # pinned memory is copied while the CPU goes on
            rows, lengths = rows.pin_memory(), lengths.pin_memory()
        rows, lengths = rows.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)
        there = steps < lengths  # (T, B)
        index = torch.where(there, self.firsts[rows] + steps, 0)
        return self.ids[index].masked_fill(~there[:, :, None], 0), lengths, rows
