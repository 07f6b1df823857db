"""The shipped model, judged by a classifier that has never seen a generated image."""

import importlib.util
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff.files.images import to_uint8

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digit_classifier.py"


def test_guided_samples_get_their_class():
    spec = importlib.util.spec_from_file_location("digit_classifier", EXAMPLE)
    classifier = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(classifier)
    net, accuracy = classifier.train(seed=0)
    assert accuracy >= 0.9
    labels = torch.arange(200) % 10
    x = fd.sample(fd.load("digits"), (200, 1, 8, 8), steps=25, seed=11, cond=labels, guidance=fd.cfg(2.0))
    found = classifier.classify(net, to_uint8(x).numpy())
    hits = found == labels.numpy()
    assert hits.mean() >= 0.85
    # every single class is among what the model can draw
    assert min(hits[labels.numpy() == c].mean() for c in range(10)) >= 0.6
    # the null class is no digit in particular: without guidance towards a class the classes are mixed
    free = classifier.classify(net, to_uint8(fd.sample(fd.load("digits"), (100, 1, 8, 8), steps=25, seed=3)).numpy())
    assert len(set(free.tolist())) >= 6
