"""Faults to plant, one at a time, and for each the test that has to find it.

A row of another file or language needs nothing else: `file` is any of the checkout's under hart_infer/, kernels/ or csrc/.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Replace `before`, which stands in `file` once, by `after`; then `test` fails."""

    name: str
    file: str
    before: str
    after: str
    test: str


def cuda(name: str, header: str, before: str, after: str, test: str) -> Mutation:
    """In a device header."""
    return Mutation(name, f"csrc/include/{header}.cuh", before, after, f"tests/csrc/test_norms.py::{test}")


def triton(name: str, module: str, before: str, after: str, test: str, file: str = "test_triton") -> Mutation:
    """In a Triton kernel."""
    return Mutation(name, f"kernels/{module}.py", before, after, f"tests/ops/{file}.py::{test}")


def plain(name: str, file: str, before: str, after: str) -> Mutation:
    """In a kernel of the CPU in plain C++."""
    test = f"test_agrees_with_the_standard_library_without_undefined_behaviour[{file}]"
    return Mutation(name, f"csrc/cpu/{file}.cpp", before, after, f"tests/csrc/test_plain.py::{test}")


MUTATIONS = [
    plain(
        "the last word of a block left out",
        "exponential",
        "(next + 2 * count + WORDS - 1) / WORDS",
        "(next + 2 * count) / WORDS",
    ),
    plain("half of the last word's weight", "exponential", "0x1fffffu", "0xfffffu"),
    plain("the root of a half not the lowest mantissa", "exponential", "(ONE - ROOT)", "0u"),
    plain("a word too few left", "exponential", "(WORDS + 1 - next)", "(WORDS - next)"),
    plain("the lowest kept logit dropped too", "filter", "order[i] < lowest ||", "order[i] <= lowest ||"),
    plain("one code too few", "filter", ">= a->top_k", "> a->top_k"),
    plain("what top-k removed counts for top-p", "filter", "weight[i] = order[i] >= lowest ?", "weight[i] = true ?"),
    plain("equal logits all kept", "filter", "if (!fits(mass += weight[i])) break;", "break;"),
    cuda(
        "no barrier before the warps' sums are read",
        "reduce",
        "    __syncthreads();\n    value = lane",
        "    value = lane",
        "test_rms_norm[1000-float32]",
    ),
    cuda(
        "no barrier before the warps' sums are written again",
        "reduce",
        "    __syncthreads();  // the next exchange writes there again\n",
        "",
        "test_the_order_of_threads_does_not_matter[1000-reverse]",
    ),
    cuda(
        "shuffles that leave half of a warp out",
        "reduce",
        "float warp_sum(float value) {\n#pragma unroll\n    for (int distance = WARP / 2;",
        "float warp_sum(float value) {\n#pragma unroll\n    for (int distance = WARP / 4;",
        "test_rms_norm[1000-float32]",
    ),
    cuda(
        "nothing beyond what is held in registers",
        "rows",
        "for (; column < width; column += step) {",
        "for (; column + step < width; column += step) {",
        "test_rms_norm[9001-float32]",
    ),
    cuda(
        "one column too few",
        "rows",
        "if (column < width) {",
        "if (column + 1 < width) {",
        "test_rms_norm[7-float32]",
    ),
    cuda(
        "groups taken for rows",
        "rows",
        "group = blockIdx.x / rows, row = blockIdx.x % rows",
        "group = blockIdx.x % rows, row = blockIdx.x / rows",
        "test_groups_share_a_modulation_or_have_their_own",
    ),
    cuda(
        "offsets of 32 bits",
        "rows",
        "row * view.row;",
        "int(row * view.row);",
        "test_rows_may_be_four_billion_bytes_apart",
    ),
    Mutation(
        "both processes compute the conditional half",
        "hart_infer/generation/halves.py",
        "rank * count, (rank + 1) * count",
        "0, count",
        "tests/pipelines/test_guidance_parallel.py::test_two_processes_draw_what_one_does",
    ),
    Mutation(
        "a scale without guidance from the process that has no conditional keys",
        "hart_infer/generation/halves.py",
        "if first else inputs.x)[0]",
        "if first else inputs.x)[1]",
        "tests/pipelines/test_guidance_parallel.py::test_two_processes_draw_what_one_does",
    ),
    Mutation(
        "nothing shared",
        "hart_infer/generation/halves.py",
        "if schedule.guided else schedule",
        "if not schedule.guided else schedule",
        "tests/pipelines/test_guidance_parallel.py::test_two_processes_draw_what_one_does",
    ),
    Mutation(
        "any prompts agree",
        "hart_infer/generation/halves.py",
        "0.03 * first.norm",
        "3 * first.norm",
        "tests/pipelines/test_guidance_parallel.py::test_two_processes_draw_what_one_does",
    ),
    Mutation(
        "packs beyond the end of a row",
        "csrc/rms_norm.cu",
        "shape.width % VEC == 0 &&",
        "",
        "tests/csrc/test_norms.py::test_a_single_row_has_any_width[33-bfloat16]",
    ),
    cuda(
        "not rounded before the weight",
        "rms_norm",
        "product<T>(product<T>(values[i], factor), weights[i])",
        "product<T>(values[i] * factor, weights[i])",
        "test_rms_norm[1000-bfloat16]",
    ),
    cuda(
        "a sum that is not rounded before its norm",
        "rms_norm",
        "values[i] = sum<T>(values[i], more[i])",
        "values[i] = values[i] + more[i]",
        "test_add_rms_norm[1000-bfloat16]",
    ),
    cuda(
        "1 + scale rounded to the wrong dtype",
        "rms_norm",
        "sum<P>(1.f, scales[i])",
        "sum<T>(1.f, scales[i])",
        "test_rms_norm_modulate_of_an_input_wider_than_its_parameters[256-torch.bfloat16]",
    ),
    cuda(
        "the mean square for the variance",
        "layer_norm_modulate",
        "(values[i] - mean) * (values[i] - mean)",
        "values[i] * values[i]",
        "test_layer_norm_modulate[affine-1000-bfloat16]",
    ),
    cuda(
        "a gate that the update does not pass",
        "layer_norm_modulate",
        "product<T>(gates[i], more[i])",
        "more[i]",
        "test_gated_layer_norm_modulate[256-float32]",
    ),
    cuda(
        "the largest number for the largest magnitude",
        "rms_norm_quantized",
        "fabsf(values[i])",
        "values[i]",
        "test_rms_norm_quantized[int8-1000-float32]",
    ),
    triton(
        "one angle per pair",
        "rope_cache",
        "(second * cos_second)",
        "(second * cos_first)",
        "test_rope_cache[(2, 5, 3, 24)-plain-float32]",
    ),
    triton(
        "a value one slot further in the cache",
        "rope_cache",
        "v_out + row * v_row + head * v_head + token * v_token",
        "v_out + row * v_row + head * v_head + (token + 1) * v_token",
        "test_rope_cache[(2, 5, 3, 24)-plain-float32]",
    ),
    triton(
        "the last block of keys left out",
        "attention",
        "range(first, whole, BLOCK_K)",
        "range(first, whole - BLOCK_K, BLOCK_K)",
        "test_attention[(1, 1, 70, 333, 64)-float16]",
    ),
    triton(
        "the tail of the keys left out",
        "attention",
        "range(whole, last, BLOCK_K)",
        "range(last, last, BLOCK_K)",
        "test_attention[(1, 1, 70, 333, 64)-float32]",
    ),
    triton(
        "keys beyond the last in the tail",
        "attention",
        'tl.where(place[None, :] < last, score, float("-inf"))',
        "score",
        "test_attention[(1, 1, 70, 333, 64)-float32]",
    ),
    triton(
        "the last key left out",
        "attention",
        "last = tl.minimum(first + keys_per_split, keys)",
        "last = tl.minimum(first + keys_per_split, keys - 1)",
        "test_attention[(1, 2, 16, 64, 24)-float32]",
    ),
    triton(
        "splits that weigh alike",
        "attention",
        "weight = total * tl.exp2(largest - tl.max(largest, 0))",
        "weight = total",
        "test_attention[(1, 1, 5, 1100, 80)-float32]",
    ),
    triton(
        "an out-of-memory that is remembered",
        "launch",
        "        if _ran_out_of_memory(error):\n            raise\n",
        "",
        "test_out_of_memory_is_raised_and_not_remembered",
        "test_launch",
    ),
    triton(
        "a silu that is not rounded before the product",
        "swiglu",
        "tl.div_rn(g, 1.0 + tl.exp(-g)).to(dtype).to(tl.float32)",
        "g / (1.0 + tl.exp(-2.0 * g))",
        "test_swiglu[(2, 3, 1025)-float32]",
    ),
    triton(
        "the guidance's sign",
        "guided_sample",
        "x = with_guidance * x - guidance *",
        "x = with_guidance * x + guidance *",
        "test_kernel_and_reference_draw_alike_and_mix_as_exactly",
        "test_guided_sample",
    ),
    triton(
        "one draw for the code and for the mixture",
        "guided_sample",
        "x * logit_gain + _gumbel(mixing)",
        "x * logit_gain + _gumbel(race)",
        "test_kernel_and_reference_draw_alike_and_mix_as_exactly",
        "test_guided_sample",
    ),
    triton(
        "one code too many",
        "guided_sample",
        "reached >= top_k",
        "reached > top_k",
        "test_what_stays_is_what_the_filter_leaves",
        "test_guided_sample",
    ),
    triton(
        "slabs merged without the distance of their means",
        "group_norm_silu",
        "square + count * distance * distance, 1), 0) / total",
        "square, 1), 0) / total",
        "test_group_norm_silu",
        "test_group_norm_silu",
    ),
    triton(
        "an x0 without its limits",
        "diffusion_step",
        "x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))",
        "x0 = x0 + 0.0",
        "test_every_kind_of_step",
        "test_diffusion_step",
    ),
    Mutation(
        "a reference that rounds once",
        "hart_infer/ops/rms_norm.py",
        "(wide * scale).to(x.dtype) * weight",
        "(wide * scale * weight).to(x.dtype)",
        "tests/models/parts/test_layers.py::test_rms_norm_rounds_before_the_weight",
    ),
    Mutation(
        "a tie at top-k's threshold that goes",
        "hart_infer/ops/logits.py",
        "logits.masked_fill_(logits < lowest, -torch.inf)",
        "logits.masked_fill_(logits <= lowest, -torch.inf)",
        "tests/ops/test_logits.py::test_top_k_keeps_ties_at_the_threshold",
    ),
    Mutation(
        "a top-p that keeps one code too many",
        "hart_infer/ops/logits.py",
        "cumsum_(dim=-1) <= removable",
        "cumsum_(dim=-1) < removable",
        "tests/ops/test_logits.py::test_top_p_removes_what_cumulates_to_at_most_one_minus_p",
    ),
    Mutation(
        "a mixture without its temperature",
        "hart_infer/generation/sampling.py",
        ".div_(stage.temperature)",
        "",
        "tests/generation/test_sampling.py::test_the_mixture_is_the_paper_s_gumbel_softmax",
    ),
    Mutation(
        "a batch that shares one seed",
        "hart_infer/generation/sampling.py",
        "images_per_seed)\n        self._generators = [torch.Generator().manual_seed(seed) for",
        "images_per_seed)\n        self._generators = [torch.Generator().manual_seed(seeds[0]) for",
        "tests/generation/test_sampling.py::test_an_image_s_draws_do_not_depend_on_its_batch",
    ),
    Mutation(
        "a generator that step noise leaves too early",
        "hart_infer/generation/noise.py",
        "self._draw(2 * self.images_per_seed,",
        "self._draw(self.images_per_seed,",
        "tests/generation/test_sampling.py::test_the_draws_are_those_that_the_released_code_makes",
    ),
    Mutation(
        "the unconditional half in front",
        "hart_infer/ops/logits.py",
        "first, second = rows.chunk(2)",
        "second, first = rows.chunk(2)",
        "tests/ops/test_logits.py::test_guidance",
    ),
    Mutation(
        "one angle per pair, in the reference",
        "hart_infer/ops/rope.py",
        "(second * cos[..., half:])",
        "(second * cos[..., :half])",
        "tests/models/parts/test_rope.py::test_two_angles_per_pair",
    ),
    Mutation(
        "an x0 without its limits, in the reference",
        "hart_infer/ops/diffusion_step.py",
        ".clamp_(-1, 1)",
        "",
        "tests/generation/test_residual.py::test_last_step_adds_no_noise_and_clips",
    ),
    Mutation(
        "the residual's noise at full strength",
        "hart_infer/generation/residual.py",
        ".view(x.shape) * temperature if",
        ".view(x.shape) if",
        "tests/generation/test_residual.py::test_temperature_scales_what_the_steps_add_alone",
    ),
    Mutation(
        "a graph for any of the residual's temperatures",
        "hart_infer/engine/graphs.py",
        "return replace(stage, guidance=float(stage.guided), **filters)",
        "return replace(stage, guidance=float(stage.guided), residual_temperature=1.0, **filters)",
        "tests/engine/test_graphs.py::test_another_kind_of_call_has_graphs_of_its_own",
    ),
    Mutation(
        "settings that a graph bakes in",
        "hart_infer/generation/sampling.py",
        "        self._settings.copy_(other._settings)\n",
        "",
        "tests/engine/test_graphs.py::test_replayed_pictures_are_the_eager_ones",
    ),
    Mutation(
        "a prompt that a graph bakes in",
        "hart_infer/engine/graphs.py",
        "            own.copy_(given)\n",
        "            pass\n",
        "tests/engine/test_graphs.py::test_replayed_pictures_are_the_eager_ones",
    ),
    Mutation(
        "graphs without top-p used with it",
        "hart_infer/engine/graphs.py",
        '"top_p": float(stage.top_p > 0)',
        '"top_p": 0.0',
        "tests/engine/test_graphs.py::test_another_kind_of_call_has_graphs_of_its_own[{'top_p': 0.8}]",
    ),
    triton(
        "noise that steps share",
        "normal_noise",
        "+ step.to(tl.uint32)",
        "+ 0",
        "test_kernel_and_reference_draw_alike",
        "test_normal_noise",
    ),
    Mutation(
        "a scale that sees what is not written yet",
        "hart_infer/models/parts/cache.py",
        "end = self.offset + self.length",
        "end = None",
        "tests/models/parts/test_cache.py::test_a_scale_sees_all_that_its_layer_wrote_and_nothing_else",
    ),
    triton(
        "logits that are read once more",
        "guided_sample",
        'x = tl.load(logits + place, mask=valid, other=float("-inf")).to(tl.float32)',
        'x = tl.load(logits + place, mask=valid, other=float("-inf")).to(tl.float32)\n'
        '    x = tl.load(logits + place, mask=valid, other=float("-inf")).to(tl.float32)',
        "test_a_kernel_moves_what_is_written_down[guided_sample]",
        "test_traffic",
    ),
    Mutation(
        "a scale that later ones see although it is not cached",
        "hart_infer/generation/schedule.py",
        "offset += stage.length if stage.cached else 0",
        "offset += stage.length",
        "tests/generation/test_next_scale.py::test_a_scale_that_is_not_cached_is_seen_by_no_later_one[1]",
    ),
    Mutation(
        "both halves where guidance is off",
        "hart_infer/generation/next_scale.py",
        "rows = state.batch_size * (2 if stage.guided else 1)",
        "rows = state.batch_size * (2 if state.schedule.guided else 1)",
        "tests/generation/test_next_scale.py::test_a_scale_without_guidance_runs_the_conditional_half[2]",
    ),
    Mutation(
        "a last scale that is refined",
        "hart_infer/generation/schedule.py",
        "phi=phi_index(index, len(patch_nums), share_quant_resi) if index < last else None",
        "phi=phi_index(index, len(patch_nums), share_quant_resi)",
        "tests/generation/test_schedule.py::test_residual_convolution_is_the_nearest_tick_and_none_at_the_end",
    ),
    Mutation(
        "an unconditional prefix that outlives the weights",
        "hart_infer/engine/next_scale.py",
        "if kept is None or not kept[0].fits(self.transformer):",
        "if kept is None:",
        "tests/pipelines/test_hart.py::test_the_kept_unconditional_context_does_not_outlive_the_weights",
    ),
    Mutation(
        "a prefix of other settings",
        "hart_infer/models/parts/stamp.py",
        " and self._settings == _settings(tensors)",
        "",
        "tests/pipelines/test_hart.py::test_a_call_leaves_nothing_of_its_settings_to_the_next[autocast]",
    ),
    Mutation(
        "kernels under autocast",
        "hart_infer/ops/registry.py",
        " or (autocast_dtype(x.device.type) and _is_mixed(given))",
        "",
        "tests/ops/test_registry.py::test_where_autocast_mixes_dtypes_the_reference_runs",
    ),
    Mutation(
        "padding that a prompt's tokens attend to",
        "hart_infer/models/text.py",
        "return shown & mask.new_ones",
        "return shown | mask.new_ones",
        "tests/models/test_text.py::test_a_left_padded_row_of_the_mask_sees_nothing_and_others_see_no_padding",
    ),
    Mutation(
        "log-scales without their limit",
        "hart_infer/models/parts/attention.py",
        "self.log_scale.clamp(max=MAX_LOG_SCALE)",
        "self.log_scale",
        "tests/models/test_var.py::test_log_scales_are_clamped_at_100",
    ),
    Mutation(
        "freed memory that is not kept",
        "hart_infer/pipelines/networks.py",
        "            keep_freed_memory()",
        "            pass",
        "tests/engine/test_cpu.py::test_a_large_model_leaves_the_memory_s_keeping_alone",
    ),
    Mutation(
        "gates of attention and MLP exchanged",
        "hart_infer/models/next_scale.py",
        "x, normed = self.norm.modulated_after(x, self.attn(normed, table, place, layer), gamma1, scale2, shift2)",
        "x, normed = self.norm.modulated_after(x, self.attn(normed, table, place, layer), gamma2, scale2, shift2)",
        "tests/models/test_var.py::test_logits_of_every_scale[False]",
    ),
    Mutation(
        "the exact GELU",
        "hart_infer/ops/gelu_tanh.py",
        'F.gelu(x, approximate="tanh")',
        "F.gelu(x)",
        "tests/models/test_var.py::test_logits_of_every_scale[False]",
    ),
    Mutation(
        "PyTorch's eps in a block's norm",
        "hart_infer/models/var.py",
        "LayerNorm(config.norm_eps),\n        NormalizedAttention",
        "LayerNorm(1e-5),\n        NormalizedAttention",
        "tests/models/test_var.py::test_the_norm_s_eps_is_the_configuration_s[1e-06]",
    ),
    Mutation(
        "no class for the first class",
        "hart_infer/models/var.py",
        "torch.full((1,), self.config.num_classes)",
        "torch.full((1,), 0)",
        "tests/models/test_var.py::test_no_class_is_the_last_row",
    ),
    Mutation(
        "heads taken for depth",
        "hart_infer/checkpoints/var.py",
        "depth=max(blocks) + 1",
        'depth=shapes["blocks.0.attn.scale_mul_1H11"][0][1]',
        "tests/models/test_var.py::test_what_a_released_file_implies",
    ),
    Mutation(
        "guidance that stops growing a scale early",
        "hart_infer/generation/schedule.py",
        "guidance=settings.guidance_scale * (index / last)",
        "guidance=settings.guidance_scale * (min(index, last - 1) / last)",
        "tests/generation/test_schedule.py::test_var_reaches_all_of_its_guidance_and_progress_at_the_last_scale",
    ),
    Mutation(
        "VAR's last scale that is not refined",
        "hart_infer/generation/schedule.py",
        "            phi=phi_index(index, len(patch_nums), share_quant_resi),\n",
        "            phi=phi_index(index, len(patch_nums), share_quant_resi) if index < last else None,\n",
        "tests/pipelines/test_edit.py::test_what_is_kept_far_away_is_the_reconstruction_s[False]",
    ),
    Mutation(
        "a half that is kept",
        "hart_infer/pipelines/edit.py",
        "align_corners=False) > 0.5",
        "align_corners=False) >= 0.5",
        "tests/pipelines/test_edit.py::test_the_first_scale_is_kept_whole_and_others_above_a_half",
    ),
    Mutation(
        "a box whose halves go up",
        "hart_infer/pipelines/edit.py",
        '(round(check_float(value, "The box\'s numbers", 0, 1) * side) for',
        '(int(check_float(value, "The box\'s numbers", 0, 1) * side + 0.5) for',
        "tests/pipelines/test_edit.py::test_a_box_s_edges_are_the_nearest_cells_half_to_even",
    ),
    Mutation(
        "codes for the continuous residual",
        "hart_infer/pipelines/edit.py",
        "self.tokens.residual if stage.phi is None else self.tokens.embeddings[stage.index]",
        "self.tokens.embeddings[stage.index]",
        "tests/pipelines/test_edit.py::test_hart_s_last_scale_keeps_the_picture_s_continuous_residual",
    ),
]
