"""The mutants: each broken part with the check that must catch it and a piece of what that check says."""

from __future__ import annotations

from typing import Any

import attrs
from luthier.plugins.options import option

from mutants.heavy import HeavyOptions
from mutants.records import (
    ADAPTER,
    BENCHMARK,
    CALLBACK,
    CENTRED,
    COUPLED,
    ENGINE,
    EXACT,
    EXPORTER,
    FROZEN_HEAD,
    JUDGED,
    LOSS,
    OPERATION,
    OPTIMIZER,
    PENALTY,
    PREFERENCE,
    PROBING,
    QUANTIZER,
    SURPRISE,
    TERNARY,
    TOKEN_PENALTY,
    TRAINER,
    Mutant,
    broken,
)


@attrs.define(kw_only=True)
class OpenOptions:
    """Not frozen."""

    momentum: float = option(0.9, help="Share of the last step that is kept.", low=0.0, high=0.99)


@attrs.frozen(kw_only=True)
class SilentOptions:
    momentum: float = attrs.field(default=0.9)


@attrs.frozen
class PositionalOptions:
    momentum: float = option(0.9, help="Share of the last step that is kept.", low=0.0, high=0.99)


@attrs.frozen(kw_only=True)
class PairOptions:
    pair: Any = option((0.9, 0.99), help="Becomes a list in a recipe.")


@attrs.frozen(kw_only=True)
class UnreadOptions:
    momentum: float = option(0.9, help="Share of the last step that is kept.", low=0.0, high=0.99)
    weight_decay: float = option(0.0, help="L2 decay.", low=0.0)
    dampening: float = option(0.0, help="Read by nothing.", low=0.0, high=1.0)


def _of_every_part() -> list[Mutant]:
    from luthier.builtin import Sgd

    long = "A summary that goes on and on, " * 6
    o = OPTIMIZER
    return [
        broken(o, "Momentum", "name_is_unique", "also claimed by builtin", name="sgd"),
        broken(o, "Momentum", "options_class_is_its_own", "optimizer 'sgd'", options=Sgd),
        broken(o, "Momentum", "summary_is_one_line", "at most 120", summary=long.strip()),
        broken(o, "Momentum", "summary_is_one_line", "only repeats the name", summary="Mutant-momentum."),
        broken(o, "Momentum", "options_are_frozen_and_described", "can be changed", options=OpenOptions),
        broken(o, "Momentum", "options_are_frozen_and_described", "luthier.option", options=SilentOptions),
        broken(o, "Momentum", "options_are_frozen_and_described", "by position", options=PositionalOptions),
        broken(o, "Momentum", "options_survive_a_round_trip", "came back as", options=PairOptions),
        broken(o, "Momentum", "import_needs_no_torch", "imports torch", options=HeavyOptions),
        broken(o, "TakesNoGroups", "build_keeps_the_protocol", "positional arguments"),
        broken(LOSS, "NoTerms", "build_keeps_the_protocol", "no terms"),
        broken(LOSS, "OtherData", "build_keeps_the_protocol", "'preference'"),
        broken(LOSS, "CouplesWithoutScores", "build_keeps_the_protocol", "scores and combine"),
        broken(CALLBACK, "Unmarked", "build_keeps_the_protocol", "not marked"),
        broken(CALLBACK, "UnknownArgument", "build_keeps_the_protocol", "loss"),
        broken(o, "Momentum", "every_option_is_read", "nothing reads dampening", options=UnreadOptions),
        broken(o, "ReadsOneOption", "every_option_is_read", "nothing reads momentum"),
        broken(ADAPTER, "ReadsNoDropout", "every_option_is_read", "nothing reads dropout"),
    ]


LOSSES = [
    broken(LOSS, "MeanOfTokens", "gives_sums_not_means", "twice the sums"),
    broken(LOSS, "MeanOfTokens", "adds_up_over_micro_batches", "sums of two micro-batches"),
    broken(LOSS, "CountsMicroBatches", "adds_up_over_micro_batches", "denominators of two micro-batches"),
    broken(LOSS, "MeanMetric", "adds_up_over_micro_batches", "metrics"),
    broken(LOSS, "MissingTerm", "terms_name_every_sum", "denominators"),
    broken(LOSS, "CountsPrompt", "ignores_unlabelled_tokens", "no labels"),
    broken(LOSS, "CountsAllTokens", "ignores_unlabelled_tokens", "denominators"),
    broken(COUPLED, "MeanOfScores", "ignores_unlabelled_tokens", "no labels"),
    broken(LOSS, "ForgetsWeights", "counts_an_example_by_its_weight", "weight 2"),
    broken(LOSS, "LogOfSoftmax", "gradient_is_finite", "inf|not finite"),
    broken(LOSS, "Standardised", "does_not_leak_between_packed_examples", "other documents"),
    broken(LOSS, "WeighsByPlace", "invariant_to_order_of_documents", "in reverse"),
    broken(LOSS, "WrongSign", "coefficients_agree_with_the_gradient", "coefficients"),
    broken(LOSS, "Scaled", "matches_its_reference", "reference"),
    broken(LOSS, "MeanOfTokens", "agrees_on_a_model", "on a model"),
    broken(PREFERENCE, "MeanOfPairs", "gives_sums_not_means", "twice the sums"),
    broken(PREFERENCE, "MeanOfPairs", "adds_up_over_micro_batches", "sums of two micro-batches"),
    broken(PREFERENCE, "MeanOfPairs", "takes_idle_batches", "not finite"),
    broken(PREFERENCE, "OtherTerm", "terms_name_every_sum", "denominators"),
    broken(PREFERENCE, "PrefersRejected", "prefers_what_the_row_prefers", "must fall"),
    broken(LOSS, "ReadsTheWholeTeacher", "reads_of_the_teacher_what_it_says", "teacher_reads", needs={"teacher"}),
    broken(PREFERENCE, "AsksForATeacher", "declares_reference_and_teacher", "teacher"),
    broken(PREFERENCE, "NamedAsTheRun", "metrics_have_names_of_their_own", "the run's own"),
    broken(PREFERENCE, "ForgetsThePolicy", "takes_idle_batches", "depends on the policy"),
    broken(PREFERENCE, "WholeBatch", "does_not_leak_between_packed_examples", "other documents"),
    broken(PREFERENCE, "Coupled", "terms_name_every_sum", "something else"),
    broken(PREFERENCE, "ArrangesByChance", "arrange_is_a_pure_function", "differently the second time"),
    broken(PREFERENCE, "DropsAUnit", "arrange_is_a_pure_function", "the same units in the same order"),
    broken(JUDGED, "ReadsLabelsBackwards", "prefers_what_the_row_prefers", "must fall"),
    broken(CENTRED, "ForgetsItsState", "state_survives_a_checkpoint", "after a resume"),
]

ADAPTERS = [
    broken(ADAPTER, "StartsElsewhere", "starts_as_identity", "bit for bit"),
    broken(ADAPTER, "DrawsByChance", "attach_follows_the_seed", "two attaches"),
    broken(ADAPTER, "StaysOnTheProcessor", "attaches_where_the_weights_are", "not on context.device"),
    broken(ADAPTER, "MeasuresItsShard", "trains_alike_on_two_sharded_ranks", "those of one rank"),
    broken(ADAPTER, "OffInGeneration", "training_changes_a_plain_forward", "plain forward"),
    broken(ADAPTER, "ForgetsThePrompt", "generates_as_it_trains", "as generation calls"),
    broken(ADAPTER, "WritesNothing", "saved_files_move_to_a_fresh_model", "after loading", tolerance=10.0),
    broken(ADAPTER, "ChangesClass", "keeps_class_and_module_paths", "became Wrapped"),
    broken(ADAPTER, "GroupsTwice", "groups_cover_every_trainable_parameter_once", "two groups"),
    broken(ADAPTER, "ForgetsAGroup", "groups_cover_every_trainable_parameter_once", "in no group"),
    broken(ADAPTER, "LeavesTrainable", "trains_only_its_own_weights", "got a gradient"),
    broken(ADAPTER, "ErodesBase", "trains_only_its_own_weights", "changed, but in no group"),
    broken(ADAPTER, "CutsGradient", "every_parameter_gets_a_gradient", "down gets no gradient"),
    broken(ADAPTER, "SavesHalf", "state_moves_to_a_fresh_model", "fresh model"),
    broken(ADAPTER, "CountsAlone", "resumes_exactly", "resumed run"),
    broken(ADAPTER, "Pickles", "saved_files_move_to_a_fresh_model", "adapter.bin"),
    broken(ADAPTER, "WritesHalf", "saved_files_move_to_a_fresh_model", "after loading"),
    broken(ADAPTER, "MergesUnscaled", "merge_keeps_outputs", "after merging"),
    broken(ADAPTER, "KeepsWrappers", "merge_leaves_plain_modules", "q_proj"),
    broken(ADAPTER, "StaysOn", "disabled_gives_the_base", "within disabled"),
    broken(ADAPTER, "StaysOff", "disabled_gives_the_base", "after disabled"),
    broken(ADAPTER, "LooksAround", "keeps_documents_apart", "packed documents"),
    broken(ADAPTER, "NeedsAWeight", "works_on_a_quantized_base", "weight"),
    broken(ADAPTER, "WritesCodes", "works_on_a_quantized_base", "changed the quantized base"),
    broken(ADAPTER, "MergesAlone", "merges_on_a_quantized_base", "int8 codes"),
]

OPTIMIZERS = [
    broken(OPTIMIZER, "HiddenPart", "resumes_exactly", "resumed run"),
    broken(OPTIMIZER, "ObjectPart", "resumes_exactly", "neither tensor nor JSON"),
    broken(OPTIMIZER, "DecayPart", "leaves_parameters_without_gradient", "without gradient"),
    broken(OPTIMIZER, "AscentPart", "lowers_a_quadratic", "quadratic"),
    broken(OPTIMIZER, "ShakenPart", "is_deterministic", "second run"),
    broken(OPTIMIZER, "WidePart", "keeps_dtype_and_device", "became"),
    broken(OPTIMIZER, "DropsEmbeddings", "keeps_dtype_and_device", "exactly one group"),
    broken(OPTIMIZER, "LosesScale", "respects_lr_scale_and_group_decay", "lr_scale"),
    broken(OPTIMIZER, "RatePart", "respects_lr_scale_and_group_decay", "lr_scale 0"),
    broken(OPTIMIZER, "PlainPart", "respects_lr_scale_and_group_decay", "no difference"),
    broken(OPTIMIZER, "DecaysNorms", "respects_lr_scale_and_group_decay", "norm"),
    broken(OPTIMIZER, "RatelessPart", "learning_rate_zero_changes_nothing", "learning rate of 0"),
    broken(OPTIMIZER, "KeepsAverage", "evaluating_restores_the_weights", "after evaluating"),
    broken(OPTIMIZER, "Probing", "estimates_gradients_from_the_objective", "does not need 'closure'"),
    broken(PROBING, "ProbesDownhill", "estimates_gradients_from_the_objective", "downhill"),
    broken(PROBING, "ProbesAndStays", "estimates_gradients_from_the_objective", "weights after an estimate"),
]

QUANTIZERS = [
    broken(QUANTIZER, "TooCoarse", "keeps_weights_near", "tolerance"),
    broken(QUANTIZER, "TakesNothing", "keeps_weights_near", "0 layers"),
    broken(QUANTIZER, "OtherForward", "keeps_outputs_near", "outputs of"),
    broken(QUANTIZER, "KeepsGradients", "freezes_base_weights", "asks for a gradient"),
    broken(QUANTIZER, "DoublesGradients", "passes_gradients_to_its_inputs", "gradient through"),
    broken(QUANTIZER, "CodesAgain", "is_idempotent", "second apply"),
    broken(QUANTIZER, "IgnoresWeight", "requantize_takes_back_what_dequantize_gave", "another weight"),
    broken(QUANTIZER, "HidesScales", "state_dict_round_trips", "round trip"),
    broken(QUANTIZER, "StoresFloats", "is_smaller", "bytes"),
    broken(QUANTIZER, "Nameless", "keeps_in_and_out_features", "out_features"),
    broken(QUANTIZER, "HalfPrecision", "keeps_in_and_out_features", "bfloat16"),
    broken(QUANTIZER, "TakesTheHead", "leaves_head_and_embeddings", "lm_head"),
    broken(QUANTIZER, "SaysNothing", "multipliers_are_finite", "luthier.Multipliers"),
    broken(QUANTIZER, "RemembersANumber", "applies_without_values", "other outputs"),
    broken(QUANTIZER, "WantsWeights", "applies_without_values", "other tensors"),
    broken(QUANTIZER, "DrawsForItself", "apply_follows_the_seed", "outputs differ"),
    broken(TERNARY, "CountsCalls", "follows_progress_alone", "other outputs"),
    broken(TERNARY, "NeverGoesBack", "follows_progress_alone", "told again that 5"),
    broken(TERNARY, "CountsCalls", "resumes_exactly", "undisturbed"),
    broken(TERNARY, "ForgetsItsRate", "resumes_exactly", "undisturbed"),
    broken(TERNARY, "CutsGradients", "trains_its_weights", "no gradient reaches"),
    broken(QUANTIZER, "Rows", "trains_its_weights", "no gradient reaches", provides={"dense-weights"}),
    broken(TERNARY, "LoadsNothing", "saves_what_it_trained", "off after"),
    broken(TERNARY, "PicklesItself", "saves_what_it_trained", "model.pt"),
    broken(TERNARY, "KeepsWhatIsWorse", "takes_back_what_is_worse", "made worse"),
    broken(TERNARY, "LeavesATrial", "takes_back_what_is_worse", "cut off"),
    broken(TERNARY, "TriesNothing", "takes_back_what_is_worse", "no trial changed"),
]

CALLBACKS = [
    broken(CALLBACK, "NeedsAStart", "tolerates_every_event_order_the_loop_can_produce", "seen"),
    broken(CALLBACK, "NeedsANumber", "tolerates_every_event_order_the_loop_can_produce", "eval_bleu"),
    broken(CALLBACK, "EmptiesMetrics", "changes_nothing_it_is_shown", "logged changed"),
    broken(CALLBACK, "ChangesSettings", "changes_nothing_it_is_shown", "step_started changed"),
    broken(CALLBACK, "ChangesAParameter", "changes_no_parameter", "weights that differ"),
    broken(CALLBACK, "SharesItsCount", "two_runs_do_not_share_state", "counts"),
    broken(CALLBACK, "SharesItsState", "two_runs_do_not_share_state", "total"),
    broken(CALLBACK, "KeepsAPath", "state_is_tensors_and_json", "neither tensor nor JSON"),
    broken(CALLBACK, "ForgetsHalf", "state_is_tensors_and_json", "came back"),
    broken(CALLBACK, "StateWithoutWayBack", "state_is_tensors_and_json", "come together"),
]

OPERATIONS = [
    broken(OPERATION, "build_wrong_values", "gives_the_values_and_gradients_of_the_reference", "result 0 differs"),
    broken(OPERATION, "build_wrong_gradient", "gives_the_values_and_gradients_of_the_reference", "gradient of gate"),
    broken(OPERATION, "build_raising", "gives_the_values_and_gradients_of_the_reference", "IndexError"),
    broken(OPERATION, "build_swiglu", "gives_the_values_and_gradients_of_the_reference", "declines every call",
           predicate="mutants.operations:fits_nothing"),
    broken(FROZEN_HEAD, "build_wrong_head", "gives_the_values_and_gradients_of_the_reference", "result 0 differs"),
    broken(OPERATION, "build_shy", "gives_the_values_and_gradients_of_the_reference", "that it was to be compared by"),
    broken(OPERATION, "build_writing", "leaves_its_arguments_alone", "writes into"),
    broken(OPERATION, "build_wandering", "gives_the_same_numbers_twice", "two calls differ"),
    broken(OPERATION, "build_swiglu", "predicate_reads_device_dtype_and_shape_alone", "None",
           predicate="mutants.operations:fits_somehow"),
]  # fmt: skip

EXPORTERS = [
    broken(EXPORTER, "WritesNothing", "reads_back_what_it_writes", "nothing was written"),
    broken(EXPORTER, "ComparesNothing", "refuses_a_folder_of_another_model", "every weight of the model is different"),
    broken(EXPORTER, "ReadsNothing", "refuses_files_that_are_gone", "empty folder"),
    broken(EXPORTER, "RoundsTheModel", "leaves_the_model_alone", "weights have changed"),
    broken(EXPORTER, "TiesTheModel", "leaves_the_model_alone", "config has changed"),
]

METRICS = [
    broken(EXACT, "CountsNothing", "gives_a_sum_and_a_count", "nothing is ever counted"),
    broken(EXACT, "GivesNaN", "gives_a_sum_and_a_count", "not finite"),
    broken(EXACT, "Remembers", "keeps_nothing_between_calls", "depend on what was scored before"),
    broken(EXACT, "UnevenStatistics", "gives_a_sum_and_a_count", "not equally many"),
    broken(EXACT, "ConcludesNothing", "gives_a_sum_and_a_count", "no number from"),
    broken(SURPRISE, "MeanOfTokens", "adds_up_over_tokens", "one after the other"),
]

PENALTIES = [
    broken(PENALTY, "GivesRows", "gives_a_finite_scalar", "not a tensor of shape"),
    broken(PENALTY, "LogOfNorm", "gives_a_finite_scalar", "-inf"),
    broken(PENALTY, "RootOfSquares", "gives_finite_gradients", "not finite for weights of scale 0"),
    broken(PENALTY, "Detached", "gives_finite_gradients", "no path to the weights"),
    broken(PENALTY, "Climbs", "falls_along_its_gradient", "becomes"),
    broken(PENALTY, "MeanOfWeights", "adds_up_over_groups", "one after the other"),
    broken(TOKEN_PENALTY, "GivesASum", "gives_each_token_a_cost", "costs of shape"),
    broken(TOKEN_PENALTY, "CutsTheGradient", "gives_each_token_a_cost", "no path to the policy"),
    broken(TOKEN_PENALTY, "GivesAMean", "token_costs_add_up", "two micro-batches"),
    broken(TOKEN_PENALTY, "CentresOnTheBatch", "token_costs_do_not_leak", "before and after"),
    broken(TOKEN_PENALTY, "CountsPlaces", "token_costs_ignore_order", "in reverse"),
    broken(TOKEN_PENALTY, "LogOfCertainty", "token_gradients_are_finite", "impossible"),
    broken(TOKEN_PENALTY, "ForgetsIdleRanks", "token_costs_of_idle_batches", "depends on the policy"),
    broken(TOKEN_PENALTY, "AsksAReference", "declares_the_policies_it_asks", "does not need one"),
    broken(PENALTY, "KeepsItsFirst", "begins_again", "after a second begin"),
    broken(PENALTY, "StaysLow", "counts_in_float32", "bfloat16"),
    broken(PENALTY, "RoundsSquares", "counts_in_float32", "of the same in float32"),
    broken(PENALTY, "Shrinks", "leaves_the_weights_alone", "changes a weight"),
    broken(PENALTY, "Counts", "leaves_the_weights_alone", "the second"),
    broken(PENALTY, "NeedsAGroup", "takes_no_groups", "non-empty"),
]

TRAINERS = [
    broken(TRAINER, "Likelihood", "lists_settings_that_a_recipe_has", "max_step$", settings=("max_step",)),
    broken(TRAINER, "AddsACallback", "leaves_the_recipe_alone", "recipe is another"),
    broken(TRAINER, "ShortensRows", "leaves_the_recipe_alone", "rows are others"),
    broken(TRAINER, "WritesAFile", "leaves_the_recipe_alone", "notes.txt"),
    broken(TRAINER, "ForgetsGradients", "tells_each_step_in_order", "start 1, optimizer"),
    broken(TRAINER, "StepsTwice", "tells_each_step_in_order", "optimizer, optimizer"),
    broken(TRAINER, "CountsFromNought", "tells_each_step_in_order", "start 0"),
    broken(TRAINER, "HasItsOwnLength", "tells_each_step_in_order", "1 steps where max_steps is 2"),
    broken(TRAINER, "LosesGradients", "trains_the_weights", "no weight has changed"),
    broken(TRAINER, "EndsAtNaN", "trains_the_weights", "not finite"),
    broken(TRAINER, "NeverEnds", "ends_where_it_is_asked", "began step 2"),
    broken(TRAINER, "DrawsByChance", "is_the_same_with_the_same_seed", "then of"),
    broken(TRAINER, "BeginsAgain", "resumes_exactly", "in one go"),
]

BENCHMARKS = [
    broken(BENCHMARK, "GivesNothing", "gives_numbers_of_its_sample", "no number"),
    broken(BENCHMARK, "GivesNaN", "gives_numbers_of_its_sample", "is nan"),
    broken(BENCHMARK, "NamesTwice", "gives_numbers_of_its_sample", "one name"),
    broken(BENCHMARK, "CountsNone", "gives_numbers_of_its_sample", "0 examples"),
    broken(BENCHMARK, "TakesAnyTask", "refuses_a_task_that_it_does_not_have", "check passes"),
    broken(BENCHMARK, "CountsRuns", "gives_the_same_again", "then"),
    broken(BENCHMARK, "KnowsTheAnswer", "measures_the_model_that_it_is_given", "same numbers"),
    broken(BENCHMARK, "Forgets", "leaves_the_model_alone", "another afterwards"),
    broken(BENCHMARK, "Trains", "leaves_the_model_alone", "another mode"),
]

ENGINES = [
    broken(ENGINE, "SaysNothing", "says_what_answers", "empty"),
    broken(ENGINE, "SaysTooMuch", "says_what_answers", "one line"),
    broken(ENGINE, "MixesUp", "answers_in_the_order_of_the_questions", "another order"),
    broken(ENGINE, "Remembers", "answers_in_the_order_of_the_questions", "another order"),
    broken(ENGINE, "LosesOne", "answers_in_the_order_of_the_questions", "4 answers"),
    broken(ENGINE, "GivesBytes", "answers_in_the_order_of_the_questions", "not texts"),
    broken(ENGINE, "IsSilent", "tells_its_progress", "0 of 5"),
    broken(ENGINE, "TellsTwice", "tells_its_progress", "10 of 5"),
    broken(ENGINE, "SaysTheSame", "reads_the_prompts", "answered by"),
    broken(ENGINE, "NeverStops", "keeps_to_the_length", "characters"),
]

MUTANTS = [
    *_of_every_part(),
    *LOSSES,
    *ADAPTERS,
    *OPTIMIZERS,
    *QUANTIZERS,
    *CALLBACKS,
    *OPERATIONS,
    *EXPORTERS,
    *METRICS,
    *PENALTIES,
    *TRAINERS,
    *BENCHMARKS,
    *ENGINES,
]
