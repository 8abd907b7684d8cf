// The tables of one instruction set. Included last inside its namespace.
#ifdef APRIUM_TRAINING
extern const TrainingKernels training_kernels = {
    flash_scratch, flash, flash_back_scratch, flash_back,
    conv, conv_back, norm, norm_back, sum_heads, ssd_forward_scratch, ssd_backward_scratch,
    ssd_walk, ssd_forward, ssd_walk_back, ssd_backward,
};
#else
extern const Kernels kernels = {
    APRIUM_ISA_NAME, packed_bytes, pack,          matmul_scratch, matmul,       skipped_columns, widen,
    rms_norm,        relu_squared, add,           weighted_sum,   sigmoid,      mamba_scratch,   mamba,
    attention_scratch, attention,  log_softmax_at, encode_nvfp4,  read,         peak,
    &training_kernels,
};
#endif
