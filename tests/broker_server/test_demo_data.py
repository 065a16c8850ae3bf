from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_server.demo_data import LABELS, DemoData, DemoDataOptions, LogLine, as_tsv, generate

Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def data() -> DemoData:
    return generate(DemoDataOptions(), seed=0)


def words(line: str) -> list[str]:
    return re.findall(r"[a-z]+", line.lower())


def bags(lines: Sequence[LogLine], vocabulary: dict[str, int]) -> Matrix:
    rows = np.zeros((len(lines), len(vocabulary)))
    for row, one in zip(rows, lines, strict=True):
        for word in words(one.line):
            if word in vocabulary:
                row[vocabulary[word]] += 1
    norms: Matrix = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return rows / norms


def nearest_centroid_accuracy(train: Sequence[LogLine], held_out: Sequence[LogLine]) -> float:
    every = sorted({word for one in train for word in words(one.line)})
    vocabulary = {word: column for column, word in enumerate(every)}
    features = bags(train, vocabulary)
    labels = np.array([one.label for one in train])
    centroids = np.stack([features[labels == label].mean(axis=0) for label in LABELS])
    guesses = (bags(held_out, vocabulary) @ centroids.T).argmax(axis=1)
    hits = [LABELS[guess] == one.label for guess, one in zip(guesses, held_out, strict=True)]
    return float(np.mean(hits))


def test_every_device_has_its_examples_and_eight_labels_are_held_out_evenly(
    data: DemoData,
) -> None:
    assert [len(lines) for lines in data.devices] == [400] * 4
    assert Counter(one.label for one in data.held_out) == dict.fromkeys(LABELS, 50)
    assert len(LABELS) == 8


def test_no_held_out_line_occurs_on_a_device(data: DemoData) -> None:
    held_out = {one.line for one in data.held_out}
    assert len(held_out) == len(data.held_out)
    for lines in data.devices:
        assert held_out.isdisjoint(one.line for one in lines)


def test_equal_seeds_give_equal_data_and_other_seeds_others(data: DemoData) -> None:
    assert generate(DemoDataOptions(), seed=0) == data
    assert generate(DemoDataOptions(), seed=1) != data


def test_devices_differ_in_labels_and_in_wording(data: DemoData) -> None:
    mixes = [Counter(one.label for one in lines) for lines in data.devices]
    distances = [
        sum(abs(a[label] - b[label]) for label in LABELS) / 800
        for index, a in enumerate(mixes)
        for b in mixes[index + 1 :]
    ]
    assert min(distances) > 0.15  # total variation; equal mixes of 400 would give about 0.05
    vocabularies = [{word for one in lines for word in words(one.line)} for lines in data.devices]
    shared = set.intersection(*vocabularies)
    assert all(len(vocabulary - shared) > 20 for vocabulary in vocabularies)


def test_lines_are_short_and_fit_a_tsv_file(data: DemoData) -> None:
    lines = [one for device in (*data.devices, data.held_out) for one in device]
    assert max(len(one.line.split()) for one in lines) <= 24
    rows = csv.DictReader(io.StringIO(as_tsv(lines)), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert [LogLine(row["line"], row["label"]) for row in rows] == lines


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counting_words_helps_but_does_not_suffice(seed: int) -> None:
    data = generate(DemoDataOptions(), seed=seed)
    accuracy = nearest_centroid_accuracy([one for d in data.devices for one in d], data.held_out)
    assert 0.5 < accuracy < 0.92
