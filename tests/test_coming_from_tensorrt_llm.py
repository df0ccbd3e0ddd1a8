"""The table for users of TensorRT-LLM's examples: whole, and of options, recipes and keys that are there."""

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import trtbuild
from trtbuild.cli import app
from trtbuild.workflow import load_recipes

TEXT = (Path(__file__).parents[1] / "docs" / "coming-from-tensorrt-llm.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in TEXT.split("\n## ")[1:]}
SCHEMAS = Path(trtbuild.__file__).parent / "schemas"
# What the scripts' own parsers knew, llama's, qwen's and baichuan's.
FLAGS = {
    "build.py": """
        world_size tp_size pp_size model_dir hf_model_dir ft_model_dir ft_dir_path bin_model_dir meta_ckpt_dir
        quant_ckpt_path model_version dtype logits_dtype timing_cache profiling_verbosity log_level vocab_size n_layer
        n_positions n_embd n_head n_kv_head multiple_of ffn_dim_multiplier inter_size hidden_act rms_norm_eps
        max_batch_size max_input_len max_output_len max_beam_width rotary_base rotary_scaling use_gpt_attention_plugin
        use_gemm_plugin use_rmsnorm_plugin parallel_build enable_context_fmha enable_context_fmha_fp32_acc
        multi_block_mode enable_xqa visualize load_by_shard enable_debug_output gpus_per_node builder_opt output_dir
        remove_input_padding use_fused_mlp enable_pos_shift dense_context_fmha use_smooth_quant per_channel per_token
        per_group group_size int8_kv_cache use_parallel_embedding embedding_sharding_dim enable_fp8 fp8_kv_cache
        quantized_fp8_model_path use_weight_only disable_weight_only_quant_plugin weight_only_precision quantize_lm_head
        use_inflight_batching paged_kv_cache use_lookup_plugin tokens_per_block max_num_tokens strongly_typed
        use_custom_all_reduce max_prompt_embedding_table_size gather_all_token_logits gather_context_logits
        gather_generation_logits use_lora_plugin lora_target_modules hf_lora_dir max_lora_rank moe_num_experts moe_top_k
        moe_tp_mode moe_renorm_mode""",
    "hf_llama_convert.py, hf_qwen_convert.py, hf_baichuan_convert.py": """
        in-file out-dir tensor-parallelism processes calibrate-kv-cache smoothquant storage-type dataset-cache-dir
        load-model-on-cpu convert-model-on-cpu max_input_len model""",
    "quantize.py": "model_dir dtype qformat calib_size export_path tp_size cache_dir seed",
    "run.py": """
        max_output_len max_new_tokens log_level engine_dir tokenizer_dir input_text input_file input_tokens output_csv
        output_npy num_beams max_input_length temperature top_k top_p length_penalty repetition_penalty presence_penalty
        frequency_penalty early_stopping beam_search_diversity_rate random_seed end_id stop_words bad_words
        no_repeat_ngram_size streaming streaming_interval run_profiling use_py_session debug_mode no_add_special_tokens
        no_prompt_template tokenizer_type vocab_file hf_model_dir max_attention_window_size max_kv_cache_length
        sink_token_length prompt_table_path prompt_tasks num_prepend_vtokens lora_dir lora_ckpt_source lora_task_uids
        medusa_choices output_logits_npy output_log_probs_npy output_cum_log_probs_npy""",
    "summarize.py": """
        hf_model_location hf_model_dir tokenizer_dir vocab_file test_hf test_trt_llm data_type dataset_path log_level
        engine_dir batch_size max_ite check_accuracy tensorrt_llm_rouge1_threshold num_beams top_k top_p temperature
        length_penalty repetition_penalty output_len max_input_length max_kv_cache_length max_attention_window_size
        eval_ppl eval_task debug debug_mode no_add_special_tokens hf_device_map_auto output_dir use_py_session""",
}


def rows(section):
    return [row.strip("| ").split(" | ") for row in SECTIONS[section].split("\n") if row.startswith("| `")]


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_has_a_row(script):
    named = {flag for row in rows(script) for flag in re.findall(r"--([\w-]+)", row[0])}
    assert named >= {*FLAGS[script].split()}
    for row in rows(script):
        assert len(row) == 2, row
        assert row[1].startswith("none") or "`" in row[1], row


def commands():
    """Each `trtbuild COMMAND --option ...` of the text."""
    code = [*re.findall(r"`(?:mpiexec -n 2 )?trtbuild ([\w-]+)([^`]*)`", TEXT)]
    blocks = "\n".join(line for line in TEXT.split("\n") if line.startswith("    ")).replace("\\\n", " ")
    return [*code, *re.findall(r"trtbuild ([\w-]+)(.*)", blocks)]


def test_every_command_and_option_is_there():
    known = get_command(app).commands
    assert len(commands()) > 60
    for command, rest in commands():
        options = {name for option in known[command].params for name in option.opts}
        assert {*re.findall(r"--[\w-]+", rest)} <= options, (command, rest)
    everywhere = {name for command in known.values() for option in command.params for name in option.opts}
    here = " ".join(row[1] for script in FLAGS for row in rows(script))
    assert {*re.findall(r"--[\w-]+", here)} <= everywhere


def test_every_recipe_is_there():
    named = {*re.findall(r"--recipe ([\w-]+)", TEXT)}
    for row in re.findall(r"recipe (`[^|;]+)", TEXT):
        named |= {*re.findall(r"`([a-z][\w-]*)`", row)}
    assert len(named) > 12
    assert named <= {*load_recipes(None)}


@pytest.mark.parametrize(("kind", "file"), [("recipe", "recipes"), ("model", "models"), ("configuration", "config")])
def test_every_key_is_there(kind, file):
    """By the schema that configuration files are checked against."""
    keys = re.findall(rf"{kind} key `([\w.]+)`", TEXT)
    assert keys
    schema = yaml.safe_load((SCHEMAS / f"{file}.schema.yaml").read_text())
    top = schema.get("properties") or schema["additionalProperties"]["properties"]
    for key in keys:
        level = {"properties": top}
        for part in key.split("."):
            level = level["properties"][part]
