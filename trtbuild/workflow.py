"""What the Snakefile and its scripts need beyond the stages: validated configuration, and a rule's log."""

import dataclasses
import difflib
import functools
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.datasets import OWN, load_articles
from trtbuild.engine.config import CONFIG_FILE, REHEARSAL, BuildLimits, marker
from trtbuild.errors import UserError, one_line
from trtbuild.files import check_output, read_json, state_of, user_path
from trtbuild.folder_lock import local_job
from trtbuild.gpus import taken
from trtbuild.layout import LAYOUT, sizes, split_run
from trtbuild.quantization.recipe import Recipe, identity
from trtbuild.rehearsal import cost, rehearsal_layers, rehearsal_target, shape_of
from trtbuild.tokenizer import chat_template
from trtbuild.yaml_reader import read_yaml

if TYPE_CHECKING:
    from trtbuild.models.config import ModelConfig

# A program that makes lines of what other libraries' progress bars write over and over.
LINES = "import os\nwhile text := os.read(0, 1 << 16): os.write(1, text.replace(b'\\r', b'\\n'))"
SCHEMAS = Path(__file__).parent / "schemas"
MODELS_SCHEMA = SCHEMAS / "models.schema.yaml"
RECIPES_SCHEMA = SCHEMAS / "recipes.schema.yaml"
SHIPPED_RECIPES = Path(__file__).parent / "recipes.yaml"
TABLES = ("recipes.json", "recipes.md", "report.html")  # of all of a model's recipes
RESULTS = ("perplexity", "gate", "rouge", "benchmark")  # of a run, beside summaries
LIMITS = ("max_batch_size", "max_input_len", "max_output_len")  # of `build`


def validate(value: object, schema_path: Path, where: str) -> None:
    """Checks a configuration against a JSON schema; the `UserError` names the key and what it expects."""
    import jsonschema

    schema = read_yaml(schema_path)
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    shapes = [error for error in errors if "allOf" not in error.absolute_schema_path]  # said before contradictions
    error = jsonschema.exceptions.best_match(shapes or errors)
    if error:
        key = ".".join(str(part) for part in error.absolute_path) or "the file"
        reason = error.message
        path = list(error.absolute_schema_path)
        if "allOf" in path:  # a contradiction; the clause says which
            clause = functools.reduce(lambda part, key: part[key], path[: path.index("allOf") + 2], schema)
            reason = clause["description"]
        elif error.validator == "additionalProperties":
            reason += f"; known keys: {', '.join(error.schema['properties'])}"
        elif error.validator == "type" and isinstance(error.instance, str):  # kv_cache: int8
            if error.instance in error.schema.get("properties", {}).get("dtype", {}).get("enum", ()):
                reason = f"write {path[-2]}: {{dtype: {error.instance}}}"
        elif error.validator == "contains":
            reason = f"{error.instance!r} lacks {error.validator_value['const']!r}"
        raise UserError(f"{where}: {key}: {reason}")


def load_table(path: Path | str, schema_path: Path) -> dict:
    """Reads and checks `models.yaml` or `recipes.yaml`."""
    table = read_yaml(user_path(path))
    validate(table, schema_path, str(path))
    return table or {}


def load_recipes(path: Path | str | None) -> dict[str, Recipe]:
    """The shipped recipes and those of a project's `path`, which add to them or replace one of the same name."""
    table = load_table(SHIPPED_RECIPES, RECIPES_SCHEMA) | (load_table(path, RECIPES_SCHEMA) if path else {})
    return {name: Recipe.parse(settings) for name, settings in table.items()}


@functools.cache
def reserved_names() -> frozenset[str]:
    """What lies in `results/{model}/` and is no recipe."""
    return frozenset(read_yaml(RECIPES_SCHEMA)["propertyNames"]["not"]["enum"])


def chat_templates(models: dict, where: str) -> dict[str, str | None]:
    """The text of each model's chat template, so that a change of a file's text is one of the configuration.

    None: the one that the model's tokenizer brings along, if any. Raises `UserError` for one that cannot be read.
    """
    texts = {}
    for name, model in models.items():
        template = model.get("chat_template")
        try:
            texts[name] = template and chat_template.read(template)
        except UserError as error:
            raise UserError(f"{where}: {name}.chat_template: {error}") from error
    return texts


def check_chat_template(name: str, model: dict, where: str, folder: Path | None = None) -> None:
    """Raises `UserError` if it can be seen already that neither a declared model nor its tokenizer has a chat template.

    That is where its source is a folder, or its checkpoint has been made, or is just being made, in `folder`.
    """
    source = model["source"]
    folder = folder or (user_path(source["local"]["path"]) if "local" in source else Path(f"results/{name}/checkpoint"))
    if "chat_template" not in model and folder.is_dir() and not chat_template.is_in(folder):
        raise UserError(
            f"{where}: {name}: evaluation.chat is true, but there is no chat_template, nor has the tokenizer in "
            f"{folder} one; add it, such as {name}.chat_template: plain"
        )


def check_new_checkpoint(name: str, config: dict, folder: Path) -> None:
    """`check_chat_template` of a checkpoint that is being made, if it will be chatted with.

    What is configured now is read, not what the rule depends on: no checkpoint is made again because of it.
    """
    if config["evaluation"]["chat"] and not marker(name):
        models = load_table(config["models"], MODELS_SCHEMA)
        check_chat_template(name, models[name], config["models"], folder)


def matrix_targets(config: dict) -> list[str]:
    """The files that `snakemake` alone makes. Raises `UserError` for what is no recipe, but lies beside them."""
    targets = []
    for entry in config["matrix"]:
        folder = f"results/{entry['model']}"
        for name in reserved_names() & {*entry["recipes"]}:
            raise UserError(f"config/config.yaml: matrix: {folder}/{name}/benchmark.json: {name!r} is no recipe")
        tasks = [f"lm_eval/{task}" for task in config.get("lm_eval", {}).get("tasks", ())]
        targets += [f"{folder}/hf/{name}.json" for name in ("rouge", "perplexity", *tasks)]
        targets += [f"{folder}/{name}" for name in TABLES[1:]]
        for recipe in entry["recipes"]:
            targets += [f"{folder}/{recipe}/{name}.json" for name in ("rouge", "perplexity", "benchmark", *tasks)]
    return targets


def task_options(config: dict) -> dict:
    """How an accuracy task is run: what of the configuration's `lm_eval` is not which."""
    return {key: value for key, value in config.get("lm_eval", {}).items() if key != "tasks"}


def tasks_state(config: dict) -> str | None:
    """Says whether files of the user's own tasks are those of another time (`files.state_of`)."""
    include = config.get("lm_eval", {}).get("include")
    return state_of(user_path(include).rglob("*")) if include else None


def runs_of_table(model: str, config: dict, recipes: Iterable[str], targets: Iterable[str]) -> dict[str, list]:
    """Of each run in a model's table, `hf` first, the names of the results that it is made of.

    They are in `results/{model}/{run}/`. Runs in the matrix have all of them, but for the scores of one that its gate
    has stopped; of others it is made of what is there, or is asked for by `targets`.
    """
    matrix = [run for entry in config["matrix"] if entry["model"] == model for run in entry["recipes"]]
    tasks = [f"lm_eval/{task}" for task in config.get("lm_eval", {}).get("tasks", ())] if matrix else []
    runs = {"hf": ["perplexity", "rouge", *tasks]} | {run: [*RESULTS, *tasks] for run in matrix}
    for run in matrix:
        if _stops(Path("results", model, run, "gate.json")):
            runs[run] = [name for name in runs[run] if name in ("perplexity", "gate", "benchmark")]
    folder = Path("results", model)
    there = sorted([*folder.glob("*/*.json"), *folder.glob("*/lm_eval/*.json")])
    names = "|".join([*RESULTS, "lm_eval/[^/]+"])
    result = re.compile(rf"results/{re.escape(model)}/(([^/@]+)(?:{LAYOUT})?)/({names})\.json")
    for match in filter(None, map(result.fullmatch, [*map(str, there), *map(os.path.normpath, targets)])):
        if match[2] in ("hf", *recipes) and match[3] not in runs.setdefault(match[1], []):
            runs[match[1]].append(match[3])
    return runs


def kinds_of_engine(folder: Path, build: dict, **described: object) -> list[str]:
    """Which kinds of engine a folder is to have: those of `build`, and a TensorRT engine that is there already.

    The latter where it is what `build` and what `config.json` is `described` by would make it, and its builder is at
    hand: that nobody asks for it any more is no reason to evaluate the run again. It goes when its file is removed.
    """
    kinds = [kind for kind in ("portable", "tensorrt") if kind in build["engines"]]
    if "tensorrt" in kinds:
        return kinds
    try:
        config = read_json(folder / CONFIG_FILE, {"outputs": dict, "builders": {"tensorrt": {"distribution": str}}})
    except UserError:  # there is none, or a portable engine alone
        return kinds
    builder = config["builders"]["tensorrt"]
    described["remove_input_padding"] = build["remove_input_padding"]
    same = all(config.get(key) == value for key, value in described.items())
    same &= build["compute_capabilities"] in ("auto", builder.get("compute_capabilities"))
    there = all((folder / name).exists() for name in config["outputs"]) and find_spec(builder["distribution"])
    return [*kinds, "tensorrt"] if same and there else kinds


def _stops(gate: Path) -> bool:
    """Whether a gate that has been measured lets no ROUGE be made."""
    try:
        result = read_json(gate)
    except UserError:
        return False
    return result.get("policy") == "fail" and result.get("above_limit") is True


def quantizations(recipes: dict[str, Recipe]) -> dict[str, dict]:
    """What `results/{model}/quantized/` can hold, by folder name: `quantization` to make or `source` to take."""
    found: dict[str, dict] = {}
    for recipe in recipes.values():
        name = Path(weights_folder(recipe)).name
        if recipe.quantization:
            found[name] = {"quantization": recipe.quantization}
        elif recipe.quant_checkpoint:
            found[name] = {"source": recipe.quant_checkpoint}
    return found


def calibrations(recipes: dict[str, Recipe]) -> dict[str, dict]:
    """What `results/{model}/calibration/` can hold, by file name without suffix: `settings`, and which `weights`."""
    found = {}
    for recipe in recipes.values():
        if recipe.needs_ranges:
            found[calibration_name(recipe)] = {"settings": recipe.text.settings, "weights": published(recipe)}
    return found


def weights_folder(recipe: Recipe) -> str:
    """Where a recipe's weights are, in `results/{model}/`."""
    if recipe.quantization:
        return f"quantized/{recipe.quantization.id}"
    return published(recipe) or "checkpoint"


def made_of(recipe: Recipe) -> dict[str, str]:
    """The folder of weights and the calibration file, if any, that a recipe is made of, in `results/{model}/`."""
    calibration = {"calibration": f"calibration/{calibration_name(recipe)}.npz"} if recipe.needs_ranges else {}
    return {"weights": weights_folder(recipe)} | calibration


def published(recipe: Recipe) -> str | None:
    """The folder of a recipe's `quant_checkpoint`, if it has one."""
    return f"quantized/published-{identity(recipe.quant_checkpoint)}" if recipe.quant_checkpoint else None


def calibration_name(recipe: Recipe) -> str:
    """Name of the calibration file that a recipe needs: of the original model, or of its published weights."""
    return f"{recipe.text.id}-{identity(recipe.quant_checkpoint)}" if recipe.quant_checkpoint else recipe.text.id


def _parts(target: str) -> re.Match | None:
    """Of a file in `results/`: `rehearsal/` or None, the model, and a run of it or another folder."""
    return re.match(rf"results/({REHEARSAL})?([^/]+)/([^/]+)(/|$)", os.path.normpath(target))


def check_targets(targets: Iterable[str], models: dict, recipes: dict, rehearse: bool = False) -> None:
    """Raises `UserError` for a target whose model or recipe is not declared, listing those that are.

    With `rehearse` also for one of a real model: nothing can rename what Snakemake's command line asks for.
    """
    for target in targets:
        if match := _parts(target):
            model, run = match[2], match[3]
            if model not in models:
                raise UserError(f"{target}: {unknown('model', model, models)}")
            if run not in reserved_names():
                try:
                    recipe, _ = split_run(run)
                except UserError as error:
                    raise UserError(f"{target}: {error}") from error
                if recipe not in recipes:
                    raise UserError(f"{target}: {unknown('recipe', recipe, recipes)}")
            if rehearse and not match[1]:
                right = rehearsal_target(target)
                raise UserError(f"{target}: this is no rehearsal; with rehearse=true ask for {right}")


def check_files_of_targets(targets: Iterable[str], models: dict, rules: Iterable[Any]) -> None:
    """Raises `UserError` for what none of Snakemake's rules makes of a declared model, listing the files beside it.

    And for a result that is asked for in another folder than `results/`, or in none.
    """
    from snakemake.io import strip_wildcard_constraints

    rules, targets = list(rules), list(targets)

    def makes(file: str) -> bool:
        return any(rule.is_producer(file) for rule in rules)

    for before, target in zip(["", *targets], targets, strict=False):
        path = os.path.normpath(target)
        if makes(path) or Path(target).is_file():
            continue
        names = path.split("/")
        for right in ("/".join(["results", *names[i:]]) for i in range(len(names))):
            if makes(right) and not before.startswith("--"):  # --report shown/MODEL/report.html
                raise UserError(f"{target}: nothing makes this; ask for {right}")
        match = re.match(rf"results/((?:{REHEARSAL})?[^/]+)(?:/([^/]+))?", path)
        if not match or match[1] not in models:
            continue
        model, run = match.groups()
        places = {"{model}": model, "{recipe}{layout}": run or "RECIPE", "{run}": run or "RECIPE", "{rank}": "0"}
        files = {strip_wildcard_constraints(file) for rule in rules for file in rule.output}
        for pattern, value in places.items():
            files = {file.replace(pattern, value) for file in files}
        folder = f"results/{model}/{run or ''}"
        files = {file for file in files if file.startswith(folder)}
        if run:
            files = set(filter(makes, files)) or files
        closest = difflib.get_close_matches(target, files, 1)
        raise UserError(
            f"{target}: nothing makes this; {f'closest: {closest[0]}; ' if closest else ''}ask for "
            f"{', '.join(sorted(files))}"
        )


def check_positions_of_targets(targets: Iterable[str], models: dict, recipes: dict, build: dict) -> None:
    """Raises `UserError` where a target's engine would have more positions than its model was made for.

    Of models that say what they look like; of the others the build itself says it.
    """
    matches = [match for target in targets if (match := _parts(target))]
    needed = build["max_input_len"] + build["max_output_len"]
    for name in dict.fromkeys(match[2] for match in matches if match[3] in TABLES or _recipe_of(match) in recipes):
        published = _published_config(models[name])
        if published is None or build["extrapolate_positions"]:
            continue
        length = published.get("max_position_embeddings")
        if type(length) is int and length >= needed:
            continue  # mostly; to know better takes torch
        from trtbuild.engine.build import check_positions

        if model := _model_config(name, models[name]):
            try:
                check_positions(model, BuildLimits(**{key: build[key] for key in LIMITS}))
            except UserError as error:
                raise UserError(f"config/config.yaml: build: for the model {name} {error}") from error


def check_layouts_of_targets(targets: Iterable[str], models: dict, recipes: dict) -> None:
    """Raises `UserError` where ranks cannot share a target's model: heads, channels or layers that do not divide.

    And groups of input channels of weights that the recipe quantizes. Of models that say what they look like; of the
    others, and of published weights, the build itself says it.
    """
    for target in targets:
        match = _parts(target)
        if not match or _recipe_of(match) not in recipes:
            continue
        name = match[2]
        layout = sizes(split_run(match[3])[1], models[name])
        if layout["tp_size"] * layout["pp_size"] == 1 or not (model := _model_config(name, models[name])):
            continue  # as mostly; to know better takes torch
        from trtbuild.decoder.mapping import Mapping
        from trtbuild.decoder.sharding import check_mapping

        if match[1]:
            model = dataclasses.replace(model, num_hidden_layers=rehearsal_layers(models[name]))
        try:
            check_mapping(model, Mapping(layout["tp_size"], layout["pp_size"]), recipes[_recipe_of(match)].group_size)
        except UserError as error:
            raise UserError(f"{target}: {error}") from error


def check_fp8_of_targets(targets: Iterable[str], config: dict, recipes: dict[str, Recipe]) -> None:
    """Raises `UserError` where a target's TensorRT engine would have FP8 and be for a GPU that has none.

    Of published weights the build itself says it.
    """
    build = config["build"]
    if "tensorrt" not in build["engines"] or build["compute_capabilities"] == "auto":
        return  # as mostly; to know better takes torch
    from trtbuild.engine.tensorrt_api import target_capabilities

    for target in targets:
        match = _parts(target)
        for run in _runs(match, config) if match else ():
            if recipe := recipes.get(split_run(run)[0]):
                try:
                    target_capabilities(build["compute_capabilities"], recipe.fp8)
                except UserError as error:
                    raise UserError(
                        f"config/config.yaml: build.compute_capabilities: {target} needs {run}, which has FP8: {error}"
                    ) from error


def check_rehearsal(targets: Iterable[str], config: dict, models: dict, recipes: dict[str, Recipe]) -> None:
    """Raises `UserError` for a rehearsal that cannot be; configuration, models and recipes are the declared ones."""
    for target in targets:
        match = _parts(target)
        if not match or not match[1] or match[2] not in models:
            continue
        model = match[2]
        if not shape_of(models[model]):
            raise UserError(
                f"{target}: the model {model} cannot be rehearsed; add its published config.json to {config['models']} "
                "as 'config'"
            )
        for run in _runs(match, config):
            recipe, _ = split_run(run)
            if recipe in recipes and recipes[recipe].quant_checkpoint:
                raise UserError(
                    f"{target}: the recipe {recipe} cannot be rehearsed; its published weights "
                    "(quant_checkpoint) have no dummy"
                )


def _recipe_of(match: re.Match) -> str:
    return split_run(match[3])[0]


def _runs(match: re.Match, config: dict) -> list[str]:
    """The run that a target is a file of, or those of the matrix that a table shows."""
    model, folder = match[2], match[3]
    matrix = [run for entry in config["matrix"] if entry["model"] == model for run in entry["recipes"]]
    return matrix if folder in TABLES else [folder]


def _published_config(model: dict) -> dict | None:
    """The config.json that a declared model or its source brings along."""
    published = shape_of(model)
    return read_json(user_path(published)) if isinstance(published, str) else published


def _model_config(name: str, model: dict) -> "ModelConfig | None":
    """What a declared model looks like; None where it does not say so, or says it only for rehearsals."""
    published = _published_config(model)
    if published is None:
        return None
    from trtbuild.models.families import canonical_config, config_from_hugging_face

    ((_, source),) = model["source"].items()
    where = f"the config of {name}"
    try:
        config = config_from_hugging_face(canonical_config(published, where, source.get("model_version")), where)
    except UserError:
        return None  # the model itself brings its own
    return dataclasses.replace(config, num_hidden_layers=source.get("num_layers", config.num_hidden_layers))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Says that `name` is no `kind`, and which there are: first those that look like it."""
    names = sorted(known)
    similar = [other for other in names if name.lower() in other.lower()] + difflib.get_close_matches(name, names)
    closest = f"closest: {', '.join(list(dict.fromkeys(similar))[:5])}; " if similar else ""
    return f"unknown {kind} {name!r}; {closest}known {kind}s: {', '.join(names)}"


def rehearses(config: dict) -> bool:
    """Takes `rehearse` as `--config` gives it, a word, and leaves it in `config` as the boolean that it means."""
    value = config.get("rehearse", False)
    config["rehearse"] = {"true": True, "false": False}.get(str(value).lower(), value)
    return config["rehearse"]


def check_limits(config: dict) -> None:
    """Raises `UserError` where evaluation or benchmark ask for more than the engines are built for."""
    build, benchmark = config["build"], config["benchmark"]
    for key, value, limit in (
        ("evaluation.max_output_len", config["evaluation"]["max_output_len"], "max_output_len"),
        ("benchmark.batch_size", benchmark["batch_size"], "max_batch_size"),
        ("benchmark.input_len", benchmark["input_len"], "max_input_len"),
        ("benchmark.output_len", benchmark["output_len"], "max_output_len"),
    ):
        if value > build[limit]:
            raise UserError(f"config/config.yaml: {key} is {value}, more than build.{limit} {build[limit]}")


def check_articles(config: dict, recipes: dict[str, Recipe]) -> None:
    """Raises `UserError` where evaluation or a recipe's calibration ask for more than the shipped articles."""
    wanted = {"config/config.yaml: evaluation.dataset": config["evaluation"]["dataset"]}
    for name, recipe in recipes.items():
        wanted[f"{config['recipes']}: {name}.calibration"] = recipe.text.dataset | {"samples": recipe.text.samples}
    for where, dataset in wanted.items():
        if dataset["name"] == OWN:
            try:
                load_articles(**dataset)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error


def export_package(folder: str) -> None:
    """Makes this package importable for the rules' scripts, in whatever environment they run."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def model_config(name: str, model: dict) -> "ModelConfig | None":
    """What a model looks like: by its checkpoint, or else as declared.

    None where nothing says it yet, or a file is wrong: the rule that reads it says in what.
    """
    made = Path(f"results/{name}/checkpoint/config.json")
    try:
        return _config_of_checkpoint(made, made.stat().st_mtime_ns) if made.exists() else _model_config(name, model)
    except UserError:
        return None


@functools.cache
def _config_of_checkpoint(file: Path, time: int) -> "ModelConfig":
    from trtbuild.models.families import config_from_hugging_face

    return config_from_hugging_face(read_json(file), file)


def bytes_of_source(source: dict) -> int:
    """Of the files of a source that is on this machine; 0 where they are elsewhere, or not to be read."""
    ((_, options),) = source.items()
    if "path" not in options:
        return 0
    path = user_path(options["path"])
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def say_costs() -> None:
    """Has Snakemake's table of jobs, that of a dry run too, end with what they take: GPUs, and a rehearsal's time.

    It has no setting for that, so a method is wrapped that is not documented.
    """
    from snakemake.dag import DAG

    stats = DAG.stats

    def stats_with_costs(dag: Any) -> tuple[str, dict]:
        message, counts = stats(dag)
        jobs = {*dag.needrun_jobs(), *dag.finished_jobs}
        gpus = Counter(job.resources.get("gpu", 0) for job in jobs)
        taken = [
            f"{jobs} {'jobs take' if jobs > 1 else 'job takes'} {each}" for each, jobs in sorted(gpus.items()) if each
        ]
        message += f"\nGPUs: {', '.join(taken) or 'none'}\n"
        rehearsed = [job for job in jobs if marker(str(job.wildcards.get("model", "")))]
        return message + (f"Rehearsal: {cost(rehearsed)}\n" if rehearsed else ""), counts

    DAG.stats = stats_with_costs


@contextmanager
def rule_log(snakemake: Any) -> Iterator[None]:
    """Runs a rule's script with its output, C++ libraries' included, copied to the rule's log and the terminal.

    Torch gets the rule's threads, and the rule as many GPUs as it asks for. What lies outside the program
    (`errors.one_line`) ends the log as one line and the script with exit code 2, an interrupt with 130; anything else
    ends it with its traceback and exit code 1.
    """
    import torch

    torch.set_num_threads(snakemake.threads)
    log = Path(snakemake.log[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    # In sessions of their own Ctrl-C does not reach them, so that the log keeps what was said.
    apart = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, start_new_session=True)
    with (
        apart(["tee", str(log)], stdout=sys.stderr.fileno()) as tee,
        apart([sys.executable, "-IS", "-c", LINES], stdout=tee.stdin) as lines,
    ):
        assert tee.stdin
        assert lines.stdin
        tee.stdin.close()
        for descriptor in (1, 2):
            os.dup2(lines.stdin.fileno(), descriptor)
        lines.stdin.close()
        code = 0
        try:
            for output in snakemake.output:
                check_output(output)
            with local_job(snakemake.output[0]), taken(_gpus(snakemake)):
                yield
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except BaseException as error:
            code = 2 if (line := one_line(error)) else 1
            print(f"error: {line}", file=sys.stderr) if line else traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.close(descriptor)
    os._exit(code)  # the streams are gone, and with them what an orderly exit would write


def _gpus(snakemake: Any) -> int:
    """How many GPUs a rule needs; its resource is less than its ranks where fewer are given away at a time."""
    asked = snakemake.resources.get("gpu", 0)
    return asked and max(asked, snakemake.params.get("ranks", 1))
