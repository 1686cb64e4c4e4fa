"""Drive the candidates of a recipe from Ray Tune: each trial scores one merge, and an actor keeps the models.

    python examples/ray_tune.py recipe.yaml dev.jsonl 40

The recipe is one that `ties-ray merge` takes, and names the method `ties`. A line of the data has a `text`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from ray import tune
from transformers import AutoModelForCausalLM, AutoTokenizer

import ties_ray

SPACE = {"method.lambda": tune.loguniform(0.1, 3), "method.density": tune.uniform(0.05, 1)}


class Scored(tune.Trainable):
    """Holds models, data and a loaded model. Trials that follow each other in one actor share them."""

    def setup(self, config, recipe, data):
        recipe = ties_ray.load_recipe(recipe)
        torch.set_num_threads(1)
        self.pool = ties_ray.candidates(recipe)
        self.model = AutoModelForCausalLM.from_pretrained(recipe.base.path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.base.path)
        self.texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
        self.values = config

    def reset_config(self, new_config):
        self.values = new_config
        return True

    @torch.inference_mode()
    def step(self):
        self.pool.merge(self.values).load_into(self.model)
        losses = []
        for text in self.texts:
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            losses.append(float(self.model(ids, labels=ids).loss))
        return {"loss": sum(losses) / len(losses)}


def best_of(recipe, data, trials):
    """Return the values of the best trial, and its loss."""
    trainable = tune.with_parameters(Scored, recipe=os.path.abspath(recipe), data=os.path.abspath(data))
    tuner = tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(metric="loss", mode="min", num_samples=trials, reuse_actors=True),
        run_config=tune.RunConfig(stop={"training_iteration": 1}, verbose=0),
    )
    best = tuner.fit().get_best_result()
    return best.config, best.metrics["loss"]


if __name__ == "__main__":
    values, loss = best_of(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(f"loss {loss:.4f} with {values}")
    overrides = [f"{place}={value}" for place, value in values.items()]
    print(ties_ray.merge(ties_ray.load_recipe(sys.argv[1], overrides)).output)
