"""Kinds of kernels by their names, the page's sums, and a profile of a real session."""

import json

import pytest

from trtbuild.evaluation import profile as module
from trtbuild.evaluation.benchmark import Generation, by_engine, random_prompts
from trtbuild.evaluation.profile import KINDS, OTHER, kind_of, page, write_profile
from trtbuild.files import MARKER, check_output
from trtbuild.runtime.open import open_engine


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x64_64x8_2x1_v_bz_TNN", "products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void gemv2T_kernel_val<int, int, __half, ...>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>", "sampling"),
        ("_decode_attention_kernel", "attention"),
        ("_one_row_product_kernel", "products"),
        ("_rms_norm_kernel", "norms"),
        ("_draw_kernel", "sampling"),
        ("_all_reduce_rows_kernel", "other ranks"),
        ("ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "other ranks"),
        ("_few_rows_product_kernel", "products"),
        ("_widen_int4_kernel", "products"),
        ("_swiglu_kernel", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", "other"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::_weight_int4pack_mm_for_cpu", "products"),
        ("aten::mm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_rms_norm", "norms"),
        ("aten::argmax", "sampling"),
        ("aten::silu", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_page():
    """Two steps; shares are of the sum, counts and times those of one step."""
    spent = [("a_gemm", 30.0), ("a_gemm", 10.0), ("my_norm", 5.0), ("x|y", 5.0)]
    lines = page(spent, 2).splitlines()
    assert lines[2:4] == ["| products | 1 | 20.0 | 80.0 |", "| norms | 0.5 | 2.5 | 10.0 |"]
    assert {line.split("|")[1].strip() for line in lines[2:8]} == {*KINDS, OTHER}
    assert "| `a_gemm` | products | 1 | 20.0 | 20.00 |" in lines
    assert "| `x/y` | other | 0.5 | 2.5 | 5.00 |" in lines


def test_a_profile(tiny_engine, tmp_path):
    session = open_engine(tiny_engine, "portable", "cpu").session
    written = write_profile(by_engine(session, random_prompts(2, 16)), tmp_path / "new" / "folder", "A title", 5)
    assert {path.name for path in written.parent.iterdir()} == {
        *("profile.md", "context.trace.json", "generation.trace.json", MARKER),
    }
    check_output(written.parent)  # the next one may go there, too
    text = written.read_text()
    assert text.startswith("# A title\n")
    context, generation = text.split("## Context phase")[1].split("## Generation phase, one of 4 steps")
    for section in (context, generation):
        rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
        shares = {row[0].strip(): float(row[3]) for row in rows[2:8]}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert shares["products"] > 1
        assert shares["attention"] > 0.1
    for phase in ("context", "generation"):
        assert json.loads((written.parent / f"{phase}.trace.json").read_text())["traceEvents"]


def test_the_profilers_own_start_is_no_part_of_a_phase(tiny_engine, tmp_path, monkeypatch):
    heard = []

    class Profile(module.profile):
        def __enter__(self):
            heard.append("profiler")
            return super().__enter__()

    wait = Generation.wait
    monkeypatch.setattr(module, "profile", Profile)
    monkeypatch.setattr(Generation, "wait", lambda self: heard.append("clock") or wait(self))
    session = open_engine(tiny_engine, "portable", "cpu").session
    write_profile(by_engine(session, random_prompts(1, 4)), tmp_path, "A title", 3)
    assert " ".join(heard).count("profiler clock clock") == heard.count("profiler") == 2


def test_one_token_has_no_generation_phase(tiny_engine, tmp_path):
    session = open_engine(tiny_engine, "portable", "cpu").session
    written = write_profile(by_engine(session, random_prompts(1, 4)), tmp_path, "One", 1)
    assert "Generation" not in written.read_text()
