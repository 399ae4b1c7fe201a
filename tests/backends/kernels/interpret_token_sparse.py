"""Run by test_token_sparse.py with TRITON_INTERPRET=1: the Triton kernels on the CPU against the plain scores."""

import torch

from tokred.backends.kernels import token_sparse, token_sparse_triton

token_sparse_triton.SPLIT = 256  # so that few keys have two splits, and the first rows of a window see one of them
SHAPES = [(4, 2, 200, 24, 40), (1, 1, 308, 64, 70), (2, 1, 130, 16, 7)]  # heads, groups, tokens, channels, window
TYPES = [torch.float32, torch.float16]  # NumPy, which interprets, has no bfloat16

for heads, groups, length, width, window in SHAPES:
    for dtype in TYPES:
        torch.manual_seed(length)
        query = torch.randn(length, heads, width).to(dtype).transpose(0, 1)  # strided, as models have it
        key = torch.randn(groups, length, width).to(dtype)
        plain = token_sparse.window_scores(query, key, window, width**-0.5)
        found = token_sparse_triton.window_scores(query, key, window, width**-0.5)
        assert found.shape == plain.shape == (heads, length - window)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-9)
        print(heads, groups, length, width, window, dtype, "agrees")
