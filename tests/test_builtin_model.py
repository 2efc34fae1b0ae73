"""The shipped weights are worth what they were measured to be worth."""

from longlive.build import choose_device, load_models
from longlive.builtin import BUILTIN_GENERATOR, BUILTIN_VAE
from longlive.config import ROOT, load_config
from longlive.eval.evaluate_config import EvaluateConfig
from longlive.eval.shapes import evaluate

FLOORS = {"attributes": 0.97, "all": 0.87, "background": 0.97, "colour": 0.95, "motion": 0.95}  # in full: LOG.md
MOST_BYTES = 24 * 10**6


def test_the_shipped_model_follows_held_out_prompts() -> None:
    settings = ["num_prompts=40", "batch_size=20", "parts=length", "lengths_s=5", "seed=1", "device=cpu"]
    config, _explicit = load_config(EvaluateConfig, ROOT / "configs/shapes_evaluate.yaml", settings)
    figures = evaluate(config, load_models(config, choose_device("cpu")))["length"]["5"]
    found = {name: figures[name]["mean"] for name in FLOORS}
    assert {name for name, least in FLOORS.items() if found[name] < least} == set(), found


def test_the_shipped_weights_are_small() -> None:
    assert BUILTIN_GENERATOR.stat().st_size + BUILTIN_VAE.stat().st_size <= MOST_BYTES
