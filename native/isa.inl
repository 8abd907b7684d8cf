// The table of one instruction set. Included last inside its namespace.
extern const Kernels kernels = {
    APRIUM_ISA_NAME, packed_bytes, pack,          matmul_scratch, matmul,       skipped_columns, widen,
    rms_norm,        relu_squared, add,           weighted_sum,   sigmoid,      mamba_scratch,   mamba,
    attention_scratch, attention,  log_softmax_at, encode_nvfp4,  read,         peak,
};
