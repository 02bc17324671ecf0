"""How much of the logits is alive at once in `model.losses`; here, so that a forecast of the memory
needs no torch.
"""

# Rows of logits: on a CPU 4 MB in bf16 at vocabulary 4096, near the caches; a GPU wants large
# products, and 8,192 rows of a vocabulary of 50,304 are 0.8 GB.
CHUNK_ROWS, CHUNK_ROWS_GPU = 512, 8192
# Rows of them whose softmax is taken at once, in float32: 2 MB there on a CPU. Both are multiples
# of `model.losses.ROW_GRAIN`.
SLICE_ROWS, SLICE_ROWS_GPU = 128, 1024
