"""What every test shares: one thread in each process, the same drawn examples, the long tests first."""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; a run takes it for what was asked for

# the same examples in every run, so that what passes here passes elsewhere; HYPOTHESIS_PROFILE=default draws others
SLOW = (hypothesis.HealthCheck.too_slow,)  # which a busy machine makes of any test
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# forms of a test that cost many seconds and are like another that runs by default: of the slow suite
SLOW_FORMS = (
    "test_a_plan_holds_the_codes_and_not_dense_weights[int8]",
    "test_a_plan_holds_the_codes_and_not_dense_weights[divide]",
    "test_a_plan_holds_the_codes_and_not_dense_weights[multiply]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[a cache of few]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[a closure]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[a list in a dict]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[a module imported late]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[an object]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[an attribute of a class]",
    "test_a_plan_leaves_no_fake_table_to_the_run_that_follows[a list of numbers]",
    "test_a_run_that_broke_off_in_any_phase_resumes_bit_for_bit[full-quantizer6-4]",
    "test_a_run_that_broke_off_in_any_phase_resumes_bit_for_bit[full-quantizer16-4]",
    "test_a_run_that_broke_off_in_any_phase_resumes_bit_for_bit[full-bitnet-7]",
    "test_a_run_that_broke_off_in_any_phase_resumes_bit_for_bit[full-bitnet-1]",
    "test_packing_and_ranks_change_no_loss[distill]",
    "test_packing_and_ranks_change_no_loss[dpo]",
    "test_packing_and_ranks_change_no_loss[infonce]",
    "test_packing_and_ranks_change_no_loss[orpo]",
    "test_packing_and_ranks_change_no_loss[outside.prefix]",
    "test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill[distill-True]",
    "test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill[infonce-True]",
    "test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill[orpo-True]",
    "test_two_ranks_train_it_alike_and_are_resumed_to_the_bit[full-fsdp]",
    "test_it_trains_is_killed_and_resumed_to_the_bit[lora-True]",
    "test_it_passes_the_kit[outside.prefix]",
    "test_prompts_count_in_packing_memory_and_token_figures[outside.prefix]",
    "test_two_ranks_resume_bit_for_bit_after_a_kill[outside.prefix]",
    "test_two_ranks_have_the_reference_of_one[trained lora-fsdp]",
    "test_a_teacher_may_carry_an_adapter_or_be_a_run",
    "test_rows_that_are_given_as_objects_are_written_with_their_hash_before_the_job",
    "test_ctrl_c_detaches_and_says_how_to_come_back",
    "test_another_manager_adopts_a_run_and_cancel_ends_it_within_a_step",
    "test_a_run_with_a_cached_reference_goes_on_with_it[full]",
    "test_a_cached_reference_gives_the_values_of_a_live_one[lora]",
    "test_a_cache_of_another_template_or_of_other_weights_is_refused[weights]",
    "test_a_model_comes_closer_to_its_teacher[hidden]",
    "test_a_cut_run_goes_on_to_the_bit",
    "test_two_machines_meet_by_the_usual_flags[False]",
    "test_a_recipe_takes_its_first_steps[distill]",
    "test_a_trained_model_is_planned_with_and_trained_on",
    "test_two_ranks_have_the_reference_of_one[full-fsdp]",
    "test_a_signal_to_one_rank_saves_and_stops_all_and_they_go_on_bit_for_bit[fsdp]",
    "test_time_zone_and_locale_change_nothing",
    "test_ten_steps_over_two_ranks_are_those_of_one[lora-fsdp]",
    "test_a_checkpoint_goes_on_with_another_number_of_ranks[2-1-full-fsdp]",
    "test_with_one_example_in_each_micro_batch_there_are_three_more_tries",
    "test_a_job_is_cancelled",
    "test_a_worker_that_a_dead_manager_started_is_found",
    "test_a_killed_process_begins_again_with_the_others_and_ends_at_the_same_weights",
    "test_a_sequence_takes_its_first_steps[continual]",
    "test_it_keeps_the_laws_of_losses[orpo]",
    "test_it_keeps_the_laws_of_losses[dpo]",
    "test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill[dpo-True]",
    "test_a_recipe_takes_its_first_steps[orpo]",
    "test_a_recipe_takes_its_first_steps[qdora]",
    "test_a_recipe_takes_its_first_steps[smoothing]",
    "test_a_recipe_takes_its_first_steps[reward]",
    "test_a_recipe_takes_its_first_steps[cl_tasks]",
    "test_a_recipe_takes_its_first_steps[sharegpt]",
    "test_two_ranks_resume_bit_for_bit_after_a_kill[orpo]",
    "test_packing_and_ranks_change_no_loss[outside.prompt]",
    "test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill[outside.prefix-True]",
    "test_a_broken_row_is_named_when_it_is_reached[2]",
    "test_an_untouched_part_of_each_kind_trains_is_resumed_and_generated_from",
    "test_the_table_is_written_anew_from_its_configs",
    "test_a_teacher_may_be_quantized",
    "test_two_ranks_share_a_cache[fsdp]",
    "test_a_cache_of_another_template_or_of_other_weights_is_refused[template]",
    "test_two_ranks_have_the_reference_of_one[trained lora-ddp]",
    "test_it_keeps_the_laws_of_losses[distill]",
    "test_it_keeps_the_laws_of_losses[infonce]",
    "test_conforms[benchmark-lm_eval-refuses_a_task_that_it_does_not_have]",
    "test_conforms[callback-trackio-tolerates_every_event_order_the_loop_can_produce]",
    "test_conforms[callback-wandb-tolerates_every_event_order_the_loop_can_produce]",
    "test_conforms[adapter-dora-trains_alike_on_two_sharded_ranks]",
    "test_adalora_conforms[adapter-adalora-trains_alike_on_two_sharded_ranks]",
    "test_a_model_comes_closer_to_its_teacher[jsd]",
    "test_a_model_comes_closer_to_its_teacher[reverse]",
    "test_two_sharded_ranks_train_and_evaluate_pairs_as_one_does[pairs]",
    "test_scores_and_fixed_tensors_are_gathered_over_ranks_also_from_idle_ones[2-fsdp]",
    "test_every_rank_knows_the_results_of_all_in_their_order[3-fsdp]",
    "test_how_the_global_batch_is_cut_does_not_change_the_trajectory[float32-1e-05-dora]",
    "test_ten_steps_over_two_ranks_are_those_of_one[full-ddp]",
    "test_two_ranks_train_as_one_does[core-fsdp]",
    "test_two_ranks_give_the_losses_of_one_and_a_folder_that_opens[whole modules and biases-fsdp]",
    "test_a_run_that_was_cut_off_goes_on_with_the_same_reference[full]",
    "test_the_quantizer_conforms[quantizer-bnb.nf4-every_option_is_read]",
    "test_a_cut_run_goes_on_to_the_bit[orpo]",
    "test_a_cut_run_goes_on_to_the_bit[simpo]",
    "test_a_cut_run_goes_on_to_the_bit[cpo]",
    "test_a_cut_run_goes_on_to_the_bit[aot]",
    "test_conforms[adapter-p_tuning_v2-trains_alike_on_two_sharded_ranks]",
    "test_conforms[adapter-prompt_tuning-trains_alike_on_two_sharded_ranks]",
    "test_conforms[adapter-slao-trains_alike_on_two_sharded_ranks]",
    "test_trains_alike_on_two_sharded_ranks[oft]",
    "test_how_the_global_batch_is_cut_does_not_change_the_trajectory[float64-1e-10-dora]",
    "test_how_the_global_batch_is_cut_does_not_change_the_trajectory[float32-1e-05-lora]",
    "test_a_run_that_was_cut_off_goes_on_with_the_same_reference[lora]",
    "test_two_ranks_have_the_reference_of_one[full-ddp]",
    "test_the_variants_of_the_paper_give_other_weights[begin_from]",
    "test_a_method_trains_resumes_reopens_and_merges[adalora]",
    "test_a_method_trains_resumes_reopens_and_merges[vera]",
)
LONG = ("test_types.py", "test_generated.py")  # begun first, so that no worker is alone with one at the end


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in SLOW_FORMS:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONG)
