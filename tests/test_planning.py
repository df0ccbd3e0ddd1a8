"""`trtbuild plan`: what it shows, what it refuses, and what was measured beside it."""

import json
from pathlib import Path

import pytest
import yaml
from workflow_config import CONFIG

from trtbuild import planning
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation.plan import cache_of_rank, weights_of_rank
from trtbuild.files import write_json
from trtbuild.planning import Model
from trtbuild.workflow import load_recipes

ROOT = Path(__file__).parents[1]
RECIPES = load_recipes(None)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The shipped configuration, and nothing made."""
    (tmp_path / "config").mkdir()
    for name in ("config", "models", "recipes"):
        (tmp_path / f"config/{name}.yaml").write_text((ROOT / f"config/{name}.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(name: str, runs: list[str], gpus: list[str]) -> tuple[Model, dict]:
    model, settings, recipes = planning.declared(name, None)
    return model, planning.plan(model, settings, recipes, runs, gpus)


def test_seventy_billion_parameters(project):
    model, planned = plan("llama2-70b", ["fp16@tp2", "awq@tp1", "fp16@tp3"], ["h100-80gb", "a100-40gb"])
    fp16, awq, refused = planned["runs"]
    limits = BuildLimits()
    for rank in (0, 1):
        mapping = Mapping(2, 1, rank)
        assert fp16["ranks"][rank]["weights"] == weights_of_rank(model.config, RECIPES["fp16"], mapping, limits)
        assert fp16["ranks"][rank]["caches"] == cache_of_rank(model.config, RECIPES["fp16"], mapping, limits)
    on = fp16["gpus"]
    assert (on["h100-80gb"]["fits"], on["a100-40gb"]["fits"]) == (True, False)
    assert on["h100-80gb"]["largest_batch"] > 8
    assert (on["a100-40gb"]["largest_batch"], on["a100-40gb"]["largest_batch_tokens_per_s"]) == (0, None)
    assert awq["gpus"]["h100-80gb"]["fits"]
    assert len(awq["ranks"]) == 1  # models.yaml has four
    assert refused["refused"].startswith("tp_size 3 does not divide 64 heads")
    text = planning.table(planned)
    assert "fp16@tp2  2 x a100-40gb     69.0    1.5" in text
    assert "fp16@tp3: tp_size 3 does not divide" in text
    assert json.loads(json.dumps(planned, allow_nan=False)) == planned


def test_what_was_measured_stands_beside_it(project):
    folder = Path("results/llama-7b/fp16")
    (folder / "engine").mkdir(parents=True)
    write_json(folder / "engine/config.json", {"outputs": {"rank0.safetensors": {"bytes": 13_500_000_000}}})
    sizes = {"batch_size": 1, "input_len": 512, "output_len": 64}
    times = {"time_to_first_token_s": 0.0123, "time_per_output_token_s": 0.0047}
    provenance = {"device": "cuda: NVIDIA H100 80GB HBM3"}
    write_json(
        folder / "benchmark.json", sizes | times | {"peak_memory_bytes": 18_700_000_000, "provenance": provenance}
    )
    _, planned = plan("llama-7b", ["fp16", "int8wo"], ["h100-80gb"])
    assert planned["runs"][0]["measured"] == sizes | times | {
        "engine_bytes": {"rank0.safetensors": 13_500_000_000},
        "peak_memory_bytes": 18_700_000_000,
        "device": "cuda: NVIDIA H100 80GB HBM3",
    }
    assert "measured" not in planned["runs"][1]
    row = next(line for line in planning.table(planned).splitlines() if "measured" in line)
    assert row.split() == ["measured:", "cuda:", "NVIDIA", "H100", "80GB", "HBM3", "13.5", "18.7", "12.30", "4.70"]


def test_runs():
    model = Model("tiny", {}, None)
    assert planning.runs(model, CONFIG, RECIPES, None, None) == ["fp32", "bf16"]  # the matrix's
    assert planning.runs(model, CONFIG, RECIPES, ["fp16", "awq@tp2"], ["tp2", "pp2"]) == [
        "fp16@tp2",
        "fp16@pp2",
        "awq@tp2",
    ]
    assert planning.runs(Model("new", {}, None), CONFIG, RECIPES, None, None) == list(RECIPES)
    assert planning.runs(model, CONFIG, RECIPES, ["fp16", "awq", "fp16"], None) == ["fp16", "awq"]  # once


def test_a_config_json(project):
    models = yaml.safe_load(Path("config/models.yaml").read_text())
    Path("mine").mkdir()
    write_json(Path("mine/config.json"), models["llama2-7b"]["config"])
    model, planned = plan("mine/config.json", ["fp16"], [])
    assert (model.name, planned["parameters"]) == ("mine", 6_738_415_616)
    assert planned["runs"][0]["gpus"] == {}
    assert "13.5" in planning.table(planned)


@pytest.mark.parametrize(
    ("model", "runs", "gpus", "message"),
    [
        ("llama-8b", ["fp16"], [], "unknown model 'llama-8b'; closest: .*; or give a config.json"),
        ("llama-7b", ["fp61"], [], "unknown recipe 'fp61'; closest: fp16"),
        ("llama-7b", ["fp16@2"], [], "'fp16@2' ends in no layout"),
        ("llama-7b", ["fp16"], ["h100"], "unknown GPU 'h100'; closest: h100-80gb, .* known GPUs: a10, "),
        ("llama-7b", ["fp16@tp3"], ["l4"], "tp_size 3 does not divide 32 heads"),
        ("missing.json", ["fp16"], [], "missing.json"),
        ("unknown", ["fp16"], [], "config/models.yaml has no 'config' for unknown; add"),
    ],
)
def test_what_is_refused(project, model, runs, gpus, message):
    with open("config/models.yaml", "a") as file:
        file.write("\nunknown: { source: { local: { path: nowhere } } }\n")
    with pytest.raises(UserError, match=message):
        plan(model, runs, gpus)


def test_a_version_of_a_declared_model(project):
    with pytest.raises(UserError, match=r"which version llama-7b is, config/models\.yaml says"):
        planning.declared("llama-7b", None, "v2_13b")


def test_more_positions_than_a_model_has(project):
    file = Path("config/config.yaml")
    file.write_text(file.read_text().replace("max_input_len: 1024", "max_input_len: 4096"))
    with pytest.raises(UserError, match="more than the 2048 positions that the model was made for"):
        plan("llama-7b", ["fp16"], [])


def test_without_a_project(tmp_path, monkeypatch):
    """What the shipped configuration says, as far as a plan reads it."""

    def within(small, large) -> bool:
        return small == large if not isinstance(small, dict) else all(within(small[key], large[key]) for key in small)

    shipped = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    assert all(within(planning.DEFAULTS[key], shipped[key]) for key in ("build", "evaluation", "benchmark"))
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "config/models.yaml").read_text())["llama2-7b"]["config"]
    write_json(tmp_path / "config.json", config)
    _, planned = plan("config.json", ["fp16"], ["l4"])
    assert planned["runs"][0]["gpus"]["l4"]["fits"]
    with pytest.raises(
        UserError, match=r"there is no config/config.yaml here, .* 'llama-7b' is declared; give a config"
    ):
        plan("llama-7b", ["fp16"], [])
