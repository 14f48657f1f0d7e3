"""Which parameters of long tests CI runs: one of each scope, library or kind. The others are slow: `make test-slow`."""

#: by the name of the test, the parameters that are kept
KEPT: dict[str, tuple[str, ...]] = {
    "test_a_batch_that_cannot_be_halved_is_named": ("odd-at once",),
    "test_a_bfloat16_model_converts": ("timm-swin-local",),
    "test_a_bound_that_is_fitted_when_no_step_is_left_never_joins": ("{'epochs': 1}-False",),
    "test_a_compiled_model_refuses_it_too": ("mask-bool",),
    "test_a_copy_of_a_block_alone_has_a_mask_of_its_own": ("timm-block-flow-deepcopy", "torch-layer-local-pickle"),
    "test_a_failed_conversion_leaves_no_trace": tuple(
        (
            "timm-deit-proof-train timm-deit-identity-train timm-deit-build-train timm-deit-interrupt-train "
            "timm-deit-budget-train timm-deit-counts-train timm-deit-site-train timm-deit-example-train "
            "hf-dinov2-proof-eval hf-dinov2-identity-eval hf-dinov2-build-eval hf-dinov2-interrupt-eval "
            "hf-dinov2-budget-eval hf-dinov2-counts-eval hf-dinov2-site-eval hf-dinov2-example-eval"
        ).split()
    ),
    "test_a_failure_midway_leaves_the_old_folder": ("finetune",),
    "test_a_file_that_is_no_checkpoint_is_named": ("not ours",),
    "test_a_head_replaced_by_hand_counts_whatever_the_model_says": ("9-timm-vit", "5-hf-vit"),
    "test_a_model_of_plain_torch_converts": tuple(
        (
            "plain-single-head plain-multihead plain-encoder-postnorm plain-functional torchvision-vit plain-lucid"
        ).split()
    ),
    "test_a_model_on_the_meta_device_gets_the_plan_of_one_with_values": ("vit",),
    "test_a_new_classifier_with_a_norm_of_its_own_travels_whole": ("masks",),
    "test_a_new_head_always_trains": ("timm-vit-masks", "hf-vit-lora"),
    "test_a_pass_over_several_epochs_is_resumed": ("table-4", "stream-2"),
    "test_a_process_that_runs_alone_by_mistake_says_so": ("accelerate-cpu",),
    "test_a_row_of_a_stream_without_a_label_is_named": ("ant",),
    "test_a_saved_block_alone_gives_equal_results": ("timm-block-flow-whole", "torch-layer-local-adapter"),
    "test_a_scope_can_be_forced": ("timm-vit-FLOW", "hf-vit-LOCAL"),
    "test_a_scope_that_is_not_proven_is_refused_by_name": ("hf-vit-GRID",),
    "test_an_adapter_brings_its_model_back": ("hf-vit-masks", "timm-vit-masks+norms"),
    "test_an_auto_class_gives_the_hosts_class_converted": tuple(
        ("backbone-AutoBackbone tower-AutoModel classifier-AutoModelForImageClassification").split()
    ),
    "test_an_epoch_of_a_table_may_be_cut_or_repeated": ("2",),
    "test_another_bound_is_another_loss": ("{'gamma': 0.0}",),
    "test_another_classifier_is_saved": ("hf-vit-flow-0-rebuilt", "timm-vit-flow-11-base"),
    "test_another_input_size_is_saved": ("timm-vit-flow",),
    "test_another_input_size_runs": tuple(
        (
            "vit-flow-twice-3 vit-flow-odd-1 vit-avg-flow-wide-1 vit-local-tall-3 vit-full-smaller-1 vit-tome-wide-3 "
            "vit-local-pool-odd-1 dinov3-flow-tall-1 swin-local-odd-3 efficientvit-grid-uneven-1 "
            "efficientvit-grid-wide-3 vit-padded-thin-1 hf-swin-local-smaller-1 hf-segformer-local-uneven-3"
        ).split()
    ),
    "test_another_input_size_saves_its_share": tuple(
        ("vit-padded-uneven hf-segformer-local-uneven efficientvit-grid-uneven vit-flow-twice").split()
    ),
    "test_another_plan_is_another_run": ("None",),
    "test_another_runs_checkpoint_is_refused": ("weights",),
    "test_anyones_loader_is_drawn_from_up_to_the_place": ("own-generator-within-an-epoch", "global-between-epochs"),
    "test_averages_of_batch_norms_stay_where_only_additions_train": ("lora",),
    "test_baselines_run_in_every_scope_or_are_refused_by_name": ("timm-vit-local-tome", "timm-efficientvit-grid-pool"),
    "test_blocks_are_not_pruned_from_under_a_plan": ("timm-flow", "transformers-flow", "user-local"),
    "test_compiling_gives_equal_results": ("timm-vit-flow", "timm-efficientvit-grid"),
    "test_converted_model": ("timm-vit",),
    "test_converted_model_learns_by_every_method": ("ltm", "tome"),
    "test_counted_macs_are_the_predicted_ones": tuple(
        ("timm-vit-fused timm-vit-manual timm-dinov2-fused hf-vit-fused hf-dinov2-manual hf-clip-fused").split()
    ),
    "test_damaged_images_are_counted_and_replaced_by_the_next": ("2",),
    "test_damaged_images_of_a_stream_are_left_out_and_counted": ("2",),
    "test_equal_tokens_of_a_cell_survive": ("timm-vit-ltm", "hf-swin-tome"),
    "test_exporting_gives_equal_results_and_leaves_the_model_alone": ("timm-vit-flow", "timm-efficientvit-grid"),
    "test_each_family_exports_and_is_left_alone": ("hf-vit-dynamic-batch", "timm-vit-dynamic-batch"),
    "test_exporting_with_a_dynamic_batch": ("timm-vit-flow",),
    "test_features_only_keeps_the_pyramid_or_is_refused_by_name": ("vit", "swin"),
    "test_images_come_in_the_dtype_of_the_model": ("hf-vit-converted",),
    "test_images_without_labels_teach_what_the_teacher_says": ("table",),
    "test_labels_are_taken_by_the_names_of_their_classes": ("no",),
    "test_labels_of_a_loader_are_checked_where_it_is_evaluated": ("too-high",),
    "test_labels_that_do_not_fit_are_refused": ("beyond", "width"),
    "test_maps_of_a_backbone_have_the_original_shapes_or_are_refused_by_name": tuple(
        (
            "timm-flow-forward_intermediates transformers-flow-get_intermediate_layers "
            "user-local-forward_intermediates user-grid-get_intermediate_layers"
        ).split()
    ),
    "test_naflex_takes_its_one_dict_and_its_padding": ("timm-naflex-gap",),
    "test_nan_later_falls_back_to_good_weights_of_the_same_run": ("converted",),
    "test_other_hosts_convert_count_and_come_back": ("hf-vit-FLOW", "hf-dinov2-LOCAL"),
    "test_plan_and_statistics_follow_another_head": ("timm-vit-flow", "timm-efficientvit-grid"),
    "test_predicted_macs_are_those_counted": ("timm-vit-ltm-0.8-auto", "hf-deit-teacher-tome-0.5-auto"),
    "test_recomputed_activations_give_the_same_training": ("hf-vit",),
    "test_rows_follow_their_tokens": ("timm-eva-rope-mixed", "hf-dinov3"),
    "test_settings_in_a_folder_of_before_are_followed": ("True",),
    "test_statistics_are_fitted_anew_once_the_memory_is_full": ("64",),
    "test_the_bound_takes_part": ("PyTorch", "transformers.Trainer"),
    "test_the_image_processor_travels_with_the_folder": ("dinov2-256-224", "vit-0-to-255"),
    "test_timms_optimizers_train": ("adamw",),
    "test_tokens_stay_merged_only_where_their_sizes_arrive_in_training_too": ("dropout", "needs-targets"),
    "test_trainer_saves_resumes_and_ends_with_the_best": ("float32",),
    "test_what_was_known_before_memory_ended_is_still_known": ("restarted",),
    "test_whatever_trains_by_whatever_optimizer": ("masks",),
    "test_where_images_are_folded_into_the_batch_the_module_around_is_read": ("timm-swin-local",),
}
