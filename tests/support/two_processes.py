"""Trains by a recipe, stage 1, once for each output and its changes: see test_training_train.py."""

from __future__ import annotations

import sys
from pathlib import Path

from sana_edge.training.frozen import Frozen
from sana_edge.training.recipe import load_recipe
from sana_edge.training.train import Task, train

recipe, model, data, latents, *outputs = sys.argv[1:]
for output in outputs:
    place, _, changes = output.partition(":")
    found = load_recipe(recipe, changes.split(";") if changes else [])
    train(Task(found, Frozen.find(model), Path(data), Path(place), Path(latents), log_steps=1), 1)
