#!/usr/bin/env python3
"""Byte n-grams with interpolated modified Kneser-Ney smoothing, on the split that `dsv3 train` uses.

The figure to hold a small model against: how well do plain counts predict the held-out lines of a text?

  documents    one line of the text each; line i (from 0) is held out when i % every == every - 1
  a document   its bytes and one end symbol (the newline), as the loader appends its end-of-document token
  context      the n - 1 symbols before; each document starts after newlines only, so no line leans on its neighbour
  smoothing    Chen & Goodman 1999 ("An empirical study of smoothing techniques for language modeling", eq. 20-21):
               three discounts per order from the counts of counts; lower orders count distinct left neighbours;
               the unigram is interpolated with the uniform distribution over 256 bytes
  the figure   sum over held-out documents of -log2 p(symbol | context), ends included, divided by the held-out
               bytes, the newline of each line included: the same bytes that `dsv3 train` divides by

Prints one JSON object per order, then a table.

  bench/ngram_baseline.py data/kjv.txt
  bench/ngram_baseline.py data/kjv.txt --orders 3 4 5 --every 10 --json results.jsonl
"""
import argparse
import json
import sys
import time

import numpy as np

NEWLINE = 10
MAX_ORDER = 8  # eight bytes fill one 64-bit key


def grams(documents, order):
    """Keys of the `order`-grams that end at each symbol of each document: uint64, oldest byte highest.

    The stream is pad · document · pad · document …, pad = order - 1 newlines, of which the last document's newline
    is the end symbol; only windows that end inside a document are kept.
    """
    pad = bytes([NEWLINE]) * (order - 1)
    stream = np.frombuffer(b"".join(pad + d for d in documents), dtype=np.uint8)
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths + len(pad))))[:-1] + len(pad)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ends = np.repeat(starts, lengths) + within
    keys = np.zeros(len(ends), dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        keys = (keys << np.uint64(8)) | stream[ends - back].astype(np.uint64)
    return keys


def without_oldest(keys, order):
    """Drops the oldest byte of `order`-grams."""
    return keys & np.uint64((1 << (8 * (order - 1))) - 1)


def lookup(table, keys):
    """Index of each key in the sorted table, and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def discounts(counts):
    """The three discounts of Chen & Goodman eq. 17, kept within [0, count]."""
    n = [int((counts == c).sum()) for c in range(1, 5)]
    if min(n) == 0:
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n[0] / (n[0] + 2 * n[1])
    return np.array([0.0] + [min(max(c - (c + 1) * y * n[c] / n[c - 1], 0.0), c) for c in (1, 2, 3)])


def probabilities(train, held_out, order):
    """p of each held-out symbol given its order - 1 predecessors; also the number of distinct n-grams kept."""
    tables, kept = {}, 0
    keys, counts = np.unique(grams(train, order), return_counts=True)
    for k in range(order, 0, -1):
        tables[k] = (keys, counts)
        kept += len(keys)
        if k > 1:  # the next lower order counts distinct left neighbours
            keys, counts = np.unique(without_oldest(keys, k), return_counts=True)
    tests = grams(held_out, order)
    p = np.full(len(tests), 1.0 / 256.0)
    for k in range(1, order + 1):
        keys, counts = tables[k]
        d = discounts(counts)
        bucket = np.minimum(counts, 3)
        contexts, first = np.unique(keys >> np.uint64(8), return_index=True)
        total = np.add.reduceat(counts, first).astype(np.float64)
        removed = np.add.reduceat(d[bucket], first)
        test = tests & np.uint64((1 << (8 * k)) - 1) if k < MAX_ORDER else tests
        c_at, seen_context = lookup(contexts, test >> np.uint64(8))
        g_at, seen = lookup(keys, test)
        own = np.where(seen, counts[g_at] - d[bucket[g_at]], 0.0)
        p = np.where(seen_context, (own + removed[c_at] * p) / total[c_at], p)
    return p, kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text of one document a line, for example data/kjv.txt")
    parser.add_argument("--orders", type=int, nargs="+", default=[5, 6, 8], help="n of each model (default: 5 6 8)")
    parser.add_argument("--every", type=int, default=20, help="hold out every n-th line (default: 20)")
    parser.add_argument("--json", help="also append the JSON lines to this file")
    options = parser.parse_args()
    if not all(1 <= n <= MAX_ORDER for n in options.orders):
        parser.error(f"--orders: each n must be within 1..{MAX_ORDER}")
    if options.every < 2:
        parser.error("--every: must be at least 2")
    try:
        with open(options.text, "rb") as file:
            text = file.read()
    except OSError as error:
        sys.exit(f"ngram_baseline: cannot read {options.text}: {error.strerror}")
    documents = [line + b"\n" for line in text.split(b"\n") if line]
    held_out = documents[options.every - 1::options.every]
    train = [d for i, d in enumerate(documents) if i % options.every != options.every - 1]
    if not train or not held_out:
        sys.exit(f"ngram_baseline: {options.text}: {len(documents)} lines are too few to hold out every {options.every}th")

    rows = []
    for order in options.orders:
        start = time.time()
        p, kept = probabilities(train, held_out, order)
        rows.append({"model": "kneser_ney", "order": order, "bits_per_byte": round(float(-np.log2(p).mean()), 4),
                     "held_out_documents": len(held_out), "held_out_bytes": len(p), "train_documents": len(train),
                     "train_bytes": sum(map(len, train)), "ngrams": kept, "seconds": round(time.time() - start, 1)})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"\n{'n':>3}  {'bits/byte':>9}  {'n-grams':>12}  {'seconds':>7}")
    for row in rows:
        print(f"{row['order']:>3}  {row['bits_per_byte']:>9.3f}  {row['ngrams']:>12,}  {row['seconds']:>7}")


if __name__ == "__main__":
    main()
